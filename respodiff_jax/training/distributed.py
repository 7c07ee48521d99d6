"""One of several processes: it joins the others, stops with them, and leaves when it fails."""

import contextlib
import itertools
import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path

import jax
from jax.experimental import multihost_utils

from respodiff_jax.errors import Interrupted, UserError

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

    One process: SIGTERM. Several: JAX's preemption service, which SIGTERM to any of them triggers.
    `stopped` is what `reached` said last.
    """

    # Counts over the life of the process, as JAX's service does: a run may begin at any step.
    _asked = itertools.count(1)

    def __enter__(self) -> "Preemption":
        self.stopped = self._signalled = False
        if jax.process_count() == 1:
            self._previous = signal.signal(signal.SIGTERM, self._on_signal)
        return self

    def __exit__(self, *exc) -> None:
        if jax.process_count() == 1:
            signal.signal(signal.SIGTERM, self._previous)

    def _on_signal(self, signum, frame) -> None:
        self._signalled = True

    def reached(self) -> bool:
        """Whether to stop after this step; every process calls it at every step."""
        self.stopped = self._signalled
        if jax.process_count() > 1:
            self.stopped = multihost_utils.reached_preemption_sync_point(next(self._asked))
        return self.stopped


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
