"""The training step at the sizes of the published models."""

import contextlib
import dataclasses
import math
import pathlib
import re
import resource
import threading
from functools import partial

import jax
import jax.extend
import jax.numpy as jnp
import pytest

from respodiff_jax.backbone import Conditioning, random_backbone
from respodiff_jax.backbone.memory import estimate_bytes
from respodiff_jax.bench.train import evaluations_per_sample
from respodiff_jax.method.concepts import Concept
from respodiff_jax.method.embedding import EmbeddedConcepts, embed_concepts
from respodiff_jax.method.state import init_state
from respodiff_jax.method.train_step import train_step
from respodiff_jax.training.config import default
from respodiff_jax.training.spec import step_spec

WOMAN = Concept("a woman", "gender", ("a person",), target_prompt="a woman")


def abstract_step(backbone, num_concepts, batch_size, prompts, **changes):
    """The specification of a step and the shapes of its arguments.

    `prompts(*leading_axes)` gives the shapes of a conditioning.
    """
    config = default()
    config.update_from_flattened_dict(changes)
    spec = step_spec(config, backbone, backbone.default_resolution)

    def shape(*axes, dtype=jnp.float32):
        return jax.ShapeDtypeStruct((num_concepts, *axes), dtype)

    arrays = EmbeddedConcepts(
        neutral=prompts(num_concepts, 1),
        num_neutral=shape(dtype=jnp.int32),
        own=prompts(num_concepts, 1),
        empty=prompts(num_concepts),
        is_safety=shape(dtype=jnp.bool_),
        has_counterparts=shape(dtype=jnp.bool_),
        guidance_scale=shape(1),
        lambda_sem=shape(),
        lr_ram=shape(),
        lr_sam=shape(),
        stream=shape(dtype=jnp.uint32),
    )
    state = jax.eval_shape(partial(init_state, spec, seed=0, batch_size=batch_size), arrays)
    ids = jax.ShapeDtypeStruct((batch_size,), jnp.int32)
    return spec, (state, backbone.params, arrays, ids)


def sd14_prompts(*axes):
    return Conditioning(jax.ShapeDtypeStruct((*axes, 77, 768), jnp.bfloat16), None, None)


@pytest.mark.slow
def test_step_of_sdxl_traces_at_1024_pixels():
    backbone = random_backbone("sdxl", dtype="bfloat16", abstract=True)

    def prompts(*axes):
        return Conditioning(
            jax.ShapeDtypeStruct((*axes, 77, 2048), jnp.bfloat16),
            jax.ShapeDtypeStruct((*axes, 1280), jnp.bfloat16),
            jax.ShapeDtypeStruct((*axes, 6), jnp.float32),
        )

    spec, args = abstract_step(backbone, 3, 2, prompts)
    new_state, metrics = jax.eval_shape(partial(train_step, spec), *args)
    assert new_state.concepts.ram["constant"].shape == (3, 32, 32, 1280)
    assert metrics.loss_resp.shape == (3,)
    assert jax.tree.structure(new_state) == jax.tree.structure(args[0])


@pytest.mark.slow
def test_streaming_sample_of_sd14_takes_six_unet_evaluations(capsys):
    """Relative to one plain forward pass of the UNet. The published procedure takes 59."""
    backbone = random_backbone("sd14", dtype="bfloat16", abstract=True)

    batch = 2
    spec, args = abstract_step(backbone, 1, batch, sd14_prompts)
    evaluations = evaluations_per_sample(spec, *args[:3], batch)
    with capsys.disabled():
        print(f"\n{evaluations:.2f} UNet evaluations per training sample")
    assert evaluations == pytest.approx(5.82, abs=0.02)


def equations(jaxpr, scope=""):
    """All equations of a program with their layers, except those inside kernels."""
    for equation in jaxpr.eqns:
        layers = f"{scope}/{equation.source_info.name_stack}"
        yield layers, equation
        if equation.primitive.name != "pallas_call":
            for inner in jax.extend.core.jaxprs_in_params(equation.params):
                yield from equations(inner, layers)


@pytest.mark.slow
def test_large_transposes_are_of_heads_and_large_casts_of_attention_and_norms():
    """In the step of SD 1.4 as written, with the attention of a TPU.

    Attention moves heads before positions. Its kernels, and the gradient of a product, lay the
    positions along the lanes. Norms and attention's softmax and scale are float32. The modules and
    latents are float32 too, but small.
    """
    backbone = random_backbone("sd14", dtype="bfloat16", abstract=True)
    backbone = dataclasses.replace(backbone, attention="flash")
    spec, args = abstract_step(backbone, 1, 4, sd14_prompts)
    program = jax.make_jaxpr(partial(train_step, spec))(*args)
    # The size of the mid-block's output in the step's three predictions of four pictures.
    mid_blocks = 3 * 4 * math.prod(args[0].concepts.ram["constant"].shape)

    def large(primitive):
        for layers, equation in equations(program.jaxpr):
            if equation.primitive.name == primitive and equation.outvars[0].aval.size > mid_blocks:
                yield re.findall("attn|norm|$", layers)[0], equation

    transposed = {(layer, equation.params["permutation"]) for layer, equation in large("transpose")}
    # Axes: concept, picture, heads, positions, features. Kernels join pictures and heads.
    swapped = ((0, 1, 3, 2, 4), (0, 1, 2, 4, 3), (0, 1, 3, 2))
    assert transposed == {("attn", permutation) for permutation in swapped}
    cast = {
        layer
        for layer, equation in large("convert_element_type")
        if jnp.issubdtype(equation.invars[0].aval.dtype, jnp.inexact)
    }
    assert cast == {"attn", "norm"}


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_step_of_two_concepts_at_512_pixels_needs_less_than_14_gib(dtype, capsys):
    """The step of configs/sd14_gender.py, as compiled for this machine's CPU; nothing is run."""
    backbone = random_backbone("sd14", dtype=dtype, abstract=True)
    backbone = dataclasses.replace(backbone, attention="chunked")

    def prompts(*axes):
        shape = jax.ShapeDtypeStruct((*axes, 77, 768), backbone.dtype)
        return Conditioning(shape, None, None)

    spec, (state, params, *rest) = abstract_step(backbone, 2, 1, prompts)
    args = state, {"unet": params["unet"]}, *rest
    step = partial(train_step, spec)
    estimate = estimate_bytes(step, *args) / 2**30
    compiled = jax.jit(step, donate_argnums=0).lower(*args).compile().memory_analysis()
    weights, temporary = (
        size / 2**30 for size in (compiled.argument_size_in_bytes, compiled.temp_size_in_bytes)
    )
    with capsys.disabled():
        print(f"\n{dtype}: arguments {weights:.1f} GiB, temporary {temporary:.1f} GiB", end="")
        print(f", estimated as {estimate:.1f} GiB")
    assert weights + temporary < 12  # text encoders, VAE and the program itself come on top
    assert 0.5 < estimate / temporary < 2


@contextlib.contextmanager
def peak_memory():
    """Samples the memory of this process; the yielded list holds the peak in GiB."""
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
def test_step_of_sd14_at_512_pixels_fits_a_24_gb_machine(capsys):
    """The UNet has 860 M parameters in bf16."""
    backbone = random_backbone("sd14", dtype="bfloat16")
    spec = step_spec(default(), backbone, 512)
    arrays = embed_concepts(backbone, [WOMAN], 512)
    frozen = {"unet": backbone.params["unet"]}
    state = init_state(spec, arrays, seed=0, batch_size=1)
    with peak_memory() as peak:
        state, metrics = jax.jit(partial(train_step, spec))(state, frozen, arrays, jnp.arange(1))
        jax.block_until_ready(state)
    with capsys.disabled():
        print(f"\npeak memory {peak[0]:.1f} GiB, L_resp {float(metrics.loss_resp[0]):.4f}")
    assert 0 < metrics.loss_resp[0] < 10
    assert jnp.abs(state.concepts.ram["constant"]).max() > 0
    assert peak[0] < 22
