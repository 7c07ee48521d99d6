"""Sampling with adapters and classifier-free guidance, steered at the mid-block.

Convention: `RAM + SAM` is added to the *conditional* half of the guidance batch only, at every
step (paper, section 4.4); the unconditional half is the base model's. An image depends only on its
own prompt, seed and concepts, not on its batch. An adapted image and its base twin start from the
same noise.
"""

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, ArrayLike, Bool, Float, Int, Real, UInt8

from respodiff_jax.adapters import Adapter, CombinedAdapter, select, steerings
from respodiff_jax.backbone import Backbone, Conditioning, equal_batches
from respodiff_jax.backbone.memory import estimate_bytes
from respodiff_jax.errors import UserError, check_choice, check_least
from respodiff_jax.generation.limits import check_memory
from respodiff_jax.method.diffusion import (
    Latent,
    ddim_step,
    dpm_solver_step,
    guided_output,
    predict_z_0,
)
from respodiff_jax.method.modules import MidBlockModule, Steering, steer
from respodiff_jax.method.schedule import SAMPLERS, Schedule

Images = UInt8[Array, "B height width 3"]
Encode = Callable[[Sequence[str]], Conditioning]


@dataclasses.dataclass(frozen=True)
class SamplerOptions:
    """How images are sampled.

    Attributes:
      num_steps: sampling steps, 1 or more.
      guidance_scale: scale of classifier-free guidance; 1 or below means no guidance, as in
        diffusers.
      negative_prompt: prompt of the unconditional half.
      resolution: size of the square images in pixels; None is the model's own.
      batch_size: images at a time, a multiple of the devices; None chooses by resolution.
      sampler: one of `schedule.SAMPLERS`.

    Raises:
      UserError: for an unknown sampler, a number below 1, or a guidance scale that is not finite.
    """

    num_steps: int = 50
    guidance_scale: float = 7.5
    negative_prompt: str = ""
    resolution: int | None = None
    batch_size: int | None = None
    sampler: str = "ddim"

    def __post_init__(self):
        check_choice("`sampler`", self.sampler, SAMPLERS)
        for field in ("num_steps", "resolution", "batch_size"):
            if getattr(self, field) is not None:
                object.__setattr__(self, field, int(getattr(self, field)))
        object.__setattr__(self, "guidance_scale", float(self.guidance_scale))
        check_least("number of sampling steps", self.num_steps)
        if not math.isfinite(self.guidance_scale):
            raise UserError(f"guidance scale is {self.guidance_scale}, expected a finite number")
        if self.resolution is not None and self.resolution < 1:
            raise UserError(
                f"resolution is {self.resolution}, expected a positive number of pixels"
            )
        devices = jax.local_device_count()
        if self.batch_size is not None and (self.batch_size < 1 or self.batch_size % devices):
            raise UserError(
                f"batch size is {self.batch_size}, expected a multiple of the {devices} devices"
                f" that share it, for example {devices * max(round(self.batch_size / devices), 1)}"
            )


def check_size(options: SamplerOptions, backbone: Backbone) -> None:
    """Checks that a model can draw at the options' resolution, and that a batch fits into memory.

    Raises:
      UserError: if either fails.
    """
    backbone.latent_shape(options.resolution)
    if options.batch_size is not None:
        image = 4 * 3 * options.resolution**2
        check_memory(f"`batch_size` {options.batch_size}", image * options.batch_size)


def initial_noise(seeds: Sequence[int], latent_shape: tuple[int, int, int]) -> Latent:
    """Pure noise; sample `b` depends only on `seeds[b]`.

    Raises:
      UserError: if a seed is outside 0 .. 2^32-1.
    """
    if min(seeds) < 0 or max(seeds) >= 2**32:
        raise UserError(f"seeds are {min(seeds)} .. {max(seeds)}, expected within 0 .. {2**32 - 1}")
    keys = jax.vmap(jax.random.key)(np.asarray(seeds, np.uint32))
    return jax.vmap(lambda key: jax.random.normal(key, latent_shape))(keys)


def denoise(
    backbone: Backbone,
    modules: Sequence[MidBlockModule],
    schedule: Schedule,
    params: Mapping[str, Any],
    noise: Latent,
    cond: Conditioning,
    uncond: Conditioning,
    steerings: Sequence[Steering],
    guidance_scale: Float[ArrayLike, ""],
) -> Latent:
    """Runs the whole sampling loop, `z_T -> z_0`.

    Each step evaluates the UNet once, with 2B samples.

    Args:
      backbone: the model's functions; its own `params` are not used.
      modules: architectures of RAM and SAM; () samples the base model.
      schedule: the sampler.
      params: frozen parameters.
      noise: `z_T`.
      cond: conditioning of the prompts, leading axis B.
      uncond: conditioning of the negative prompts, leading axis B, or 1 for all.
      steerings: one for each module; they are added to the conditional half of `h`.
      guidance_scale: may be traced; 1 or below gives only the conditional prediction.
    """
    guidance_scale = jnp.maximum(guidance_scale, 1.0)
    uncond = jax.tree.map(lambda u, c: jnp.broadcast_to(u, c.shape), uncond, cond)

    def body(carry, ddim_index):
        return sampling_step(
            backbone,
            modules,
            schedule,
            params,
            carry,
            ddim_index,
            cond,
            uncond,
            steerings,
            guidance_scale,
        ), None

    start = schedule.initial_scale * noise
    (z_0, _), _ = lax.scan(body, (start, jnp.zeros_like(start)), jnp.arange(schedule.num_steps))
    return z_0


def sampling_step(
    backbone: Backbone,
    modules: Sequence[MidBlockModule],
    schedule: Schedule,
    params: Mapping[str, Any],
    latents: tuple[Latent, Latent],
    ddim_index: Int[ArrayLike, ""],
    cond: Conditioning,
    uncond: Conditioning,
    steerings: Sequence[Steering],
    guidance_scale: Float[ArrayLike, ""],
) -> tuple[Latent, Latent]:
    """One step of `denoise`, which describes the other arguments.

    Args:
      latents: `z_t`, and the `z_0` that the previous step predicted (any values at the first step).
      ddim_index: where the step begins.
      uncond: conditioning of the negative prompts, leading axis B.
      guidance_scale: 1 or above.

    Returns:
      The next step's `latents`. Only the sampler "dpm++" changes the second of them.
    """
    z_t, previous_z_0 = latents
    timesteps = jnp.broadcast_to(jnp.asarray(schedule.timesteps)[ddim_index], (len(z_t),))
    output = guided_output(
        backbone.encode,
        backbone.decode,
        params,
        z_t,
        timesteps,
        cond,
        uncond,
        guidance_scale,
        partial(steer, modules, steerings, timesteps),
    )
    if schedule.sampler == "dpm++":
        z_0 = predict_z_0(schedule, output, z_t, ddim_index)
        return dpm_solver_step(schedule, z_0, previous_z_0, z_t, ddim_index), z_0
    return ddim_step(schedule, output, z_t, ddim_index), previous_z_0


def make_sampler(
    backbone: Backbone,
    modules: Sequence[MidBlockModule],
    num_steps: int,
    mesh: Mesh,
    sampler: str = "ddim",
) -> Callable[..., tuple[Images, Bool[Array, "B"]]]:
    """Makes a jitted function from noise to images; each device samples its own images.

    Args:
      backbone: the model's functions; its own `params` are not used.
      modules: architectures of RAM and SAM; () samples the base model.
      num_steps: number of sampling steps.
      mesh: devices; the batch is split over all of them.
      sampler: one of `schedule.SAMPLERS`.

    Returns:
      `sample(params, noise, cond, uncond, steerings, guidance_scale)`, with arguments as in
      `denoise`. It returns the images, and whether all values of each are finite. B is a multiple
      of the number of devices. Adapters, weights and guidance are traced arguments: changing them
      compiles nothing.
    """
    schedule = Schedule.from_config(backbone.scheduler_config, num_steps, sampler)

    def sample(params, *args):
        z_0 = denoise(backbone, modules, schedule, params, *args)
        images = backbone.decode_latents(params, z_0)
        is_finite = jnp.all(jnp.isfinite(images), axis=(1, 2, 3))
        return jnp.round(images * 255).astype(jnp.uint8), is_finite

    by_image, replicated = PartitionSpec(mesh.axis_names), PartitionSpec()
    steering = Steering(replicated, replicated, by_image, by_image, by_image)
    steerings = (steering,) * len(modules)
    specs = (replicated, by_image, by_image, replicated, steerings, replicated)
    return jax.jit(
        jax.shard_map(sample, mesh=mesh, in_specs=specs, out_specs=by_image, check_vma=False)
    )


class ImagePair(NamedTuple):
    """An image, and its base twin or None."""

    image: UInt8[np.ndarray, "height width 3"]
    base: UInt8[np.ndarray, "height width 3"] | None


class Batch(NamedTuple):
    """A batch on the devices, ready for sampling.

    Attributes:
      noise: `z_T`.
      cond: conditioning of the prompts, leading axis B.
    """

    noise: Latent
    cond: Conditioning


class Sampler:
    """Samples batches of one size on all local devices, with one compilation.

    A sampler compiles nothing if an earlier one of the backbone had the same sampler, steps, kinds
    of modules and sizes. Guidance scale and negative prompt may differ.

    Args:
      backbone: the model.
      options: how to sample; `batch_size` is not used.
      adapter: the concepts, or None for the base model.
      encode: the conditioning of texts; None is `backbone.encode_prompts`.

    Attributes:
      program: the function of `make_sampler`; `arguments` gives its arguments.
    """

    def __init__(
        self,
        backbone: Backbone,
        options: SamplerOptions,
        adapter: Adapter | CombinedAdapter | None = None,
        encode: Encode | None = None,
    ):
        self._backbone, self._adapter = backbone, adapter
        self._guidance_scale = options.guidance_scale
        self._resolution = options.resolution or backbone.default_resolution
        mesh = Mesh(np.asarray(jax.local_devices()), ("data",))
        self._by_image = NamedSharding(mesh, PartitionSpec("data"))
        self._replicated = NamedSharding(mesh, PartitionSpec())
        parts = adapter.parts if adapter else ()
        key = tuple(part.module for part in parts), options.num_steps, mesh, options.sampler
        if key not in backbone.programs:
            # Without the parameters: a cached program must not keep the weights alive.
            functions = dataclasses.replace(backbone, params={}, load=None)
            backbone.programs[key] = make_sampler(functions, *key)
        self.program = backbone.programs[key]
        self._params = jax.device_put(backbone.params, self._replicated)
        own = partial(backbone.encode_prompts, resolution=self._resolution, params=self._params)
        self._encode = encode or own
        uncond = own([options.negative_prompt])
        self._uncond = jax.device_put(uncond, self._replicated)
        self._modules = jax.device_put([(p.ram, p.sam) for p in parts], self._replicated)

    def prepare(self, prompts: Sequence[str], seeds: Sequence[int]) -> Batch:
        """Embeds a batch's prompts and draws its noise."""
        cond = self._encode(prompts)
        noise = initial_noise(seeds, self._backbone.latent_shape(self._resolution))
        return Batch(*jax.device_put((noise, cond), self._by_image))

    def arguments(
        self, batch: Batch, weights: Real[np.ndarray, "B N"] | None = None
    ) -> tuple[Any, ...]:
        """The arguments of `program`; see `__call__`."""
        chosen = steerings(self._adapter, weights) if self._adapter else ()
        own = [(s.ram_scale, s.sam_scale, s.max_timestep) for s in chosen]
        placed = zip(self._modules, jax.device_put(own, self._by_image), strict=True)
        on_devices = tuple(Steering(*modules, *scales) for modules, scales in placed)
        return (self._params, *batch, self._uncond, on_devices, self._guidance_scale)

    def __call__(
        self, batch: Batch, weights: Real[np.ndarray, "B N"] | None = None
    ) -> tuple[Images, Bool[Array, "B"]]:
        """Starts sampling a batch, and does not wait for the images.

        Args:
          batch: B images to sample.
          weights: the weight of each concept of the adapter in each image.

        Returns:
          The images, and whether all values of each are finite.
        """
        return self.program(*self.arguments(batch, weights))


def sample_images(
    backbone: Backbone,
    prompts: Sequence[str],
    seeds: Sequence[int],
    options: SamplerOptions,
    adapter: Adapter | CombinedAdapter | None = None,
    weights: Real[np.ndarray, "images N"] | None = None,
    base_twins: bool = False,
    only: Sequence[int] | None = None,
    encode: Encode | None = None,
) -> Iterator[ImagePair]:
    """Samples images on all local devices, with one compilation.

    Args:
      backbone: the model.
      prompts: one per image.
      seeds: one per image, 0 .. 2^32-1.
      options: how to sample.
      adapter: the concepts, or None for the base model.
      weights: the weight of each concept of the adapter in each image.
      base_twins: also sample each image from the same noise with all weights zero.
      only: numbers of the images to sample, from 0; None samples all. The program's batch size and
        concepts are those for all images, so `only` does not change an image.
      encode: the conditioning of texts; None is `backbone.encode_prompts`.

    Yields:
      The images in order, while the next batch is sampled.

    Raises:
      UserError: if an image has values that are not finite; earlier images have been yielded.
    """
    resolution = options.resolution or backbone.default_resolution
    batch_size = options.batch_size or default_batch_size(
        len(prompts), jax.local_device_count(), resolution
    )
    if adapter is not None:
        # Every concept of the sampler takes memory and time, even if it steers no image.
        used = np.flatnonzero(np.any(weights, axis=0))
        used = used if len(used) else np.arange(1)
        adapter = select(adapter, [adapter.names[n] for n in used])
        weights = np.asarray(weights)[:, used]
    sampler = Sampler(backbone, options, adapter, encode)

    def dispatch(rows):
        batch = sampler.prepare([prompts[row] for row in rows], [seeds[row] for row in rows])
        if adapter is None:
            return sampler(batch), None
        chosen = weights[rows]
        images = sampler(batch, chosen)
        if not base_twins:
            return images, None
        # If nothing is steered, each image is its own base twin.
        return images, sampler(batch, 0 * chosen) if chosen.any() else images

    def collect(rows, count, adapted, base):
        adapted, base = jax.device_get((adapted, base))
        for i in range(count):
            for images, kind in ((base, "base image"), (adapted, "image")):
                if images is not None and not images[1][i]:
                    row = int(rows[i])
                    raise UserError(_not_finite(kind, row, prompts[row], seeds[row]))
            yield ImagePair(adapted[0][i], None if base is None else base[0][i])

    pending = None
    wanted = np.arange(len(prompts)) if only is None else np.asarray(only)
    for items, count in equal_batches(len(wanted), batch_size):
        rows = wanted[items]
        batch = (rows, count, *dispatch(rows))
        if pending is not None:
            yield from collect(*pending)
        pending = batch
    if pending is not None:
        yield from collect(*pending)


def _not_finite(kind: str, row: int, prompt: str, seed: int) -> str:
    return (
        f"{kind} {row} ({prompt!r:.100}, seed {seed}) has values that are not finite: the weights"
        " hold such values, or overflow in this dtype. Check the model and the adapter, and draw"
        " in float32"
    )


def default_batch_size(num_images: int, num_devices: int, resolution: int) -> int:
    """The batch size over all devices that `sample_images` chooses.

    Each device gets 4 images of 512 pixels or, at other resolutions, the same number of pixels, but
    at most 16 images, and no more than `num_images` requires.
    """
    per_device = min(max(4 * 512**2 // resolution**2, 1), 16, math.ceil(num_images / num_devices))
    return num_devices * max(per_device, 1)


def sampling_bytes(backbone: Backbone, resolution: int, per_device: int) -> int:
    """Estimates the bytes that a device needs for `per_device` images, besides the parameters.

    `backbone` may be abstract; see `backbone.memory.estimate_bytes`.
    """
    schedule = Schedule.from_config(backbone.scheduler_config, 1)

    def sample(params, noise, cond, uncond):
        z_0 = denoise(backbone, (), schedule, params, noise, cond, uncond, (), 2.0)
        return backbone.decode_latents(params, z_0)

    def batch(x):
        return jax.ShapeDtypeStruct((per_device, *x.shape[1:]), x.dtype)

    prompt = jax.eval_shape(
        lambda params: backbone.encode_prompts([""], resolution, params), backbone.params
    )
    shape = per_device, *backbone.latent_shape(resolution)
    noise = jax.ShapeDtypeStruct(shape, jnp.float32)
    return estimate_bytes(sample, backbone.params, noise, jax.tree.map(batch, prompt), prompt)
