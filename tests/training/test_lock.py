"""One training at a time in a working directory, and Ctrl-C."""

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys

import pytest
from test_training import make_config

from respodiff_jax.errors import UserError
from respodiff_jax.training.lock import locked
from respodiff_jax.training.waves import train

HOLD = """
import sys, time
from etils import epath
from respodiff_jax.training.lock import locked
with locked(epath.Path(sys.argv[1])):
    print("locked", flush=True)
    time.sleep(100)
"""

# Another thread compiles or waits in C++ for as long; Python's own handlers do not run meanwhile.
BUSY = """
import jax
from respodiff_jax.training.distributed import Preemption
busy = jax.jit(lambda n: jax.lax.fori_loop(0, n, lambda i, x: (x * 3 + i) % 7, 0))
with Preemption() as preemption:
    print("busy", flush=True)
    busy(2**31 - 1).block_until_ready()
    busy(2**31 - 2).block_until_ready()
    print("done", flush=True)
"""


@contextlib.contextmanager
def started(script, *argv):
    pipe = subprocess.PIPE
    command = [sys.executable, "-c", script, *map(str, argv)]
    with subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True) as process:
        try:
            assert process.stdout.readline().strip() in ("locked", "busy")
            yield process
        finally:
            process.kill()


def test_second_training_in_a_directory_is_refused_until_the_first_ends(tmp_path):
    """However it ends: a killed one leaves its file, but no lock."""
    with started(HOLD, tmp_path) as first:
        owner = f"process {first.pid} on {re.escape(socket.gethostname())} since 20"
        with pytest.raises(UserError, match=f"is in use by another training, {owner}.*wait until"):
            train(make_config(), str(tmp_path))
    ours = pytest.raises(UserError, match=f"process {os.getpid()} on")
    with locked(tmp_path), ours, locked(tmp_path):
        pass
    assert (tmp_path / ".lock").exists()


def test_refused_training_leaves_no_directory(tmp_path):
    with pytest.raises(UserError, match="nowhere"):
        train(make_config(**{"model.name": str(tmp_path / "nowhere")}), str(tmp_path / "run"))
    with pytest.raises(UserError, match="expected a multiple of"):
        train(make_config(**{"train.batch_size": 7}), str(tmp_path / "run"))
    with pytest.raises(UserError, match=r"train\.batch_size=1000000000 needs 3,8\d\d GiB"):
        train(make_config(**{"train.batch_size": 10**9}), str(tmp_path / "run"))
    assert not list(tmp_path.iterdir())


def test_second_interrupt_ends_at_once_even_outside_python():
    with started(BUSY) as process:
        process.send_signal(signal.SIGINT)
        told = [process.stderr.readline() for _ in range(2)]
        assert told[1].startswith("stopping: saves after this step; Ctrl-C again ends at once")
        assert process.poll() is None
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=20) == 130
        assert process.stdout.read() == ""
