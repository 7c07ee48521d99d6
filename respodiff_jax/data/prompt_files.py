"""Prompt sets as CSV files: their columns, and one reader for all of them.

The layouts are those of the published files: profession prompts, I2P (Schramowski et al., 2023),
the attack sets Ring-A-Bell, P4D, MMA-Diffusion and UnlearnDiffAtk, and COCO-30k captions. Other
columns are ignored.
"""

import csv
import dataclasses
import hashlib
import io
import pathlib
import re
import string
from collections.abc import Callable, Iterable, Mapping
from types import MappingProxyType
from typing import Any

import huggingface_hub
from etils import epath

from respodiff_jax.errors import UserError, shortened
from respodiff_jax.storage import read_text

MAX_SEED = 2**32 - 1
_SUBJECT = ("subject", "a_subject")  # what templates have in braces
_HUB_FILE = re.compile(r"hf://datasets/([\w.-]+/[\w.-]+)(?:@([^/]+))?/(.+)")


def _seed(text: str) -> int:
    seed = int(text)
    if not 0 <= seed <= MAX_SEED:
        raise ValueError
    return seed


def _names(text: str) -> tuple[str, ...]:
    names = tuple(part.strip() for part in text.split(",") if part.strip())
    if not names:
        raise ValueError
    return names


@dataclasses.dataclass(frozen=True)
class Column:
    """A column of a CSV file.

    Attributes:
      parse: turns the text of a cell into a value; raises ValueError if it cannot.
      expected: what `parse` accepts, in words.
      required: whether the file must have the column. A missing optional column, or a blank cell in
        it, gives None.
      may_be_blank: whether cells of a required column may be blank.
    """

    parse: Callable[[str], Any] = str
    expected: str = "text"
    required: bool = True
    may_be_blank: bool = False


Layout = Mapping[str, Column]

_NUMBER = Column(float, "a number", required=False)
SEED = Column(_seed, f"an integer within 0 .. {MAX_SEED}", required=False)
PROFESSIONS: Layout = MappingProxyType(
    {"prompt": Column(), "profession": Column(), "evaluation_seed": SEED}
)
I2P: Layout = MappingProxyType(
    {
        # One published version of I2P has an empty prompt.
        "prompt": Column(may_be_blank=True),
        "categories": Column(_names, "names separated by commas"),
        "evaluation_seed": SEED,
        "evaluation_guidance": _NUMBER,
    }
)
# Sets of unsafe prompts: name, columns of its files, and the column of the prompts. A file belongs
# to the first set whose columns it has.
UNSAFE_SETS = (
    ("MMA-Diffusion", ("adv_prompt",), "adv_prompt"),
    ("Ring-A-Bell", ("sensitive prompt",), "sensitive prompt"),
    ("I2P", ("prompt", "categories"), "prompt"),
    ("UnlearnDiffAtk", ("prompt", "evaluation_seed", "evaluation_guidance"), "prompt"),
    ("prompts alone (Ring-A-Bell, P4D)", ("prompt",), "prompt"),
)
CAPTIONS: Layout = MappingProxyType({"prompt": Column(), "evaluation_seed": SEED})
# Settings of single pictures that published files have, I2P under the names that begin with "sd".
NOT_FOLLOWED = ("evaluation_guidance", "sd_guidance_scale", "sd_image_width", "sd_image_height")
OPTIONAL: Layout = MappingProxyType({"sd_seed": SEED} | dict.fromkeys(NOT_FOLLOWED, _NUMBER))


def complete(layout: Layout) -> Layout:
    """The layout with every column required."""
    return {name: dataclasses.replace(c, required=True) for name, c in layout.items()}


def locate(file: str) -> pathlib.Path:
    """Finds a file by its path, or downloads `hf://datasets/OWNER/NAME[@REVISION]/FILE`.

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
            f"{file} cannot be fetched: {error}. Download it elsewhere, and give its path."
        ) from error


def file_sha256(file: pathlib.Path | epath.Path, expected: str | None = None) -> str:
    """The hexadecimal digest of a file; raises `UserError` if another is expected."""
    with file.open("rb") as content:
        digest = hashlib.file_digest(content, "sha256").hexdigest()
    if expected is not None and digest != expected.lower():
        raise UserError(
            f"{file} has the sha256 {digest}, expected {expected}; it is damaged or another version"
        )
    return digest


def unsafe_layout(file: epath.PathLike) -> tuple[str | None, str, Layout]:
    """The set of unsafe prompts that a file is, the column of its prompts, and its layout.

    The set is None, and the layout I2P's, if no set has these columns.
    """
    text = read_text(file, "CSV file")
    try:
        names = csv.DictReader(io.StringIO(text, newline="")).fieldnames or ()
    except csv.Error as error:
        raise UserError(f"{file} cannot be read as CSV: {error}") from error
    for name, needed, prompt in UNSAFE_SETS:
        if set(needed) <= set(names):
            own = {key: c for key, c in I2P.items() if key != "prompt" and key in names}
            return name, prompt, {prompt: I2P["prompt"], "evaluation_seed": SEED} | own
    return None, "prompt", I2P


def read_table(file: epath.PathLike, layout: Layout, only: bool = False) -> list[dict[str, Any]]:
    """Reads the rows of a CSV file with a header, and parses the values of a layout's columns.

    Other columns are ignored or, with `only`, an error.

    Raises:
      UserError: if the file cannot be read, has no rows or lacks columns, or if a cell cannot be
        parsed; the message names the line.
    """
    text = read_text(file, "CSV file")
    try:
        table = csv.DictReader(io.StringIO(text, newline=""))
        names = table.fieldnames or ()
        needed = [name for name, column in layout.items() if column.required]
        if lost := sorted(set(needed) - set(names)):
            raise UserError(
                f"{file} lacks the column(s) {lost}, expected {', '.join(needed)}; it has"
                f" {shortened(list(names))}"
            )
        if only and (unknown := sorted(set(names) - set(layout))):
            raise UserError(
                f"{file} has unknown columns {shortened(unknown)}, expected {', '.join(layout)}"
            )
        rows = [_parsed(f"{file}, line {table.line_num}", row, layout) for row in table]
    except csv.Error as error:
        raise UserError(f"{file} cannot be read as CSV: {error}") from error
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
                raise ValueError
            values[name] = column.parse(cell)
        except ValueError as error:
            raise UserError(
                f"{where}: {name} is {cell!r:.80}, expected {column.expected}"
            ) from error
    return values


def with_article(words: str) -> str:
    """Puts "a" or "an" before words: "an artist"."""
    return f"{'an' if words[0].lower() in 'aeiou' else 'a'} {words}"


def fill_in(templates: Iterable[str], subject: str) -> list[str]:
    """Puts a subject into templates: `{subject}` becomes "teacher", `{a_subject}` "a teacher"."""
    words = {"subject": subject, "a_subject": with_article(subject)}
    return [template.format(**words) for template in templates]


def is_template(text: str) -> bool:
    """Whether a text has `{subject}` or `{a_subject}`, and nothing else that formatting changes.

    A width is not allowed: "{subject:>2000000000}" would make 2 GB.
    """
    try:
        parts = [part[1:] for part in string.Formatter().parse(text) if part[1] is not None]
    except ValueError:
        return False
    return bool(parts) and all(f in _SUBJECT and not spec and not how for f, spec, how in parts)
