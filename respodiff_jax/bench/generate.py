"""`respodiff bench generate`: sampling with a config's model, compared with diffusers' pipeline."""

import dataclasses

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from respodiff_jax.bench import measure
from respodiff_jax.bench import model as model_lib
from respodiff_jax.bench.report import Report, Side
from respodiff_jax.errors import UserError
from respodiff_jax.generation.sampling import Sampler, SamplerOptions
from respodiff_jax.training.config import concepts_from
from respodiff_jax.training.spec import open_model


def bench_generate(config: ConfigDict, against_torch: bool, repeats: int) -> Report:
    """Measures sampling without an adapter, from prompts to host arrays.

    A call samples `train.batch_size` images of the first concept's neutral prompt, in
    `log.grid_steps` steps with `log.grid_guidance_scale`. The arguments are those of `benchmark`.

    Raises:
      UserError: for a mistake in the config or the model, or if PyTorch is missing.
    """
    if config.log.grid_guidance_scale <= 1:
        raise UserError(
            f"config.log.grid_guidance_scale is {config.log.grid_guidance_scale}, expected more"
            " than 1: without guidance diffusers skips the unconditional half"
        )
    torch_side = model_lib.torch_side(against_torch)
    environment = model_lib.environment(against_torch)
    options = SamplerOptions(
        num_steps=config.log.grid_steps,
        guidance_scale=config.log.grid_guidance_scale,
        resolution=config.model.resolution,
        batch_size=config.train.batch_size,
    )
    backbone = open_model(config)
    resolution = config.model.resolution or backbone.default_resolution
    neutral_prompt = concepts_from(config)[0].neutral_prompts[0]
    prompts, seeds = [neutral_prompt] * options.batch_size, range(options.batch_size)
    sampler: Sampler | None = None

    def program():
        nonlocal sampler
        sampler = None  # frees its copy of the parameters before the next is made
        sampler = Sampler(dataclasses.replace(backbone), options)  # a backbone without programs
        return lambda: sampler(sampler.prepare(prompts, seeds))

    def ours(calls):
        for _ in range(calls):
            jax.block_until_ready(sampler(sampler.prepare(prompts, seeds)))

    def compile_sampler():
        return sampler.program.lower(*sampler.arguments(sampler.prepare(prompts, seeds))).compile()

    costs = measure.program_costs(program, compile_sampler)
    sides = {"ours": ours}
    if torch_side:
        with model_lib.diffusers_folder(backbone) as folder:
            sample = torch_side.load_sampler(
                folder,
                config.model.dtype,
                torch_side.device_for(jax.default_backend()),
                num_inference_steps=options.num_steps,
                guidance_scale=options.guidance_scale,
                height=resolution,
                width=resolution,
            )

        def theirs(calls):
            for _ in range(calls):
                sample(prompts, seeds)

        sides["theirs"] = theirs
    best = measure.Peak(config.model.dtype)
    batches = measure.take_turns(sides | best.sides, repeats)
    peak = best.to_dict(batches)

    plain = model_lib.with_plain_attention(backbone)

    def side(name, batches, prompts_at_a_time, **others):
        flops = _flops_per_image(plain, resolution, options.num_steps, prompts_at_a_time)
        rate = batches * options.batch_size
        utilisation = rate.median * flops / peak["flops_per_second"]
        return Side(name, rate, flops=flops, utilisation=utilisation, **others)

    sides = [side("JAX", batches["ours"], 2, **costs)]
    if torch_side:
        used = torch_side.peak_memory()
        sides.append(side("PyTorch, diffusers", batches["theirs"], 1, peak_memory=used))
    workload = {
        "model": config.model.name,
        "resolution": resolution,
        "dtype": config.model.dtype,
        "batch size": options.batch_size,
        "DDIM steps": options.num_steps,
        "guidance": options.guidance_scale,
    }
    return Report("generate", "images", workload, environment, peak, tuple(sides))


def _flops_per_image(backbone, resolution, num_steps, prompts_at_a_time) -> float:
    """FLOPs of the UNet for the two prompts of each step, and of the VAE's decoder.

    `prompts_at_a_time` is 2 if the prompts share what does not depend on them, else 1.
    """
    latents = jax.ShapeDtypeStruct((1, *backbone.latent_shape(resolution)), jnp.float32)
    prompt = jax.tree.map(lambda x: x[0], backbone.encode_prompts([""], resolution))
    forward = model_lib.forward_flops(backbone, backbone.params, latents, prompt, prompts_at_a_time)
    decoding = measure.flops(backbone.decode_latents, backbone.params, latents)
    return num_steps * 2 / prompts_at_a_time * forward + decoding
