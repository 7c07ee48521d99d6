"""Jobs of several processes on one machine: a process is killed, told to stop, or fails."""

import contextlib
import json
import os
import pathlib
import re
import signal
import socket
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from test_launch import PATH, ROOT, launch
from test_waves import modules_of

from respodiff_jax.errors import UserError
from respodiff_jax.training import distributed
from respodiff_jax.training.config import load_config
from respodiff_jax.training.waves import train


def test_distributed_arguments_are_required_together():
    with pytest.raises(UserError, match="process_id missing"):
        distributed.initialize("localhost:1", 2)
    with pytest.raises(UserError, match="'auto' finds"):
        distributed.initialize("localhost:1", 2, 0, auto=True)


@contextlib.contextmanager
def in_training(tmp_path, processes, *arguments, checkpoint_every=10**6):
    """Starts a pod of processes with two devices each, and waits until it trains.

    Yields:
      The process of the script, and a mapping from process number to process id.
    """
    options = {
        "train.steps": 10**6,
        "checkpoint.every": checkpoint_every,
        "log.every": 1,
        "log.grid_every": 0,
    }
    overrides = [f"--config.{key}={value}" for key, value in options.items()]
    workdir = ["--config", "configs/smoke.py", "--workdir", str(tmp_path / "run")]
    with open(tmp_path / "output", "wb") as output:
        process = subprocess.Popen(
            [
                ROOT / "launch" / "local_pod.sh",
                str(processes),
                "2",
                *workdir,
                *overrides,
                *arguments,
            ],
            env=os.environ | {"PATH": PATH},
            cwd=ROOT,
            stdout=output,
            stderr=output,
        )
    try:
        deadline = time.monotonic() + 900
        while not _has_begun(tmp_path / "run"):
            assert process.poll() is None and time.monotonic() < deadline, told(tmp_path)
            time.sleep(0.5)
        children = pathlib.Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text()
        found = {}
        for number in map(int, children.split()):
            line = pathlib.Path(f"/proc/{number}/cmdline").read_text().split("\0")
            found[int(line[line.index("--process-id") + 1])] = number
        yield process, found
    finally:
        process.terminate()
        process.wait(timeout=400)


def _has_begun(workdir):
    return any(path.read_text().count("\n") >= 3 for path in workdir.rglob("metrics.jsonl"))


@pytest.fixture
def pod(tmp_path):
    """A pod of two processes, see `in_training`."""
    with in_training(tmp_path, 2) as started:
        yield started


def told(tmp_path):
    return (tmp_path / "output").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_killed_process_makes_the_other_end_with_a_message(pod, tmp_path, victim):
    process, numbers = pod
    os.kill(numbers[victim], signal.SIGKILL)
    assert process.wait(timeout=200) != 0
    message = re.search(r"a process failed with status \d+; logs in (.*)", told(tmp_path))
    texts = [told(tmp_path), pathlib.Path(message[1], "pod_1.log").read_text()]
    assert re.search("another task died|Connection (closed|reset) by peer", texts[1 - victim])


@pytest.mark.slow
def test_sigterm_to_one_process_saves_all_and_more_processes_continue(pod, tmp_path):
    """Two processes, one of them told to stop, and then four train what one process trains."""
    process, numbers = pod
    os.kill(numbers[1], signal.SIGTERM)
    assert process.wait(timeout=120) == 75
    saved = int(re.search(r"stopped at step (\d+) of", told(tmp_path))[1])
    few = [f"--config.train.steps={saved + 2}", "--config.log.grid_every=0"]
    arguments = ["--config", "configs/smoke.py", "--workdir", str(tmp_path / "run"), *few]
    assert f"continuing at step {saved}" in launch("local_pod.sh", "4", "2", *arguments).stdout
    train(load_config("configs/smoke.py", few), str(tmp_path / "one"))
    assert_same_modules(tmp_path / "run", tmp_path / "one")


def assert_same_modules(workdir, other):
    """Compares the modules of all concepts, to float tolerance."""
    ours, theirs = modules_of(workdir), modules_of(other)
    assert list(ours) == list(theirs)
    for name, parts in ours.items():
        for a, b in zip(parts, theirs[name], strict=True):
            assert np.linalg.norm(b) > 0 and np.linalg.norm(a - b) < 1e-3 * np.linalg.norm(b), name


@pytest.mark.slow
def test_killed_pod_continues_with_fewer_processes(tmp_path):
    """Four processes, one of them killed, and then two train the two waves that one trains."""
    file, workdir = tmp_path / "concepts.jsonl", tmp_path / "run"
    row = {"group": "numbers", "neutral_prompts": ["a person"], "lr_sam": 0.01}
    rows = [row | {"name": f"{i}", "target_prompt": f"the number {i}"} for i in range(12)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    few = ["--config.train.batch_size=1", "--config.train.concepts_per_device=1"]
    concepts = ["--concepts", str(file)]

    def saved_steps():  # complete ones: the kill may interrupt one that is being written
        names = [path.name for path in workdir.glob("waves/0000/checkpoints/*")]
        return [int(name) for name in names if name.isdigit()]

    with in_training(tmp_path, 4, *few, *concepts, checkpoint_every=2) as (process, numbers):
        deadline = time.monotonic() + 300
        while not saved_steps():
            assert process.poll() is None and time.monotonic() < deadline, told(tmp_path)
            time.sleep(0.1)
        os.kill(numbers[3], signal.SIGKILL)
        assert process.wait(timeout=300) != 0
    saved = max(saved_steps())
    few += [f"--config.train.steps={saved + 2}", "--config.log.grid_every=0"]
    arguments = ["--config", "configs/smoke.py", "--workdir", str(workdir), *concepts, *few]
    output = launch("local_pod.sh", "2", "2", *arguments).stdout
    assert f"step {saved}" in output
    train(load_config("configs/smoke.py", few, str(file)), str(tmp_path / "one"))
    assert_same_modules(workdir, tmp_path / "one")
    assert list(modules_of(workdir)) == [row["name"] for row in rows]


LEAVING = """
import sys, time
import jax
from jax.experimental import multihost_utils
from respodiff_jax.training import distributed

port, process_id = sys.argv[1], int(sys.argv[2])
jax.config.update("jax_platforms", "cpu")
distributed.LEAVE_SECONDS = 2
distributed.initialize(f"localhost:{port}", 2, process_id)
with distributed.leaving_on_error():
    multihost_utils.sync_global_devices("begun")
    if process_id == 1:
        raise OSError("no space left on this host")
    multihost_utils.sync_global_devices("never")
"""


STOPPING = """
import os, signal, sys, time
import jax
from respodiff_jax.training import distributed
port, process_id = map(int, sys.argv[1:])
distributed.initialize(f"localhost:{port}", 2, process_id)
with distributed.Preemption() as preemption:
    if process_id == 1:
        os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(3)  # until the service has notified both
    for step in range(3000, 3050):
        time.sleep(0.1)
        if preemption.reached():
            print(f"stopped after step {step}")
            break
"""


def test_sigterm_before_the_first_step_stops_processes_at_the_same_step():
    texts = ["".join(text) for _, text in pair(STOPPING)]
    steps = [re.search(r"stopped after step (\d+)", text)[1] for text in texts]
    assert steps[0] == steps[1]


DAMAGED = """
import pathlib, sys
import jax
import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from respodiff_jax.training import distributed
from respodiff_jax.training.checkpoint import Checkpoints
port, process_id, workdir = sys.argv[1:]
jax.config.update("jax_platforms", "cpu")
distributed.initialize(f"localhost:{port}", 2, int(process_id))
sharding = NamedSharding(Mesh(np.asarray(jax.devices()), ("concept",)), PartitionSpec("concept"))
shape = jax.ShapeDtypeStruct((4 * jax.device_count(), 100), np.float32, sharding=sharding)
with Checkpoints(workdir) as checkpoints:
    for step in (1, 2):
        values = np.random.default_rng(step).normal(size=shape.shape).astype(np.float32)
        checkpoints.save(step, {"a": jax.device_put(values, sharding)})
if process_id == "1":
    for file in pathlib.Path(workdir, "checkpoints", "2", "default", "ocdbt.process_1").rglob("*"):
        if file.is_file():
            file.write_bytes(b"")
multihost_utils.sync_global_devices("damaged")
with Checkpoints(workdir) as checkpoints:
    restored = checkpoints.restore_latest({"a": shape})["a"]
    print(f"{checkpoints.steps} {restored.addressable_shards[0].data[0, 0]:.5f}")
"""


def test_checkpoint_damaged_on_one_process_is_skipped_by_all(tmp_path):
    (_, first), (_, second) = pair(DAMAGED, tmp_path)
    for out, error in (first, second):
        assert "[1] " in out, error
    assert "checkpoint 2 is damaged (on another process)" in first[0]
    assert (tmp_path / "damaged_checkpoints" / "2").is_dir()


def test_failed_process_leaves_without_waiting_for_the_others():
    (first, _), (second, texts) = pair(LEAVING)  # JAX itself waits 300 s
    assert second == 1 and "no space left on this host" in "".join(texts)
    assert first != 0


def pair(program, *arguments):
    """Exit status and output of two processes that run a program together."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", program, str(port), str(number), *map(str, arguments)],
            env=os.environ | {"XLA_FLAGS": ""},  # one device each
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for number in range(2)
    ]
    texts = [process.communicate(timeout=240) for process in processes]
    return [(p.returncode, text) for p, text in zip(processes, texts, strict=True)]


@pytest.mark.parametrize(
    ("model", "batch_size", "cores", "devices"),
    [
        ("emoji-world", None, 2, [2]),
        ("emoji-world", 6, 4, [3]),
        ("emoji-world", 7, 2, [1]),
        ("emoji-world", None, 64, [8]),
        ("random/tiny", None, 2, []),  # no folder
        ("large", None, 2, []),
        ("large of Flax", None, 2, []),
        (None, None, 2, []),
    ],
)
def test_small_models_have_a_device_on_each_core(
    model, batch_size, cores, devices, tmp_path, monkeypatch
):
    for folder, weights in (("large", "model.safetensors"), ("large of Flax", "model.msgpack")):
        (tmp_path / folder / "unet").mkdir(parents=True)
        with open(tmp_path / folder / "unet" / weights, "wb") as file:
            file.truncate(2**28)
    monkeypatch.chdir(tmp_path)
    chosen = []
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(cores)))
    monkeypatch.setattr(jax.config, "update", lambda name, value: chosen.append(value))
    distributed.use_cores(model, batch_size)
    assert chosen == []  # XLA_FLAGS has a number
    monkeypatch.delenv("XLA_FLAGS")
    distributed.use_cores(model, batch_size)
    assert chosen == devices
