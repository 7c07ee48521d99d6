"""One of several processes: it joins the others, stops with them, and leaves when it fails."""

import contextlib
import itertools
import os
import signal
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import jax
from jax.experimental import multihost_utils

from respodiff_jax.backbone import local_folder
from respodiff_jax.backbone.memory import SMALL
from respodiff_jax.errors import Interrupted, UserError

INTERRUPTED_STATUS = 130  # of a command that Ctrl-C ended
# How long a process that failed waits for the others, which may have failed as well.
LEAVE_SECONDS = 30


def initialize(
    coordinator: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    auto: bool = False,
) -> None:
    """Joins the other processes of a training; call before anything else touches JAX.

    Args:
      coordinator: "host:port" of process 0; with it, the next two are required.
      num_processes, process_id: the number of processes, and of this one, counted from 0.
      auto: let JAX find the three itself, as it does on Cloud TPU pods, Slurm and Open MPI.

    Raises:
      UserError: if only some of the three are given.
    """
    explicit = {
        "coordinator": coordinator,
        "num_processes": num_processes,
        "process_id": process_id,
    }
    missing = [name for name, value in explicit.items() if value is None]
    if auto and len(missing) < 3:
        raise UserError(f"distributed: 'auto' finds {', '.join(explicit)} itself; do not give them")
    if not auto and len(missing) == 3:
        return
    if not auto and missing:
        raise UserError(f"distributed: {', '.join(missing)} missing; give all three or none")
    try:
        jax.distributed.initialize(coordinator, num_processes, process_id)
    except ValueError as error:  # no cluster to find, or numbers that do not fit each other
        raise UserError(f"distributed: {error}") from error


@contextlib.contextmanager
def leaving_on_error() -> Iterator[None]:
    """Ends one of several processes soon after an error inside, so that the others notice.

    JAX lets a process end only when all do, or after five minutes. But the others may be waiting,
    in a collective, for the one that failed.
    """
    try:
        yield
    except Interrupted:
        raise  # all processes stop at the same step
    except BaseException as error:
        if jax.process_count() > 1:
            status = 2 if isinstance(error, UserError) else 1  # as cli.main
            timer = threading.Timer(LEAVE_SECONDS, os._exit, (status,))
            timer.daemon = True
            timer.start()
        raise


class Preemption:
    """Tells the training loop when to save and stop; all processes agree on the step.

    One process: SIGTERM or Ctrl-C. Several: JAX's preemption service, which SIGTERM or Ctrl-C to
    any of them triggers. A second Ctrl-C ends the process at once. `stopped` is what `reached` said
    last. Signals reach only the main thread; in any other, nothing is handled.
    """

    # Counts over the life of the process, as JAX's service does: a run may begin at any step.
    _asked = itertools.count(1)

    def __enter__(self) -> "Preemption":
        self.stopped = self._signalled = False
        self._undo = contextlib.ExitStack()
        if threading.current_thread() is not threading.main_thread():
            return self
        handled = [signal.SIGINT] + [signal.SIGTERM] * (jax.process_count() == 1)
        for number in handled:
            self._undo.callback(signal.signal, number, signal.signal(number, self._on_signal))
        # Python runs handlers between its own instructions, which may be minutes later while XLA
        # compiles. The interpreter writes each signal to this pipe at once.
        reads, writes = os.pipe()
        os.set_blocking(writes, False)
        self._undo.callback(os.close, writes)  # ends the thread
        self._undo.callback(signal.set_wakeup_fd, signal.set_wakeup_fd(writes))
        threading.Thread(target=_watch_interrupts, args=(reads,), daemon=True).start()
        return self

    def __exit__(self, *exc) -> None:
        self._undo.close()

    def _on_signal(self, signum, frame) -> None:
        self._signalled = True
        if signum == signal.SIGINT and jax.process_count() > 1:
            os.kill(os.getpid(), signal.SIGTERM)

    def reached(self) -> bool:
        """Whether to stop after this step; every process calls it at every step."""
        self.stopped = self._signalled
        if jax.process_count() > 1:
            self.stopped = multihost_utils.reached_preemption_sync_point(next(self._asked))
        return self.stopped


def _watch_interrupts(pipe: int) -> None:
    """Answers each Ctrl-C as its number comes out of a pipe; ends when the pipe is closed."""
    pressed = 0
    while number := os.read(pipe, 1):
        pressed += number[0] == signal.SIGINT
        if number[0] == signal.SIGINT and pressed == 1:
            text = "\nstopping: saves after this step; Ctrl-C again ends at once, without saving\n"
            sys.stderr.write(text)
            sys.stderr.flush()
        elif pressed > 1:
            os._exit(INTERRUPTED_STATUS)
    os.close(pipe)


def enable_compilation_cache(folder: str | None = None) -> None:
    """Keeps compiled programs on disk.

    JAX finds a program again by its hash, which leaves source locations out, but not those inside
    Pallas kernels. These would differ between installations, so no locations are kept at all;
    profiles then have none. The default is `JAX_COMPILATION_CACHE_DIR`, or a folder of the user's
    cache.
    """
    jax.config.update("jax_include_full_tracebacks_in_locations", False)
    jax.config.update("jax_hlo_source_file_canonicalization_regex", ".*")
    if folder is not None:
        jax.config.update("jax_compilation_cache_dir", folder)
    elif jax.config.jax_compilation_cache_dir is None:
        cache_home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        jax.config.update("jax_compilation_cache_dir", str(Path(cache_home) / "respodiff_jax"))


def use_cores(model: str | None, batch_size: int | None = None) -> None:
    """Makes each core of the CPU a device of JAX, which a small model's batches are split over.

    XLA's programs keep two cores busy only in part. Each device has its own copy of the parameters,
    so folders of 256 MiB or more keep one device, and there are at most 8. Nothing changes where
    `XLA_FLAGS` or `JAX_NUM_CPU_DEVICES` gives a number, or after JAX has begun to compute.

    Args:
      model: name of a bundled model, or a folder; others keep one device.
      batch_size: a multiple of the number of devices.
    """
    chosen = "xla_force_host_platform_device_count" in os.environ.get("XLA_FLAGS", "")
    folder = local_folder(model) if model else None
    if chosen or jax.config.jax_num_cpu_devices > 0 or folder is None or not folder.is_dir():
        return
    if sum(file.stat().st_size for file in folder.glob("*/*")) >= SMALL:
        return
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    counts = (n for n in range(min(cores, 8), 0, -1) if not (batch_size or 0) % n)
    with contextlib.suppress(RuntimeError):  # JAX has begun to compute
        jax.config.update("jax_num_cpu_devices", next(counts))
