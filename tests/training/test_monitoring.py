"""Validation grids: the pictures of each concept, sampled by all devices."""

import dataclasses
from functools import partial

import jax
import numpy as np
import pytest
from test_adapters import make_adapter
from test_train_step import MAN, VIOLENCE, WOMAN

from respodiff_jax.adapters import select
from respodiff_jax.generation import sampling
from respodiff_jax.generation.sampling import (
    SamplerOptions,
    denoise,
    make_sampler,
    sample_images,
)
from respodiff_jax.images import grid
from respodiff_jax.training import config, parallel
from respodiff_jax.training import grids as grids_lib
from respodiff_jax.training.grids import ValidationGrids

CONCEPTS = [WOMAN, VIOLENCE, MAN, dataclasses.replace(VIOLENCE, name="anger")]
SEEDS, NUM_STEPS, GUIDANCE = (0, 1), 2, 3.0


class Log:
    """A log that records the names of grids."""

    def __init__(self):
        self.names = []

    def write_grid(self, step, name, image):
        self.names.append(name)


@pytest.mark.parametrize(
    "strategy, grid_prompts", [("pmap", ("a cook", "a pilot", "a judge")), ("mesh", ())]
)
def test_grids_equal_the_images_of_the_sampler(
    tiny_backbone, strategy, grid_prompts, tmp_path, monkeypatch
):
    """The adapter has some of the concepts, in another order."""
    own = dict(tiny_backbone.identity) | {"resolution": 16}
    adapter = make_adapter(shape=(4, 4, 64), concepts=(MAN, WOMAN), **own)
    placement = parallel.Placement(strategy, len(CONCEPTS), 8)
    shares = []

    def counted(backbone, modules, schedule, params, noise, *args):
        shares.append(len(noise))
        return denoise(backbone, modules, schedule, params, noise, *args)

    run_config = config.default()
    run_config.log.update(
        grid_images=len(SEEDS), grid_steps=NUM_STEPS, grid_guidance_scale=GUIDANCE
    )
    run_config.log.grid_prompts = grid_prompts
    grids = ValidationGrids(
        tmp_path,
        run_config,
        CONCEPTS,
        len(CONCEPTS),
        partial(tiny_backbone.encode_prompts, resolution=16),
        make_sampler(tiny_backbone, (adapter.module,), NUM_STEPS, placement.mesh),
        placement,
        tiny_backbone.latent_shape(16),
        16,
    )
    shown, captions = [], []

    def drawn(rows, **kwargs):
        shown.append(rows)
        captions.append(kwargs["captions"])
        return grid(rows, **kwargs)

    monkeypatch.setattr(grids_lib, "grid", drawn)
    monkeypatch.setattr(sampling, "denoise", counted)
    log = Log()
    frozen = placement.replicate(tiny_backbone.params)
    grids.write(7, frozen, adapter, log)
    assert log.names == ["a woman", "a man"]
    assert [p.name for p in sorted(tmp_path.glob("grids/*"))] == [
        "0000007_00_a_woman.png",
        "0000007_02_a_man.png",
    ]

    options = SamplerOptions(num_steps=NUM_STEPS, guidance_scale=GUIDANCE, resolution=16)
    grids.write(8, frozen, select(adapter, ["a woman"]), log)
    assert log.names == ["a woman", "a man", "a woman"]
    np.testing.assert_array_equal(shown.pop(), shown[0])
    # Traced once: each device samples three of at most 24 pictures.
    assert shares == [3]

    ram_only = dataclasses.replace(adapter, sam=jax.tree.map(np.zeros_like, adapter.sam))
    for concept, rows in zip((WOMAN, MAN), shown, strict=True):
        neutral = concept.neutral_prompts
        prompts = [(grid_prompts or neutral * 2)[column] for column in range(len(SEEDS))]
        assert captions.pop(0) == [prompts] * 3
        weights = np.tile(np.float32([concept is MAN, concept is WOMAN]), (len(SEEDS), 1))
        expected = [
            [pair.image for pair in sample_images(tiny_backbone, prompts, SEEDS, options, *args)]
            for args in ((), (adapter, weights), (ram_only, weights))
        ]
        assert len(np.unique(np.array(expected), axis=0)) == len(rows)
        np.testing.assert_allclose(rows, expected, atol=1)
