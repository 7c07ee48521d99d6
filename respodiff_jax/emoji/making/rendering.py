"""Draws scenes, for the data set, the training and the tests."""

import functools

import numpy as np
from PIL import Image, ImageFilter

from respodiff_jax.emoji import vocabulary
from respodiff_jax.emoji.making import artwork

IMAGE_SIZE = 64
# Subjects whose women wear purple or pink in the artwork, and whose men wear teal.
_DRESSED_BY_GENDER = {"singer", "teacher", "juggler", *vocabulary.ACTIVITIES, *vocabulary.LOOKS}
# These colours: lowest hue, highest hue, saturation and value of plain cloth.
_GENDERED_COLOURS = ((0.68, 0.96, 0.9, 0.97), (0.44, 0.53, 1.0, 0.75))


def _hsv_to_rgb(hue, saturation, value):
    """RGB (..., 3) in 0 to 255, from a scalar hue and saturation and value (...), in 0 to 1."""
    k = (np.array([5.0, 3.0, 1.0]) + 6 * hue) % 6
    saturation, value = np.asarray(saturation)[..., None], np.asarray(value)[..., None]
    return 255 * value * (1 - saturation * np.clip(np.minimum(k, 4 - k), 0, 1))


@functools.cache
def _clothes(name):
    """The clothes of a person's sprite: mask, saturation and value relative to plain cloth."""
    picture = Image.fromarray(artwork.sprites()[name], "RGBA").convert("RGB").convert("HSV")
    hue, saturation, value = np.moveaxis(np.asarray(picture) / 255, -1, 0)
    mask = np.zeros(hue.shape, bool)
    for start, stop, plain_saturation, plain_value in _GENDERED_COLOURS:
        part = (hue > start) & (hue < stop) & (saturation > 0.4) & (value > 0.3)
        saturation = np.where(part, saturation / plain_saturation, saturation)
        value = np.where(part, value / plain_value, value)
        mask |= part
    return mask, saturation[mask], value[mask]


def _dye(name, rng):
    """A person's sprite, its clothes in a random colour that does not depend on the gender."""
    sprite = artwork.sprites()[name].copy()
    mask, saturation, value = _clothes(name)
    hue = rng.random()
    saturation = np.minimum(saturation * rng.uniform(0.4, 1.0), 1)
    value = np.minimum(value * rng.uniform(0.5, 1.0), 1)
    sprite[mask, :3] = np.rint(_hsv_to_rgb(hue, saturation, value))
    return sprite


def _background(rng):
    """(64, 64, 3) float: a plain colour, a vertical gradient, or a wall and a floor."""
    colours = [
        _hsv_to_rgb(rng.random(), rng.uniform(0.05, 0.5), rng.uniform(0.72, 1.0)) for _ in range(2)
    ]
    height = np.linspace(0, 1, IMAGE_SIZE)
    style = rng.integers(3)
    if style == 0:
        mix = np.zeros(IMAGE_SIZE)
    elif style == 1:
        mix = height
    else:
        mix = (height > rng.uniform(0.6, 0.85)).astype(np.float64)
    rows = colours[0] + mix[:, None] * (colours[1] - colours[0])
    return np.repeat(rows[:, None], IMAGE_SIZE, axis=1)


def _paste(canvas, sprite, size, centre, flip):
    """Pastes `sprite`, resized to `size` pixels, onto `canvas` in place; `centre` is (y, x)."""
    image = Image.fromarray(sprite, "RGBA").convert("RGBa")
    pixels = np.asarray(image.resize((size, size), Image.Resampling.BICUBIC), np.float64)
    if flip:
        pixels = pixels[:, ::-1]
    top, left = (int(np.clip(round(c - size / 2), -size + 1, IMAGE_SIZE - 1)) for c in centre)
    y0, y1 = max(top, 0), min(top + size, IMAGE_SIZE)
    x0, x1 = max(left, 0), min(left + size, IMAGE_SIZE)
    pixels = pixels[y0 - top : y1 - top, x0 - left : x1 - left]
    region = canvas[y0:y1, x0:x1]
    region *= 1 - pixels[..., 3:] / 255
    region += pixels[..., :3]


def render(scene, rng):
    """Draws a `world.Scene` on a random background with small random shifts, scales and flips.

    The scene and the state of `rng` determine the picture, (64, 64, 3) uint8.
    """
    sprites = artwork.sprites()
    canvas = _background(rng)
    size = int(rng.integers(48, 57) if scene.unsafe is None else rng.integers(46, 53))
    middle = IMAGE_SIZE / 2
    centre = np.array([IMAGE_SIZE - size / 2 - rng.integers(0, 5), middle + rng.integers(-3, 4)])
    side = 1 if rng.random() < 0.5 else -1
    if scene.unsafe is not None:
        centre[1] -= side * rng.integers(4, 8)
    sprite = sprites[scene.artwork]
    if scene.subject in _DRESSED_BY_GENDER:
        sprite = _dye(scene.artwork, rng)
    _paste(canvas, sprite, size, centre, flip=rng.random() < 0.5)
    if scene.unsafe is not None:
        size = int(rng.integers(25, 30))
        centre = np.array(
            [IMAGE_SIZE - size / 2 - rng.integers(0, 12), middle + side * (middle - size / 2 - 1)]
        )
        sprite = sprites[vocabulary.UNSAFE[scene.unsafe][0]]
        _paste(canvas, sprite, size, centre, flip=rng.random() < 0.5)
    return np.clip(np.rint(canvas), 0, 255).astype(np.uint8)


def smear(image, rng):
    """Blurs up to three patches of a picture, (64, 64, 3) uint8, as a generative model may."""
    smeared = Image.fromarray(image)
    for _ in range(rng.integers(4)):
        height, width = (int(size) for size in rng.integers(10, 29, 2))
        y, x = int(rng.integers(IMAGE_SIZE - height)), int(rng.integers(IMAGE_SIZE - width))
        blurred = smeared.filter(ImageFilter.GaussianBlur(rng.uniform(2, 6)))
        box = (x, y, x + width, y + height)
        soft = Image.new("L", smeared.size)
        soft.paste(255, box)
        smeared.paste(blurred, mask=soft.filter(ImageFilter.GaussianBlur(2)))
    return np.asarray(smeared)
