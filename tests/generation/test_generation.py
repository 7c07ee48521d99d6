"""`generate` and `generate_folder`: pictures as a list, and as a folder."""

import dataclasses
import errno
import json
import pathlib
import time

import jax
import numpy as np
import pytest
from PIL import Image
from test_adapters import MAN, WOMAN
from test_sampling import PROMPTS, tiny_adapter

from respodiff_jax.errors import UserError
from respodiff_jax.generation import folder, limits
from respodiff_jax.generation import generate as generate_lib
from respodiff_jax.generation.generate import generate, generate_folder

OF_RUN = {
    "fair": "gender",
    "ratio": {WOMAN.name: 0.5, MAN.name: 0.5},
    "images_per_prompt": 6,
    "seed": 40,
    "num_steps": 2,
    "batch_size": 8,
    "base": True,
    "adapter_sources": ["adapters/gender"],
}


@pytest.fixture(scope="module")
def run(tiny_backbone, tmp_path_factory):
    """A fair run of 2 prompts x 6 images with base twins: a full and a partial batch of 8."""
    out = tmp_path_factory.mktemp("run") / "deep" / "out"
    adapter = tiny_adapter(tiny_backbone)
    generate_folder(tiny_backbone, PROMPTS, out, adapter=adapter, **OF_RUN)
    return out


def test_generate_gives_the_same_images_as_generate_folder(run, tiny_backbone):
    images = generate(
        tiny_backbone,
        PROMPTS,
        adapter=[tiny_adapter(tiny_backbone)],
        fair="gender",
        images_per_prompt=6,
        seed=40,
        num_steps=2,
        batch_size=8,
    )
    assert len(images) == 12
    for i, image in enumerate(images):
        saved = Image.open(run / "images" / f"{i:05d}.png")
        np.testing.assert_array_equal(np.asarray(image), np.asarray(saved))


def test_mistakes_are_reported_before_the_model_is_opened(tiny_backbone):
    adapter = tiny_adapter(tiny_backbone)
    for mistake, message in (
        ({"fair": "race"}, "no group 'race'"),
        ({"safe": True, "images_per_prompt": 0}, "`images_per_prompt` is 0"),
        ({"safe": True, "seed": -1}, "`seed` is -1"),
    ):
        with pytest.raises(UserError, match=message):
            generate(pytest.fail, "a person", adapter=adapter, **mistake)
    with pytest.raises(UserError, match="`adapter` is 'adapters/gender', expected an adapter"):
        generate(pytest.fail, "a person", adapter="adapters/gender", safe=True)
    unread = dataclasses.replace(tiny_backbone, load=pytest.fail)
    with pytest.raises(UserError, match="number of sampling steps is 2000"):
        generate(unread, "a person", num_steps=2000)
    (image,) = generate(lambda: tiny_backbone, "a person", num_steps=1, seed=np.int64(3))
    assert image.size == (16, 16)


def test_folder_has_images_base_twins_grid_and_manifest(run, tiny_backbone):
    assert sorted(path.name for path in run.iterdir()) == [
        "base",
        "grid.png",
        "images",
        "manifest.jsonl",
    ]
    names = [f"{i:05d}.png" for i in range(12)]
    assert sorted(path.name for path in (run / "images").iterdir()) == names
    assert sorted(path.name for path in (run / "base").iterdir()) == names
    lines = [json.loads(line) for line in (run / "manifest.jsonl").read_text().splitlines()]
    assert len(lines) == 24
    for line in lines:
        with Image.open(run / line["file"]) as picture:
            assert json.loads(picture.info["parameters"]) == line
        assert line["model"] == tiny_backbone.identity
        assert (line["num_steps"], line["guidance_scale"], line["resolution"]) == (2, 7.5, 16)
        assert line["adapter"] == ["adapters/gender"]
    adapted = [line for line in lines if line["file"].startswith("images/")]
    assert [line["seed"] for line in adapted] == list(range(40, 52))
    assert [line["prompt"] for line in adapted] == [PROMPTS[0]] * 6 + [PROMPTS[1]] * 6
    for start in (0, 6):
        concepts = [next(iter(line["concepts"].items())) for line in adapted[start : start + 6]]
        assert sorted(concepts) == [("a man", 1.0)] * 3 + [("a woman", 1.0)] * 3
    assert all(line["concepts"] == {} for line in lines if line["file"].startswith("base/"))
    with Image.open(run / "grid.png") as grid:
        assert grid.size == (12 + 140 + 6 * 132 - 4 + 12, grid.size[1])


def test_base_twins_equal_images_of_the_base_model(run, tiny_backbone, tmp_path):
    options = {"images_per_prompt": 6, "seed": 40, "num_steps": 2, "batch_size": 8}
    generate_folder(tiny_backbone, PROMPTS, tmp_path, **options)
    assert not (tmp_path / "base").exists()
    for i in range(12):
        twin, base, adapted = (
            np.asarray(Image.open(folder / f"{i:05d}.png"))
            for folder in (run / "base", tmp_path / "images", run / "images")
        )
        np.testing.assert_array_equal(twin, base)
        assert (adapted != base).any()


def test_output_folder_is_overwritten_only_on_request(tiny_backbone, tmp_path):
    kept, old = tmp_path / "notes.txt", tmp_path / "images" / "00007.png"
    old.parent.mkdir()
    kept.write_text("mine")
    old.write_text("old")
    with pytest.raises(UserError, match=r"is not empty, .* `overwrite`"):
        generate_folder(tiny_backbone, ["a person"], tmp_path, num_steps=1)
    assert old.exists()
    generate_folder(tiny_backbone, ["a person"], tmp_path, num_steps=1, overwrite=True)
    assert kept.read_text() == "mine" and not old.exists()
    assert [path.name for path in (tmp_path / "images").iterdir()] == ["00000.png"]
    with pytest.raises(UserError, match=r"gs://b/run is on Google .* on this machine"):
        generate_folder(tiny_backbone, ["a person"], "gs://b/run", num_steps=1)
    with pytest.raises(UserError, match=r"cannot be made: .*notes\.txt is a file"):
        generate_folder(tiny_backbone, ["a person"], kept / "out", num_steps=1)


def contents(folder):
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


FULL = OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("at", [1, 2, 7, 24, 26])
def test_interrupted_folder_is_continued_and_equals_a_whole_one(
    run, tiny_backbone, tmp_path, monkeypatch, at
):
    """The disk is full at a file: the manifest, one of 24 images, the grid."""
    out, drawn = tmp_path / "out", []
    arguments = OF_RUN | {"adapter": tiny_adapter(tiny_backbone)}
    with monkeypatch.context() as patch:
        replace = pathlib.Path.replace

        def fail(path, target):
            drawn.append(target)
            if len(drawn) == at:
                raise FULL
            return replace(path, target)

        patch.setattr(pathlib.Path, "replace", fail)
        with pytest.raises(OSError, match="No space left"):
            generate_folder(tiny_backbone, PROMPTS, out, **arguments)
    for path in out.rglob("*.png"):
        Image.open(path).load()  # whole
    sample, asked = folder.sample_images, []

    def counted(*args, only, **options):
        asked.append(len(only))
        return sample(*args, only=only, **options)

    monkeypatch.setattr(folder, "sample_images", counted)
    rate = generate_folder(tiny_backbone, PROMPTS, out, **arguments)
    pairs = max(at - 2, 0) // 2  # what was whole before
    assert asked == ([12 - pairs] if pairs < 12 else [])
    assert (rate is None) == (not asked)
    assert contents(out) == contents(run)


@pytest.mark.filterwarnings("ignore:no image is steered towards a man")
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seed": 41}, "another command, which differs in seed;"),
        ({"images_per_prompt": 5}, "differs in number of images"),
        ({"num_steps": 3, "negative_prompt": "x"}, "differs in negative_prompt, num_steps;"),
        ({"base": False}, "differs in number of images"),
        ({"ratio": {WOMAN.name: 1.0}}, "differs in concepts;"),
        ({"adapter_sources": ["b"]}, "differs in adapter;"),
        ({"adapter": "other"}, "differs in adapter_sha256;"),
    ],
)
def test_folder_of_another_command_is_refused_and_kept(run, tiny_backbone, changes, message):
    before = contents(run)
    arguments = OF_RUN | {"adapter": tiny_adapter(tiny_backbone)} | changes
    if arguments["adapter"] == "other":
        adapter = tiny_adapter(tiny_backbone)
        ram = jax.tree.map(lambda x: 2 * x, adapter.ram)
        arguments["adapter"] = dataclasses.replace(adapter, ram=ram)
    # All but the concepts are known before the weights are read.
    unread = dataclasses.replace(tiny_backbone, load=pytest.fail)
    model = tiny_backbone if "ratio" in changes else unread
    with pytest.raises(UserError, match=message):
        generate_folder(model, PROMPTS, run, **arguments)
    assert contents(run) == before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, r"towards a (wo)?man: of 1 image\(s\), the shares of gender leave none for it"),
        (
            {"images_per_prompt": 2, "ratio": {WOMAN.name: 1.0}},
            r"towards a man: of 2 image\(s\), the shares of gender",
        ),
    ],
)
def test_concept_without_an_image_is_noted(tiny_backbone, options, message):
    adapter = tiny_adapter(tiny_backbone)
    with pytest.warns(UserWarning, match=message):
        generate(tiny_backbone, "a person", adapter=adapter, fair="gender", num_steps=1, **options)


def test_concepts_steer_up_to_their_max_timestep_unless_steering_is_unconditional(tiny_backbone):
    adapter = tiny_adapter(tiny_backbone)

    def picture(max_timestep, **options):
        concepts = [dataclasses.replace(c, max_timestep=max_timestep) for c in adapter.concepts]
        limited = dataclasses.replace(adapter, concepts=tuple(concepts))
        options |= {"concepts": {WOMAN.name: 1.0}, "num_steps": 4}
        return np.asarray(generate(tiny_backbone, "a person", adapter=limited, **options)[0])

    whole, part, none = map(picture, (None, 501, 0))  # the steps' timesteps are 751, 501, 251, 1
    [base] = generate(tiny_backbone, "a person", num_steps=4)
    assert np.abs(none.astype(int) - np.asarray(base)).max() <= 1  # is from another program
    assert min(np.abs(part.astype(int) - other).max() for other in (whole, none)) > 1
    for max_timestep in (None, 0):
        np.testing.assert_array_equal(picture(max_timestep, steer_always=True), whole)


@pytest.mark.parametrize(
    "wrong",
    [
        {"num_steps": 5000},
        {"resolution": 17},
        {"fair": "race"},
        {"images_per_prompt": 10**8},
        {"batch_size": 8 * 10**10},
    ],
)
def test_refused_call_leaves_no_folder(tiny_backbone, tmp_path, wrong):
    unread = dataclasses.replace(tiny_backbone, load=pytest.fail)
    adapter = tiny_adapter(tiny_backbone)
    start = time.monotonic()
    with pytest.raises(UserError):
        generate_folder(
            unread, PROMPTS, tmp_path / "a" / "b", adapter=adapter, **{"fair": "gender"} | wrong
        )
    assert not list(tmp_path.iterdir())
    assert time.monotonic() - start < 20


def test_what_no_machine_can_serve_is_refused_with_an_estimate(tiny_backbone, monkeypatch):
    unread = dataclasses.replace(tiny_backbone, load=pytest.fail)
    monkeypatch.setattr(limits, "host_memory", lambda: 2**30)
    monkeypatch.setattr(generate_lib, "host_memory", lambda: 2**30)
    with pytest.raises(UserError, match=r"^200,000,000 images in one call, expected at most 1"):
        generate(unread, PROMPTS, images_per_prompt=10**8)
    # 16 x 16 pixels of three float32: 3 KiB an image.
    with pytest.raises(UserError, match=r"`batch_size` 800000 needs 2 GiB of .* there are 1 GiB"):
        generate(unread, PROMPTS, batch_size=800_000)
    monkeypatch.setattr(generate_lib, "host_memory", lambda: 2**20)
    with pytest.raises(UserError, match=r"^a list of 20,000 images needs 0 GiB of memory at"):
        generate(unread, PROMPTS, images_per_prompt=10_000)
