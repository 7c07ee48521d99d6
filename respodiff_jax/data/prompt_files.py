"""Prompt sets as CSV files: what columns they have, and one reader with clear errors.

The layouts are those in which the sets are in use: profession prompts, I2P (Schramowski et al.,
2023) and COCO-30k captions. Other columns are ignored.
"""

import csv
import dataclasses
import hashlib
import io
import pathlib
import re
from collections.abc import Callable, Iterable, Mapping
from types import MappingProxyType
from typing import Any

import huggingface_hub
from etils import epath

from respodiff_jax.errors import UserError

MAX_SEED = 2**32 - 1
_HUB_FILE = re.compile(r"hf://datasets/([\w.-]+/[\w.-]+)(?:@([^/]+))?/(.+)")


def _seed(text: str) -> int:
    seed = int(text)
    if not 0 <= seed <= MAX_SEED:
        raise UserError
    return seed


def _names(text: str) -> tuple[str, ...]:
    names = tuple(part.strip() for part in text.split(",") if part.strip())
    if not names:
        raise UserError
    return names


@dataclasses.dataclass(frozen=True)
class Column:
    """A column of a CSV file.

    Attributes:
      parse: from a cell's text to its value; raises ValueError for what is none.
      expected: what `parse` takes, in words.
      required: whether the file must have it. What an optional column lacks, or a blank cell of it,
        is None.
      may_be_blank: whether a required column's cells may be blank.
    """

    parse: Callable[[str], Any] = str
    expected: str = "text"
    required: bool = True
    may_be_blank: bool = False


Layout = Mapping[str, Column]

SEED = Column(_seed, f"an integer within 0 .. {MAX_SEED}", required=False)
PROFESSIONS: Layout = MappingProxyType(
    {"prompt": Column(), "profession": Column(), "evaluation_seed": SEED}
)
I2P: Layout = MappingProxyType(
    {
        # One of I2P's prompts is empty in a version that is in use.
        "prompt": Column(may_be_blank=True),
        "categories": Column(_names, "names parted by commas"),
        "evaluation_seed": SEED,
        "evaluation_guidance": Column(float, "a number", required=False),
    }
)
CAPTIONS: Layout = MappingProxyType({"prompt": Column(), "evaluation_seed": SEED})


def complete(layout: Layout) -> Layout:
    """The layout with no column optional."""
    return {name: dataclasses.replace(c, required=True) for name, c in layout.items()}


def locate(file: str) -> pathlib.Path:
    """A file that is here, or of a data set on the Hugging Face hub, fetched if it is not cached.

    Args:
      file: a path, or `hf://datasets/OWNER/NAME[@REVISION]/FILE`.

    Raises:
      UserError: if there is no such file, or the hub cannot be reached.
    """
    on_hub = _HUB_FILE.fullmatch(file)
    if on_hub is None:
        if not pathlib.Path(file).is_file():
            raise UserError(
                f"there is no file {file}; give a CSV file or hf://datasets/OWNER/NAME/FILE"
            )
        return pathlib.Path(file)
    name, revision, path = on_hub.groups()
    try:
        return pathlib.Path(
            huggingface_hub.hf_hub_download(name, path, repo_type="dataset", revision=revision)
        )
    except (OSError, ValueError) as error:
        raise UserError(
            f"{file} cannot be fetched: {error}. Download it where there is a network, and give"
            " its path."
        ) from error


def file_sha256(file: pathlib.Path | epath.Path, expected: str | None = None) -> str:
    """The file's digest, hexadecimal.

    Raises:
      UserError: if it is not the expected one.
    """
    with file.open("rb") as content:
        digest = hashlib.file_digest(content, "sha256").hexdigest()
    if expected is not None and digest != expected.lower():
        raise UserError(
            f"{file} has the sha256 {digest}, expected {expected}: it is damaged, or another"
            " version"
        )
    return digest


def read_table(file: epath.PathLike, layout: Layout, only: bool = False) -> list[dict[str, Any]]:
    """The rows of a CSV file with a header, values parsed, in its order.

    Args:
      file: its path.
      layout: the columns to read.
      only: whether other columns are a mistake; else they are ignored.

    Raises:
      UserError: if the file cannot be read or has no rows, lacks columns, or a cell is not what
        its column holds; naming the line and what is wrong.
    """
    try:
        text = epath.Path(file).read_bytes().decode("utf-8-sig")
        table = csv.DictReader(io.StringIO(text, newline=""))
        names = table.fieldnames or ()
        needed = [name for name, column in layout.items() if column.required]
        if lost := sorted(set(needed) - set(names)):
            raise UserError(
                f"{file} lacks the column(s) {lost}, expected {', '.join(needed)}; it has"
                f" {list(names)}"
            )
        if only and (unknown := sorted(set(names) - set(layout))):
            raise UserError(f"{file} has unknown columns {unknown}, expected {', '.join(layout)}")
        rows = [_parsed(f"{file}, line {table.line_num}", row, layout) for row in table]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{file} cannot be read as CSV in UTF-8: {error}") from error
    if not rows:
        raise UserError(f"{file} has no rows below its header")
    return rows


def _parsed(where: str, row: Mapping[str | None, Any], layout: Layout) -> dict[str, Any]:
    if None in row:
        raise UserError(f"{where}: more cells than columns; put cells with commas in quotes")
    values: dict[str, Any] = {}
    for name, column in layout.items():
        cell = row.get(name) or ""
        blank = not cell.strip()
        if blank and not column.required:
            values[name] = None
            continue
        try:
            if blank and not column.may_be_blank:
                raise UserError
            values[name] = column.parse(cell)
        except ValueError as error:
            raise UserError(f"{where}: {name} is {cell!r}, expected {column.expected}") from error
    return values


def fill_in(templates: Iterable[str], subject: str) -> list[str]:
    """The templates' prompts of a subject; `{subject}` is "teacher", `{a_subject}` "a teacher"."""
    a_subject = f"{'an' if subject[0].lower() in 'aeiou' else 'a'} {subject}"
    return [template.format(subject=subject, a_subject=a_subject) for template in templates]
