"""The folder of a `respodiff generate` run."""

import json

import numpy as np
import pytest
from PIL import Image
from test_adapters import MAN, WOMAN
from test_sampling import PROMPTS, tiny_adapter

from respodiff_jax.errors import UserError
from respodiff_jax.generation.folder import generate
from respodiff_jax.generation.sampling import SamplerOptions
from respodiff_jax.generation.selection import concept_weights
from respodiff_jax.images import read_metadata


@pytest.fixture(scope="module")
def run(tiny_backbone, tmp_path_factory):
    """A fair run of 2 prompts x 6 images with base twins, on 8 devices: a full and a part batch."""
    out = tmp_path_factory.mktemp("run") / "deep" / "out"
    adapter = tiny_adapter(tiny_backbone)
    weights = concept_weights(adapter, 2, 6, fair="gender", ratio={WOMAN.name: 0.5, MAN.name: 0.5})
    options = SamplerOptions(num_steps=2, batch_size=8)
    generate(
        tiny_backbone,
        PROMPTS,
        out,
        num_images_per_prompt=6,
        seed=40,
        options=options,
        adapter=adapter,
        weights=weights,
        adapter_sources=["adapters/gender"],
        base_twins=True,
    )
    return out


def test_generate_writes_images_twins_grid_and_manifest(run, tiny_backbone):
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
        assert read_metadata(run / line["file"]) == line
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


def test_base_twins_are_the_base_models_images(run, tiny_backbone, tmp_path):
    options = SamplerOptions(num_steps=2, batch_size=8)
    generate(tiny_backbone, PROMPTS, tmp_path, num_images_per_prompt=6, seed=40, options=options)
    assert not (tmp_path / "base").exists()
    for i in range(12):
        twin, base, adapted = (
            np.asarray(Image.open(folder / f"{i:05d}.png"))
            for folder in (run / "base", tmp_path / "images", run / "images")
        )
        np.testing.assert_array_equal(twin, base)
        assert (adapted != base).any()


def test_output_folder_is_only_overwritten_on_request(tiny_backbone, tmp_path):
    kept, old = tmp_path / "notes.txt", tmp_path / "images" / "00007.png"
    old.parent.mkdir()
    kept.write_text("mine")
    old.write_text("old")
    options = SamplerOptions(num_steps=1)
    with pytest.raises(UserError, match=r"is not empty; .* `overwrite`"):
        generate(tiny_backbone, ["a person"], tmp_path, options=options)
    assert old.exists()
    generate(tiny_backbone, ["a person"], tmp_path, options=options, overwrite=True)
    assert kept.read_text() == "mine" and not old.exists()
    assert [path.name for path in (tmp_path / "images").iterdir()] == ["00000.png"]
    with pytest.raises(UserError, match=r"gs://b/run is on Google .* on this machine"):
        generate(tiny_backbone, ["a person"], "gs://b/run", options=options)
    with pytest.raises(UserError, match="cannot be made or read"):
        generate(tiny_backbone, ["a person"], kept, options=options)
