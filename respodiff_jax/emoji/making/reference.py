"""Draws pictures of the artwork for the suite's captions, to compare a model's pictures with.

python -m respodiff_jax.emoji.making.reference --out DIR
respodiff evaluate quality --model emoji-world --reference DIR/all --out EVALUATION

`DIR/all` shows the biased world. In `DIR/gender` and `DIR/skin_tone` that attribute is even, and
`DIR/safe` has no unsafe objects.
"""

import argparse
import csv
import pathlib

import numpy as np

from respodiff_jax.emoji.making import rendering, suite, world
from respodiff_jax.images import save_png

_SEED = 20_000_000
# folder -> the world's table, and what captions say of unsafe objects
FOLDERS = {
    "all": (world.BIAS, None),
    "gender": (world.even("woman"), None),
    "skin_tone": (world.even("tones"), None),
    "safe": (world.BIAS, frozenset()),
}


def draw_reference(folder, repeats):
    """Draws `repeats` pictures of each caption's subject into each of `FOLDERS`."""
    kinds = ("profession", "activity", "look")
    subjects = [(kind, word) for kind in kinds for word in world.subjects(kind)]
    subjects += [("thing", word) for word in suite.captioned_things()]
    for name, (table, unsafe) in FOLDERS.items():
        (folder / name).mkdir(parents=True, exist_ok=True)
        rows = [("file", "prompt")]
        captioned = zip(subjects, suite.suite()["captions"], strict=True)
        for number, ((kind, word), caption) in enumerate(captioned):
            claims = world.Claims(kind, word, unsafe=unsafe)
            for repeat in range(repeats):
                rng = np.random.default_rng([_SEED, number, repeat])
                scene = world.draw_scene(rng, claims, table)
                file_name = f"{number:03d}_{repeat}.png"
                save_png(rendering.render(scene, rng), folder / name / file_name)
                rows.append((file_name, caption))
        with (folder / name / "metadata.csv").open("w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows(rows)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", required=True, type=pathlib.Path)
    parser.add_argument("--repeats", type=int, default=4, help="pictures of each caption")
    args = parser.parse_args()
    draw_reference(args.out, args.repeats)


if __name__ == "__main__":
    main()
