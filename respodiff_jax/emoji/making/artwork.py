"""Noto Emoji artwork: packs the emoji of Emoji World into one file, and reads that file.

    npm pack emoji-datasource-google@16.0.0
    python -m respodiff_jax.emoji.making.artwork emoji-datasource-google-16.0.0.tgz

writes `assets/artwork.webp` (a lossless sheet of 64x64 RGBA sprites) and `assets/artwork.json`
(the sprites' names, in the order of the sheet). A person's sprite is named `<artwork>/<tone 0..4>`,
any other sprite `<artwork>`. The artwork is Noto Emoji, Copyright Google, Apache License 2.0
(`assets/NOTICE`).
"""

import argparse
import functools
import io
import json
import pathlib
import tarfile

import numpy as np
from PIL import Image

from respodiff_jax.emoji import vocabulary
from respodiff_jax.errors import UserError

SPRITE_SIZE = 64
ASSETS = pathlib.Path(__file__).parent / "assets"
_COLUMNS = 32
# Unicode's skin-tone modifiers, in the order of `vocabulary.TONES`.
_TONE_MODIFIERS = ("1F3FB", "1F3FC", "1F3FD", "1F3FE", "1F3FF")


def sprite_files(table):
    """Maps the name of every sprite that Emoji World needs to its file, by a parsed `emoji.json`.

    Raises:
      UserError: if the table lacks an emoji, as that of another version may.
    """
    emoji = {entry["short_name"]: entry for entry in table}
    kinds = (vocabulary.PROFESSIONS, vocabulary.ACTIVITIES, vocabulary.LOOKS)
    people = [name for kind in kinds for pair in kind.values() for name in pair]
    others = [*vocabulary.THINGS.values(), *(name for name, _ in vocabulary.UNSAFE.values())]
    missing = [name for name in [*people, *others] if name not in emoji]
    if missing:
        raise UserError(f"emoji.json lacks {missing}; expected emoji-datasource-google 16.0.0")
    files = {}
    for name in people:
        for tone, modifier in enumerate(_TONE_MODIFIERS):
            files[f"{name}/{tone}"] = emoji[name]["skin_variations"][modifier]["image"]
    for name in others:
        files[name] = emoji[name]["image"]
    return files


def pack(tarball, folder=ASSETS):
    """Writes `artwork.webp` and `artwork.json` into `folder`, from the npm package `tarball`."""
    with tarfile.open(tarball) as package:
        table = json.load(package.extractfile("package/emoji.json"))
        files = sprite_files(table)
        wanted = {f"package/img/google/64/{file}" for file in files.values()}
        images = {}
        for member in package:
            if member.name in wanted:
                data = package.extractfile(member).read()
                images[member.name.rsplit("/", 1)[1]] = Image.open(io.BytesIO(data)).convert("RGBA")
    rows = -(-len(files) // _COLUMNS)
    sheet = Image.new("RGBA", (_COLUMNS * SPRITE_SIZE, rows * SPRITE_SIZE))
    for index, file in enumerate(files.values()):
        row, column = divmod(index, _COLUMNS)
        sheet.paste(images[file], (column * SPRITE_SIZE, row * SPRITE_SIZE))
    folder = pathlib.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    sheet.save(folder / "artwork.webp", lossless=True, quality=100, method=6)
    (folder / "artwork.json").write_text(json.dumps(list(files), indent=0) + "\n")


@functools.cache
def sprites():
    """Maps each sprite's name to its pixels: (64, 64, 4) uint8, RGBA, not premultiplied."""
    names = json.loads((ASSETS / "artwork.json").read_text())
    sheet = np.asarray(Image.open(ASSETS / "artwork.webp").convert("RGBA"))
    rows, columns = sheet.shape[0] // SPRITE_SIZE, sheet.shape[1] // SPRITE_SIZE
    tiles = sheet.reshape(rows, SPRITE_SIZE, columns, SPRITE_SIZE, 4).swapaxes(1, 2)
    tiles = tiles.reshape(-1, SPRITE_SIZE, SPRITE_SIZE, 4)
    return dict(zip(names, tiles, strict=False))


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("tarball", help="from `npm pack emoji-datasource-google@16.0.0`")
    pack(parser.parse_args().tarball)


if __name__ == "__main__":
    main()
