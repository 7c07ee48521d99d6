"""Pictures on disk: PNGs that record how they were made, and labelled grids."""

import io
import itertools
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo

from respodiff_jax.errors import UserError
from respodiff_jax.storage import PathLike, write_whole

METADATA_KEY = "parameters"

_BACKGROUND, _INK, _FAINT_INK = (255, 255, 255), (32, 33, 36), (112, 117, 122)


def to_png(picture: Image.Image, metadata: Mapping[str, Any] | None = None) -> bytes:
    """The content of a PNG file, with JSON-able metadata in a text chunk named `parameters`."""
    content, info = io.BytesIO(), PngInfo()
    if metadata is not None:
        info.add_text(METADATA_KEY, json.dumps(metadata))
    picture.save(content, format="PNG", pnginfo=info)
    return content.getvalue()


def save_png(image: np.ndarray, path: PathLike, metadata: Mapping[str, Any] | None = None) -> None:
    """Writes an image, uint8 `(height, width, 3)`, as `to_png`, whole or not at all."""
    write_whole(pathlib.Path(path), to_png(Image.fromarray(image), metadata))


def grid(
    rows: Sequence[Sequence[np.ndarray]],
    row_labels: Sequence[str] | None = None,
    captions: Sequence[Sequence[str]] | None = None,
    *,
    title: str | None = None,
    rows_per_group: int | None = None,
    tile: int | None = None,
) -> Image.Image:
    """Arranges images in labelled rows on white, an RGB picture.

    Args:
      rows: images, uint8 `(height, width, 3)` or PIL images, row by row; one array works too.
      row_labels: one text for each row, wrapped, to its left.
      captions: one short text for each image, below it, nested like `rows`.
      title: a line above the grid.
      rows_per_group: number of rows in a group, by default all; a wider gap separates groups.
      tile: width of each image in the grid, in pixels; None takes the images' own width, within
        128 .. 256.

    Raises:
      UserError: if the numbers of images, labels or captions do not match.
    """
    columns = len(rows[0]) if len(rows) else 0
    if not columns or any(len(row) != columns for row in rows):
        raise UserError(f"grid rows have {[len(row) for row in rows]} images, expected equal rows")
    for what, found, expected in (
        ("row_labels", row_labels, [len(rows)]),
        ("captions", captions, [len(rows), columns]),
    ):
        if found is not None and list(np.shape(found)) != expected:
            raise UserError(f"grid {what}: shape {np.shape(found)}, expected {tuple(expected)}")

    height, width = np.shape(rows[0][0])[:2]
    tile_w = tile or min(max(width, 128), 256)
    tile_h = round(tile_w * height / width)
    text_size = min(max(tile_w // 12, 12), 20)
    font = ImageFont.load_default(text_size)
    small = ImageFont.load_default(max(text_size * 3 // 4, 10))
    gap, group_gap, margin = 4, 16, 12
    line = round(text_size * 1.3)
    caption_h = 0 if captions is None else round(line * 0.95)

    left = margin + (tile_w + margin if row_labels is not None else 0)
    top = margin + (line + gap if title is not None else 0)
    lefts = [left + column * (tile_w + gap) for column in range(columns)]
    row_h, extra_gap = tile_h + caption_h + gap, group_gap - gap
    group = rows_per_group or len(rows)
    tops = [top + i * row_h + i // group * extra_gap for i in range(len(rows))]
    size = (lefts[-1] + tile_w + margin, tops[-1] + tile_h + caption_h + margin)
    canvas = Image.new("RGB", size, _BACKGROUND)
    draw = ImageDraw.Draw(canvas)

    if title is not None:
        draw.text((margin, margin), _wrap(title, font, size[0] - 2 * margin, 1)[0], _INK, font)
    for y, label in zip(tops, row_labels or (), strict=False):
        lines = _wrap(label, font, tile_w, max(tile_h // line, 1))
        for i, text in enumerate(lines):
            draw.text((margin, y + (tile_h - line * len(lines)) / 2 + i * line), text, _INK, font)
    scaling = Image.Resampling.LANCZOS if tile_w <= width else Image.Resampling.NEAREST
    for i, j in itertools.product(range(len(rows)), range(columns)):
        picture = Image.fromarray(np.asarray(rows[i][j])).resize((tile_w, tile_h), scaling)
        canvas.paste(picture, (lefts[j], tops[i]))
        if captions is not None and captions[i][j]:
            text = _wrap(captions[i][j], small, tile_w, 1)[0]
            center = lefts[j] + tile_w / 2
            draw.text((center, tops[i] + tile_h + 2), text, _FAINT_INK, small, anchor="ma")
    return canvas


def _wrap(text: str, font: Any, width: int, max_lines: int) -> list[str]:
    """`text` in at most `max_lines` lines of at most `width` pixels; cut text ends in "…"."""
    lines = []
    for paragraph in text.split("\n"):
        current = ""
        for word in paragraph.split():
            longer = f"{current} {word}".strip()
            if current and font.getlength(longer) > width:
                lines.append(current)
                current = word
            else:
                current = longer
        lines.append(current)
    cut = len(lines) > max_lines
    lines = lines[:max_lines]
    for i, content in enumerate(lines):
        ellipsis = "…" if cut and i == len(lines) - 1 else ""
        while content and font.getlength(content + ellipsis) > width:
            content, ellipsis = content[:-1], "…"
        lines[i] = content + ellipsis
    return lines
