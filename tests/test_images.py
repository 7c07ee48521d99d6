"""PNGs with metadata, and grids."""

import json

import numpy as np
import pytest
from PIL import Image

from respodiff_jax.errors import UserError
from respodiff_jax.images import grid, save_png


def picture(value, height=32, width=32):
    return np.full((height, width, 3), value, np.uint8)


def test_png_keeps_pixels_and_metadata(tmp_path):
    pixels = np.arange(4 * 5 * 3, dtype=np.uint8).reshape(4, 5, 3)
    metadata = {"prompt": "a café 🪦", "seed": 7, "concepts": {"a woman": 0.5}}
    save_png(pixels, tmp_path / "a.png", metadata)
    written = Image.open(tmp_path / "a.png")
    assert json.loads(written.info["parameters"]) == metadata
    np.testing.assert_array_equal(written, pixels)


def test_grid_puts_every_image_in_its_place():
    rows = [[picture(10 * i + j, 48, 32) for j in range(3)] for i in range(1, 5)]
    captions = [[f"seed {j}" for j in range(3)]] * 4
    labels = ["a very long prompt " * 20, "two", "", "four"]
    picture_grid = grid(rows, labels, captions, title="title", rows_per_group=2, tile=32)
    found = np.asarray(picture_grid)
    assert (found[0] == 255).all() and (found[-1] == 255).all()
    tops, lefts = [], []
    for i in range(1, 5):
        for j in range(3):
            ys, xs = np.nonzero((found == 10 * i + j).all(-1))
            assert len(ys) == 48 * 32
            assert np.ptp(ys) == 47 and np.ptp(xs) == 31
            tops.append(int(ys.min()))
            lefts.append(int(xs.min()))
    steps = np.diff(np.reshape(tops, (4, 3))[:, 0])
    assert steps[0] == steps[2] < steps[1]
    assert np.diff(lefts[:3]).tolist() == [36, 36]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"rows": []}, r"\[\] images"),
        ({"rows": [[picture(0)], []]}, r"\[1, 0\] images"),
        ({"rows": [[picture(0)]], "row_labels": ["a", "b"]}, r"row_labels: .* expected \(1,\)"),
        ({"rows": [[picture(0)]], "captions": [["a", "b"]]}, r"captions: .* expected \(1, 1\)"),
    ],
)
def test_grid_refuses_unequal_rows_and_labels(arguments, message):
    with pytest.raises(UserError, match=message):
        grid(**arguments)
