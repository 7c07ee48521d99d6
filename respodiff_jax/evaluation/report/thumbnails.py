"""Thumbnails inside a page, and grids of thumbnails with what the classifier saw."""

import base64
import collections
import dataclasses
import io
import pathlib
from collections.abc import Iterable, Mapping, Sequence
from urllib.parse import quote

from PIL import Image

from respodiff_jax.evaluation.pictures import UNREADABLE
from respodiff_jax.evaluation.report import charts
from respodiff_jax.evaluation.report.glossary import readable
from respodiff_jax.evaluation.report.markup import Markup, tag

MAX_COLUMNS, MIN_COLUMNS = 8, 2
MAX_PICTURES = 640  # about 20 kB each
THUMBNAIL = 384  # pixels; a picture opens large
_SMALL = 96  # pixels; smaller pictures are stored without loss
_LINE = 4  # pictures side by side on a phone

Row = Mapping[str, str]  # of per_image.csv
BySubject = dict[str, dict[str, list[Row]]]  # subject, set of pictures, in order


@dataclasses.dataclass(frozen=True)
class Attribute:
    """An attribute that was classified.

    Attributes:
      name: its column in `per_image.csv`.
      values: its values, in the order of symbols and colours.
      start: number of its first symbol and colour; attributes of a page share none.
    """

    name: str
    values: tuple[str, ...]
    start: int = 0

    def badge(self, row: Row, plain: bool) -> Markup | None:
        """A picture's value as symbol and text; None if it was not classified.

        Args:
          row: the picture.
          plain: whether to leave out the colour.
        """
        value = row.get(self.name)
        if not value:
            return None
        text = f"{charts.symbol(self._place(value))} {value}"
        return tag("span", text, class_=f"badge {'plain' if plain else self.colour(row)}")

    def colour(self, row: Row) -> str | None:
        """The CSS class of a picture's colour; None if it was not classified."""
        value = row.get(self.name)
        return charts.colour(self._place(value)) if value else None

    def _place(self, value: str) -> int:
        known = value in self.values
        return self.start + (self.values.index(value) if known else len(self.values))


def thumbnail(path: pathlib.Path) -> str | None:
    """A picture as the data URI of a small WebP; None if it cannot be read.

    A page has each picture once: the same element is small in its row and opens large.
    """
    try:
        with Image.open(path) as image:
            small = image.convert("RGB")
    except UNREADABLE:
        return None
    small.thumbnail((THUMBNAIL, THUMBNAIL), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    small.save(buffer, "WEBP", lossless=max(image.size) <= _SMALL, quality=80)
    return f"data:image/webp;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def by_subject(rows: Iterable[Row]) -> BySubject:
    """The fairness rows by subject and set of pictures.

    A subject's pictures at one place share their noise, in all runs with the same seeds.
    """
    found: BySubject = {}
    for row in rows:
        if row["protocol"] == "fairness":
            sets = found.setdefault(row["subject"], collections.defaultdict(list))
            sets[row["images"]].append(row)
    return found


def columns_for(subjects: int, rows: int) -> int:
    """Number of pictures of each subject that keeps the page small."""
    return max(MIN_COLUMNS, min(MAX_COLUMNS, MAX_PICTURES // max(subjects * rows, 1)))


def grid(
    rows: Sequence[tuple[str, pathlib.Path, Sequence[Row]]],
    attributes: Sequence[Attribute],
    columns: int,
) -> Markup | None:
    """Rows of pictures; a column has the pictures of one place, and so of one noise.

    Args:
      rows: name, folder and pictures of each row.
      attributes: attributes to mark; the first one colours the frames.
      columns: largest number of columns.

    Returns:
      The grid; None if no place has a picture in every row.
    """
    cells: list[list[Markup]] = []
    for place in range(min(len(pictures) for _, _, pictures in rows)):
        column = [_picture(name, folder, found[place], attributes) for name, folder, found in rows]
        if None not in column:
            cells.append(column)
        if len(cells) == columns:
            break
    if not cells:
        return None
    blocks = []
    for start in range(0, len(cells), _LINE):
        block = cells[start : start + _LINE]
        lines = []
        for i, (name, _, _) in enumerate(rows):
            lines.append(tag("span", tag("span", name), class_="side", aria_hidden="true"))
            lines += [column[i] for column in block]
            lines += [tag("span")] * (_LINE - len(block))
        blocks.append(tag("div", lines, class_="block", style=f"--rows:{len(rows)}"))
    return tag("div", blocks, class_="grid")


def _picture(
    name: str, folder: pathlib.Path, row: Row, attributes: Sequence[Attribute]
) -> Markup | None:
    uri = thumbnail(folder / row["file"])
    if uri is None:
        return None
    seen = ", ".join(
        f"{readable(a.name)} {row[a.name]}{_probability(row, a)}"
        for a in attributes
        if row.get(a.name)
    )
    alt = f"{name}: “{row['prompt']}”" + (f", seen as {seen}" if seen else "")
    large = quote(f"{name}/{row['file']}")
    image = tag(
        "img",
        src=uri,
        alt=alt,
        loading="lazy",
        class_=attributes[0].colour(row) if attributes else None,
    )
    badges = (a.badge(row, plain=i > 0) for i, a in enumerate(attributes))
    seed = row.get("seed")
    told = tag("p", f"{alt}; seed {seed}" if seed else alt, class_="told", aria_hidden="true")
    figure = tag(
        "figure",
        tag("button", image, type="button", popovertarget=large),
        tag("figcaption", badges, told),
        id=large,
        popover=True,
    )
    return tag("div", figure, class_="cell")


def _probability(row: Row, attribute: Attribute) -> str:
    try:
        return f" ({float(row.get(f'{attribute.name}_probability') or ''):.2f})"
    except ValueError:
        return ""
