"""Files on this machine and on Google Cloud Storage (`gs://bucket/folder`), by one kind of path.

A bucket differs from a disk: an object is written whole, cannot grow, and needs no folder around
it. Only this file handles these differences.

In messages, `what` is the role of a path. A path may be on gs:// unless a docstring says otherwise.
"""

import contextlib
import dataclasses
import importlib.util
import json
import math
import os
import pathlib
import re
import stat
import tempfile
from collections.abc import Iterator
from typing import Any, TypeVar

import msgspec
from etils import epath

from respodiff_jax.errors import UserError

PathLike = str | os.PathLike

MAX_TEXT_BYTES = 2**28

T = TypeVar("T")


def is_remote(path: PathLike) -> bool:
    """Whether a path is on Google Cloud Storage."""
    return os.fspath(path).startswith("gs://")


def open_path(path: PathLike) -> epath.Path:
    """A path that reads and writes both on this machine and on Google Cloud Storage.

    Raises:
      UserError: if the path is empty, or on gs:// and gcsfs is not installed.
    """
    if not os.fspath(path):
        raise UserError("a path is empty, expected the name of a folder or a file")
    # google-cloud-storage, which Orbax uses, comes with gcsfs.
    if is_remote(path) and importlib.util.find_spec("gcsfs") is None:
        raise UserError(
            f"{os.fspath(path)} is on Google Cloud Storage, which needs gcsfs; install it with:"
            ' pip install -e ".[gcs]"'
        )
    return epath.Path(path)


def local_path(path: PathLike, what: str) -> pathlib.Path:
    """The path, for code that works on this machine only; raises `UserError` if it is on gs://."""
    if is_remote(path):
        raise UserError(
            f"{what} {os.fspath(path)} is on Google Cloud Storage, expected a path on this machine;"
            " copy it with: gcloud storage cp -r"
        )
    return pathlib.Path(path)


def check_output(out: PathLike) -> pathlib.Path:
    """Checks that an output folder on this machine can be written, or made; makes nothing.

    Raises:
      UserError: if it cannot.
    """
    open_path(out)  # refuses an empty path
    out = local_path(out, "output folder")
    existing = next(path for path in (out, *out.absolute().parents) if path.exists())
    if not existing.is_dir():
        raise UserError(f"output folder {out} cannot be made: {existing} is a file")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise UserError(f"output folder {out} cannot be written: no permission for {existing}")
    return out


def check_regular(path: PathLike, what: str, max_bytes: int | None = None) -> None:
    """Checks that something to be read is a file: reading a pipe or a device may never end.

    Raises:
      UserError: for anything else on this machine, or a file of more than `max_bytes`.
    """
    if is_remote(path) or not os.path.exists(path):
        return  # reading it says what is wrong
    status = os.stat(path)
    if not stat.S_ISREG(status.st_mode):
        kind = "folder" if stat.S_ISDIR(status.st_mode) else "pipe or device"
        raise UserError(f"{what} {os.fspath(path)} is a {kind}, expected a file")
    if max_bytes is not None and status.st_size > max_bytes:
        raise UserError(
            f"{what} {os.fspath(path)} has {status.st_size / 2**20:,.0f} MiB, expected at most"
            f" {max_bytes / 2**20:,.0f} MiB; it is damaged, or another kind of file"
        )


def read_text(path: PathLike, what: str) -> str:
    """The text of a UTF-8 file; a byte order mark is dropped, line ends stay as they are.

    Raises:
      UserError: if it is no file, has more than `MAX_TEXT_BYTES`, cannot be read, or is not UTF-8.
    """
    check_regular(path, what, MAX_TEXT_BYTES)
    try:
        return open_path(path).read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise UserError(f"{what} {path} cannot be read: {error}") from error
    except UnicodeDecodeError as error:
        raise UserError(
            f"{what} {path} cannot be read as UTF-8: {error.reason} at byte {error.start}"
        ) from error


def parse_json(text: str, where: str) -> Any:
    """The value of a JSON text that every reader of JSON reads in the same way.

    Repeated keys, numbers beyond 64 bits, NaN and infinity, halves of surrogate pairs and very deep
    nesting are errors.

    Raises:
      UserError: if the text is not such JSON; the message gives `where`, its file, and the position
        or the reason.
    """
    try:
        value = json.loads(
            text,
            object_pairs_hook=_without_repeated_keys,
            parse_int=_whole_number,
            parse_float=_number,
            parse_constant=_number,
        )
        if "\\u" in text:
            json.dumps(value, ensure_ascii=False).encode()
        return value
    except json.JSONDecodeError as error:
        line = f"line {error.lineno}, " if "\n" in text else ""
        raise UserError(
            f"{where} is not JSON: {line}column {error.colno}: {error.msg}; fix the file or move it"
            " away"
        ) from error
    except RecursionError as error:
        raise UserError(f"{where} is not JSON that can be read: it is nested too deep") from error
    except UnicodeEncodeError as error:
        raise UserError(
            f"{where} is not JSON that can be read: it has half of a surrogate pair, \\ud8.. or"
            " \\udc.., which is no text"
        ) from error
    except ValueError as error:
        raise UserError(f"{where} is not JSON that can be read: {error}") from error


def checked(kind: type[T], value: Any, where: str) -> T:
    """A JSON value as a dataclass or another annotated type; types are not converted.

    Fields that a dataclass does not have are errors; those of a `TypedDict` are not, and are left
    out of the result.

    Raises:
      UserError: naming `where`, the field, what came and what its annotation expects, or as the
        dataclass itself raises.
    """
    if dataclasses.is_dataclass(kind) and isinstance(value, dict):
        known = [field.name for field in dataclasses.fields(kind)]
        if unknown := sorted(set(value) - set(known)):
            names = ", ".join(unknown)
            raise UserError(
                f"{where} has the unknown fields {names:.100}; expected {', '.join(known)}"
            )
    try:
        return msgspec.convert(value, kind)
    except msgspec.ValidationError as error:
        if isinstance(error.__cause__, UserError):
            raise UserError(f"{where}: {error.__cause__}") from error
        reason, _, place = str(error).partition(" - at ")
        steps = re.findall(r"\.(\w+)|\[(\d+)\]|(\[\.\.\.\])", place)
        for key, index, unknown in steps:
            value = ... if value is ... or unknown else value[key] if key else value[int(index)]
        field = place.strip("`").removeprefix("$").removeprefix(".") or "content"
        came = "" if value is ... else f" is {value!r:.60}:"
        reason = reason.replace(r" matching regex '\\S'", " that is not blank")
        reason = reason.replace("Object missing required field", "it lacks the field")
        for name, words in _JSON_WORDS.items():
            reason = re.sub(rf"\b{name}\b", words, reason)
        reason = reason[:1].lower() + reason[1:].replace("`", "")
        raise UserError(f"{where}: {field}{came} {reason}; fix the file or move it away") from error


_JSON_WORDS = {
    "array": "a list",
    "object": "a mapping",
    "str": "a text",
    "int": "a whole number",
    "float": "a number",
}


def _whole_number(text: str) -> int:
    if len(text) > 20 or abs(int(text)) >= 2**63:
        raise ValueError(f"the number {text[:20]} has {len(text)} digits, expected 18 at most")
    return int(text)


def _number(text: str) -> float:
    if not math.isfinite(number := float(text)):
        raise ValueError(f"the number {text[:20]} is not finite")
    return number


def read_json(path: PathLike, what: str) -> Any:
    """The value in a JSON file.

    Raises:
      UserError: if the file cannot be read, or is not JSON in UTF-8.
    """
    return parse_json(read_text(path, what), f"{what} {path}")


def read_json_lines(path: PathLike, what: str = "log") -> list[Any]:
    """The values of a file that grows by one line of JSON at a time.

    A last line without an end is left out: the process that wrote it was killed.

    Raises:
      UserError: if the file cannot be read, or a line is not JSON in UTF-8.
    """
    # Only "\n" ends a line: JSON texts may hold the other line ends that `splitlines` knows.
    lines = read_text(path, what).split("\n")[:-1]
    return [parse_json(line, f"{what} {path}, line {n}") for n, line in enumerate(lines, start=1)]


def read_objects(path: PathLike, what: str) -> list[tuple[str, dict[str, Any]]]:
    """The JSON objects of a file that people write, a line each, with their places for messages.

    Raises:
      UserError: if the file cannot be read, or a line is neither blank nor a JSON object in UTF-8.
    """
    rows = []
    for number, line in enumerate(read_text(path, what).split("\n"), start=1):
        if line.strip():
            where = f"{path}, line {number}"
            row = parse_json(line, where)
            if not isinstance(row, dict):
                raise UserError(f"{where}: {row!r:.80}, expected an object in braces")
            rows.append((where, row))
    return rows


def _without_repeated_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        repeated = sorted(key for key in found if keys.count(key) > 1)
        raise ValueError(f"an object has the keys {repeated} more than once")
    return found


def write_whole(path: pathlib.Path | epath.Path, content: str | bytes) -> None:
    """Writes a file in one move: readers see the old content or the new, never a part."""
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
    """A file on this machine with the content of `path`: itself, or a copy that is then deleted."""
    if not is_remote(path):
        check_regular(path, "file")
        yield pathlib.Path(path)
        return
    with tempfile.TemporaryDirectory() as folder:
        copy = pathlib.Path(folder, pathlib.PurePosixPath(path).name)
        copy.write_bytes(open_path(path).read_bytes())
        yield copy


class LocalFolder:
    """A folder on this machine, for libraries that write to no other.

    Its `path` is the given folder itself or, if that is remote, a temporary folder. `push` copies
    the files of the temporary folder to the remote one.
    """

    def __init__(self, path: PathLike):
        self._remote = open_path(path) if is_remote(path) else None
        self._temporary = tempfile.TemporaryDirectory() if self._remote else None
        self.path = pathlib.Path(self._temporary.name if self._temporary else path)

    def push(self) -> None:
        """Copies the files written so far to the remote folder, if there is one."""
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

    Raises:
      UserError: if the path is remote or a folder, its own folder does not exist, or writing is
        not permitted; `name` is the parameter that gave the path.
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
