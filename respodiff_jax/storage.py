"""Files on this machine and on Google Cloud Storage (`gs://bucket/folder`), by one kind of path.

Objects of a bucket are written whole, cannot grow, and have no folders around them; what would
differ for that reason is here.
"""

import contextlib
import importlib.util
import json
import os
import pathlib
import tempfile
from collections.abc import Iterator
from typing import Any

from etils import epath

from respodiff_jax.errors import UserError

PathLike = str | os.PathLike


def is_remote(path: PathLike) -> bool:
    """Whether a path is on Google Cloud Storage."""
    return os.fspath(path).startswith("gs://")


def open_path(path: PathLike) -> epath.Path:
    """The path as one to read and write through.

    Raises:
      UserError: for gs:// where the packages that it needs are not installed.
    """
    # google-cloud-storage, which Orbax uses, comes with gcsfs.
    if is_remote(path) and importlib.util.find_spec("gcsfs") is None:
        raise UserError(
            f"{os.fspath(path)} is on Google Cloud Storage, for which gcsfs is needed; install it"
            ' with: pip install -e ".[gcs]"'
        )
    return epath.Path(path)


def local_path(path: PathLike, what: str) -> pathlib.Path:
    """A path on this machine, for what reads or writes nowhere else.

    Raises:
      UserError: if it is not; `what` is what the path is called.
    """
    if is_remote(path):
        raise UserError(
            f"{what} {os.fspath(path)} is on Google Cloud Storage, which this does not reach; give"
            " one of this machine, and copy it with: gcloud storage cp -r"
        )
    return pathlib.Path(path)


def check_output(out: PathLike, overwrite: bool = False) -> pathlib.Path:
    """Makes sure that a folder on this machine may be written to; it is made if it does not exist.

    Raises:
      UserError: when it is not empty and not to be overwritten, or cannot be written.
    """
    out = local_path(out, "output folder")
    try:
        out.mkdir(parents=True, exist_ok=True)
        empty = not any(out.iterdir())
    except OSError as error:
        raise UserError(f"output folder {out} cannot be made or read: {error}") from error
    if not os.access(out, os.W_OK):
        raise UserError(f"output folder {out} cannot be written: no permission")
    if not empty and not overwrite:
        raise UserError(
            f"output folder {out} is not empty; choose another, or give --overwrite to replace the"
            " images in it"
        )
    return out


def parse_json(text: str, where: str) -> Any:
    """`json.loads`, of a text that is named in the error.

    Raises:
      UserError: if it is no JSON.
    """
    try:
        return json.loads(text)
    except ValueError as error:
        raise UserError(f"{where} is damaged: {error}. Mend it or move the file away") from error


def read_json_lines(path: epath.Path) -> list[Any]:
    """What a file has, a JSON value a line; a last line that was cut off while written is left out.

    Raises:
      UserError: naming the file and the line that is something else.
    """
    lines = path.read_text().split("\n")[:-1]  # other ends of lines may be within a value
    return [parse_json(line, f"{path}, line {n},") for n, line in enumerate(lines, start=1)]


def write_whole(path: pathlib.Path | epath.Path, content: str | bytes) -> None:
    """Writes a file so that it is never seen half-written, and an older one is kept until then."""
    partial = path.with_name(path.name + ".partial")
    partial.write_bytes(content.encode() if isinstance(content, str) else content)
    partial.replace(path)


def append_text(path: epath.Path, text: str) -> None:
    """Adds text to the end of a file, which is made if it does not exist.

    On Google Cloud Storage the whole file is written again.
    """
    if is_remote(path):
        path.write_text((path.read_text() if path.exists() else "") + text)
    else:
        with path.open("a") as file:
            file.write(text)


@contextlib.contextmanager
def local_copy(path: PathLike) -> Iterator[pathlib.Path]:
    """A file on this machine with the content of a file, for what reads no others: the file itself
    or, of a remote one, a copy that goes away at the end."""
    if not is_remote(path):
        yield pathlib.Path(path)
        return
    with tempfile.TemporaryDirectory() as folder:
        copy = pathlib.Path(folder, pathlib.PurePosixPath(path).name)
        copy.write_bytes(open_path(path).read_bytes())
        yield copy


class LocalFolder:
    """A folder on this machine, for what writes nowhere else.

    It is the folder itself or, for a remote one, another, of which `push` copies the files there.

    Args:
      path: the folder.

    Attributes:
      path: where to write.
    """

    def __init__(self, path: PathLike):
        self._remote = open_path(path) if is_remote(path) else None
        self._temporary = tempfile.TemporaryDirectory() if self._remote else None
        self.path = pathlib.Path(self._temporary.name if self._temporary else path)

    def push(self) -> None:
        """Makes what has been written so far seen."""
        if self._remote:
            for file in sorted(self.path.rglob("*")):
                if file.is_file():
                    target = self._remote / file.relative_to(self.path).as_posix()
                    target.write_bytes(file.read_bytes())

    def close(self) -> None:
        self.push()
        if self._temporary:
            self._temporary.cleanup()


def check_output_file(path: PathLike, name: str) -> pathlib.Path:
    """The path of a file on this machine; call it before the work whose result it takes.

    Args:
      path: the file; it need not exist.
      name: the parameter that gave the path, for the message.

    Raises:
      UserError: if the path is remote or a folder, its own folder does not exist, or writing is
        not permitted.
    """
    file = local_path(path, f"`{name}`")
    if not file.parent.is_dir():
        raise UserError(
            f"`{name}` is {file}, but the folder {file.parent} does not exist; create it first"
        )
    if file.is_dir():
        raise UserError(f"`{name}` is {file}, which is a folder; expected a file")
    if not os.access(file if file.exists() else file.parent, os.W_OK):
        raise UserError(f"`{name}` is {file}, which cannot be written: no permission")
    return file
