"""One training at a time in a working directory."""

import contextlib
import datetime
import fcntl
import json
import os
import socket
from collections.abc import Iterator

import jax
from etils import epath

from respodiff_jax.errors import UserError
from respodiff_jax.storage import is_remote, open_path

LOCK_FILE = ".lock"


@contextlib.contextmanager
def locked(workdir: epath.PathLike) -> Iterator[epath.Path]:
    """Makes a working directory if needed, and keeps other trainings out while the context lasts.

    The operating system ends the lock with the process, however the process ends, so no lock is
    ever stale. Files on gs:// are not locked: an object there would outlive a killed training, and
    a preempted one could not continue until some time had passed. Process 0 locks for all. A
    directory that a mistake leaves empty is removed again.

    Raises:
      UserError: if it cannot be written to, or another training is at work there; the message
        names its host, process and start.
    """
    path = open_path(workdir)
    is_new = not (is_remote(workdir) or path.exists())
    _check_writable(path)
    if is_remote(workdir) or jax.process_index() != 0:
        yield path
        return
    with open(path / LOCK_FILE, "a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            file.seek(0)
            raise UserError(
                f"`workdir` {workdir} is in use by another training, {_owner(file.read())}; wait"
                " until it ends, or use another `workdir`"
            ) from error
        except OSError:
            pass  # a network disk without locks
        now = datetime.datetime.now().astimezone().isoformat(timespec="seconds")
        file.truncate(0)
        file.write(json.dumps({"host": socket.gethostname(), "process": os.getpid(), "start": now}))
        file.flush()
        try:
            yield path
        except UserError:
            if is_new and [entry.name for entry in path.iterdir()] == [LOCK_FILE]:
                path.rmtree()
            raise


def _check_writable(path: epath.Path) -> None:
    """Makes a directory, and checks that it can be written to."""
    probe = path / f".write_probe_{jax.process_index()}"
    try:
        if not is_remote(path):  # on gs:// it would make the bucket
            path.mkdir(parents=True, exist_ok=True)
        probe.write_text("")
        probe.unlink(missing_ok=True)
    except Exception as e:  # gcsfs and Google's authentication raise kinds of their own
        raise UserError(
            f"`workdir` {path} cannot be written to ({getattr(e, 'strerror', None) or e}); give"
            " a directory that can"
        ) from e


def _owner(content: str) -> str:
    """Host, process and start, from a lock file."""
    try:
        owner = json.loads(content)
        return f"process {owner['process']} on {owner['host']} since {owner['start']}"
    except (ValueError, KeyError, TypeError):
        return "which has just begun"
