"""The training step at the published models' sizes."""

import contextlib
import pathlib
import resource
import threading
from functools import partial

import jax
import jax.numpy as jnp
import pytest

from respodiff_jax.backbone import Conditioning, random_backbone
from respodiff_jax.bench.train import evaluations_per_sample
from respodiff_jax.concepts import Concept
from respodiff_jax.config import default
from respodiff_jax.objective import ConceptArrays, concept_arrays
from respodiff_jax.train_step import Recipe, init_state, train_step

WOMAN = Concept("a woman", "gender", ("a person",), target_prompt="a woman")


def abstract_step(backbone, num_concepts, batch_size, prompts, **changes):
    """Recipe and the shapes of a step's arguments; `prompts(leading axes)` gives conditioning."""
    config = default()
    config.update_from_flattened_dict(changes)
    recipe = Recipe.from_config(config, backbone, backbone.default_resolution)

    def shape(*axes, dtype=jnp.float32):
        return jax.ShapeDtypeStruct((num_concepts, *axes), dtype)

    arrays = ConceptArrays(
        neutral=prompts(num_concepts, 1),
        num_neutral=shape(dtype=jnp.int32),
        own=prompts(num_concepts),
        empty=prompts(num_concepts),
        is_safety=shape(dtype=jnp.bool_),
        guidance_scale=shape(),
        lambda_sem=shape(),
        lr_ram=shape(),
        lr_sam=shape(),
        stream=shape(dtype=jnp.uint32),
    )
    state = jax.eval_shape(partial(init_state, recipe, seed=0, batch_size=batch_size), arrays)
    ids = jax.ShapeDtypeStruct((batch_size,), jnp.int32)
    return recipe, (state, backbone.params, arrays, ids)


def test_sdxl_at_1024_pixels_traces():
    backbone = random_backbone("sdxl", dtype="bfloat16", abstract=True)

    def prompts(*axes):
        return Conditioning(
            jax.ShapeDtypeStruct((*axes, 77, 2048), jnp.bfloat16),
            jax.ShapeDtypeStruct((*axes, 1280), jnp.bfloat16),
            jax.ShapeDtypeStruct((*axes, 6), jnp.float32),
        )

    recipe, args = abstract_step(backbone, 3, 2, prompts)
    new_state, metrics = jax.eval_shape(partial(train_step, recipe), *args)
    assert new_state.concepts.ram["constant"].shape == (3, 32, 32, 1280)
    assert metrics.loss_resp.shape == (3,)
    assert jax.tree.structure(new_state) == jax.tree.structure(args[0])


def test_streaming_takes_six_evaluations_of_sd14_per_sample(capsys):
    """Against one plain forward pass of the UNet; the published procedure takes 59."""
    backbone = random_backbone("sd14", dtype="bfloat16", abstract=True)

    def prompts(*axes):
        return Conditioning(jax.ShapeDtypeStruct((*axes, 77, 768), jnp.bfloat16), None, None)

    batch = 2
    recipe, args = abstract_step(backbone, 1, batch, prompts)
    evaluations = evaluations_per_sample(recipe, *args[:3], batch)
    with capsys.disabled():
        print(f"\n{evaluations:.2f} UNet evaluations per training sample")
    assert evaluations == pytest.approx(5.87, abs=0.02)


@contextlib.contextmanager
def peak_memory():
    """Samples this process's memory; the list yielded then holds its peak in GiB."""
    peak, done = [0.0], threading.Event()

    def sample():
        while not done.wait(0.1):
            pages = int(pathlib.Path("/proc/self/statm").read_text().split()[1])
            peak[0] = max(peak[0], pages * resource.getpagesize() / 2**30)

    thread = threading.Thread(target=sample)
    thread.start()
    try:
        yield peak
    finally:
        done.set()
        thread.join()


@pytest.mark.slow
def test_sd14_takes_a_step_at_512_pixels_on_a_24_gb_machine(capsys):
    """860 M parameters in bf16."""
    backbone = random_backbone("sd14", dtype="bfloat16")
    recipe = Recipe.from_config(default(), backbone, 512)
    arrays = concept_arrays(backbone, [WOMAN], 512)
    frozen = {"unet": backbone.params["unet"]}
    state = init_state(recipe, arrays, seed=0, batch_size=1)
    with peak_memory() as peak:
        state, metrics = jax.jit(partial(train_step, recipe))(state, frozen, arrays, jnp.arange(1))
        jax.block_until_ready(state)
    with capsys.disabled():
        print(f"\npeak memory {peak[0]:.1f} GiB, L_resp {float(metrics.loss_resp[0]):.4f}")
    assert 0 < metrics.loss_resp[0] < 10
    assert jnp.abs(state.concepts.ram["constant"]).max() > 0
    assert peak[0] < 22
