"""Sampling with adapters: DDIM with classifier-free guidance, steered at the mid-block.

Convention: `RAM + SAM` is added to the *conditional* half of the guidance batch only, at every
step (paper, section 4.4); the unconditional half is the base model's. An image depends on its own
prompt, seed and concepts alone, not on the batch that it was made in, and an adapted image and its
base twin start from the same noise.
"""

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from respodiff_jax.adapters import Adapter, select
from respodiff_jax.backbone import Backbone, Conditioning
from respodiff_jax.errors import UserError
from respodiff_jax.method.diffusion import Schedule, cfg_combine, ddim_step, join, part
from respodiff_jax.method.modules import MidBlockModule, Steering, steer


@dataclasses.dataclass(frozen=True)
class SamplerOptions:
    """How images are sampled.

    Attributes:
      num_steps: DDIM steps.
      guidance_scale: of classifier-free guidance; at 1 or below there is none, as in diffusers.
      negative_prompt: what the unconditional half is given.
      resolution: of the square images in pixels; None is the model's own.
      batch_size: images at a time over all devices; None chooses by resolution.
    """

    num_steps: int = 50
    guidance_scale: float = 7.5
    negative_prompt: str = ""
    resolution: int | None = None
    batch_size: int | None = None

    def __post_init__(self):
        if self.num_steps < 1:
            raise UserError(f"number of sampling steps is {self.num_steps}, expected at least 1")
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


def initial_noise(seeds: Sequence[int], latent_shape: tuple[int, int, int]) -> jax.Array:
    """Pure noise, float32 `(B, h, w, c)`; sample `b` depends on `seeds[b]` alone.

    Raises:
      UserError: for a seed outside 0 .. 2^32-1.
    """
    if min(seeds) < 0 or max(seeds) >= 2**32:
        raise UserError(f"seeds are {min(seeds)} .. {max(seeds)}, expected within 0 .. {2**32 - 1}")
    keys = jax.vmap(jax.random.key)(np.asarray(seeds, np.uint32))
    return jax.vmap(lambda key: jax.random.normal(key, latent_shape))(keys)


def denoise(
    backbone: Backbone,
    module: MidBlockModule | None,
    schedule: Schedule,
    params: Mapping[str, Any],
    noise: jax.Array,
    cond: Conditioning,
    uncond: Conditioning,
    steering: Steering | None,
    guidance_scale: jax.Array | float,
) -> jax.Array:
    """The whole sampling loop, `z_T -> z_0`.

    Each step asks the UNet once, with 2B samples.

    Args:
      backbone: the model's functions; its own `params` are not used.
      module: architecture of RAM and SAM; None with `steering` None.
      schedule: DDIM schedule.
      params: frozen parameters.
      noise: `z_T`, float32 `(B, h, w, c)`.
      cond: the prompts' conditioning, leading axis B.
      uncond: the negative prompts', leading axis B, or 1 for all.
      steering: what to add to the conditional half of `h`; None is the base model.
      guidance_scale: `()`, may be traced; 1 or below gives the conditional prediction alone.

    Returns:
      Latents `z_0`, float32 `(B, h, w, c)`.
    """
    guidance_scale = jnp.maximum(guidance_scale, 1.0)
    uncond = jax.tree.map(lambda u, c: jnp.broadcast_to(u, c.shape), uncond, cond)
    # On however many devices the batch is, each has whole samples.
    shards = len(noise)
    both = join(cond, uncond, shards=shards)

    def body(z_t, ddim_index):
        timestep = jnp.asarray(schedule.timesteps)[ddim_index]
        timesteps = jnp.broadcast_to(timestep, (2 * len(z_t),))
        h, skips = backbone.encode(params, join(z_t, z_t, shards=shards), timesteps, both)
        if steering is not None:
            h_cond, h_uncond = part(h, 2, shards)
            h = join(steer(module, steering, h_cond), h_uncond, shards=shards)
        output = cfg_combine(*part(backbone.decode(params, h, skips), 2, shards), guidance_scale)
        return ddim_step(schedule, output, z_t, ddim_index), None

    z_0, _ = lax.scan(body, noise, jnp.arange(schedule.num_steps))
    return z_0


def make_sampler(
    backbone: Backbone, module: MidBlockModule | None, schedule: Schedule
) -> Callable[..., jax.Array]:
    """A pure function from noise to images, to be jitted by the caller.

    Returns:
      `sample(params, noise, cond, uncond, steering, guidance_scale)`, arguments as of `denoise`,
      giving images uint8 `(B, H, W, 3)`. Adapters, weights and guidance are traced arguments:
      changing them compiles nothing.
    """

    def sample(params, noise, cond, uncond, steering, guidance_scale):
        z_0 = denoise(
            backbone, module, schedule, params, noise, cond, uncond, steering, guidance_scale
        )
        return jnp.round(backbone.decode_latents(params, z_0) * 255).astype(jnp.uint8)

    return sample


class ImagePair(NamedTuple):
    """An image and, if asked for, its base twin; uint8 `(H, W, 3)`."""

    image: np.ndarray
    base: np.ndarray | None


class Begun(NamedTuple):
    """A batch on the devices, about to be sampled: noise and conditioning."""

    noise: jax.Array
    cond: Conditioning


class Sampler:
    """Samples batches of one size on all local devices, with one compilation.

    Samplers of one backbone share programs: another adapter of the same architecture and number of
    concepts, another guidance scale or negative prompt compiles nothing.

    Args:
      backbone: the model.
      options: how; the batch size is that of what it is given.
      adapter: the concepts, or None for the base model.

    Attributes:
      program: the jitted function of `arguments`.
    """

    def __init__(
        self,
        backbone: Backbone,
        options: SamplerOptions,
        adapter: Adapter | None = None,
    ):
        self._backbone, self._adapter = backbone, adapter
        self._guidance_scale = options.guidance_scale
        self._resolution = options.resolution or backbone.default_resolution
        mesh = Mesh(np.asarray(jax.local_devices()), ("data",))
        replicated = NamedSharding(mesh, PartitionSpec())
        self._by_sample = NamedSharding(mesh, PartitionSpec("data"))
        key = adapter and adapter.module, options.num_steps, mesh
        if key not in backbone.programs:
            # Which then does not hold the backbone that holds it, nor its parameters.
            functions = dataclasses.replace(backbone, params={})
            backbone.programs[key] = make_program(functions, *key)
        self.program = backbone.programs[key]
        self._params = jax.device_put(backbone.params, replicated)
        self._uncond = jax.device_put(
            backbone.encode_prompts([options.negative_prompt], self._resolution, self._params),
            replicated,
        )
        if adapter is not None:
            self._modules = jax.device_put((adapter.ram, adapter.sam), replicated)

    def begin(self, prompts: Sequence[str], seeds: Sequence[int]) -> Begun:
        """Embeds a batch's prompts and draws its noise."""
        cond = self._backbone.encode_prompts(prompts, self._resolution, self._params)
        noise = initial_noise(seeds, self._backbone.latent_shape(self._resolution))
        return Begun(*jax.device_put((noise, cond), self._by_sample))

    def arguments(self, begun: Begun, weights: np.ndarray | None = None) -> tuple[Any, ...]:
        """What `program` is called with; see `__call__`."""
        steering = None
        if self._adapter is not None:
            scales = self._adapter.steering(weights).ram_scale
            scales = jax.device_put(scales, self._by_sample)
            steering = Steering(*self._modules, scales, scales)
        return (self._params, *begun, self._uncond, steering, self._guidance_scale)

    def __call__(self, begun: Begun, weights: np.ndarray | None = None) -> jax.Array:
        """Samples a batch; does not wait for it.

        Args:
          begun: the batch.
          weights: `(B, N)`, weight of each of the adapter's concepts in each image.

        Returns:
          Images, uint8 `(B, H, W, 3)`.
        """
        return self.program(*self.arguments(begun, weights))


def make_program(
    backbone: Backbone, module: MidBlockModule | None, num_steps: int, mesh: Mesh
) -> Callable[..., jax.Array]:
    """`make_sampler`'s function, jitted for a mesh whose devices share a batch along "data"."""
    schedule = Schedule.from_config(backbone.scheduler_config, num_steps)
    sample = make_sampler(backbone, module, schedule)

    @jax.jit
    def program(*args):
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):  # for fused attention
            return sample(*args)

    return program


def sample_images(
    backbone: Backbone,
    prompts: Sequence[str],
    seeds: Sequence[int],
    options: SamplerOptions,
    adapter: Adapter | None = None,
    weights: np.ndarray | None = None,
    base_twins: bool = False,
) -> Iterator[ImagePair]:
    """Samples images on all local devices, with one compilation.

    Args:
      backbone: the model.
      prompts: one per image.
      seeds: one per image, 0 .. 2^32-1.
      options: how.
      adapter: the concepts, or None for the base model.
      weights: `(number of images, N)`, weight of each of the adapter's concepts in each image.
      base_twins: also sample each image from the same noise with all weights zero.

    Yields:
      The images in order; the next batch is being sampled meanwhile.
    """
    resolution = options.resolution or backbone.default_resolution
    batch_size = options.batch_size or default_batch_size(
        len(prompts), jax.local_device_count(), resolution
    )
    if adapter is not None:
        # Every concept of the sampler takes memory and time, also those that steer no image.
        used = np.flatnonzero(np.any(weights, axis=0))
        used = used if len(used) else np.arange(1)
        adapter = select(adapter, [adapter.names[n] for n in used])
        weights = np.asarray(weights)[:, used]
    sampler = Sampler(backbone, options, adapter)

    def dispatch(rows):
        begun = sampler.begin([prompts[row] for row in rows], [seeds[row] for row in rows])
        if adapter is None:
            return sampler(begun), sampler(begun) if base_twins else None
        chosen = weights[rows]
        return sampler(begun, chosen), sampler(begun, 0 * chosen) if base_twins else None

    def collect(count, images, base):
        images, base = np.asarray(images), None if base is None else np.asarray(base)
        for i in range(count):
            yield ImagePair(images[i], None if base is None else base[i])

    pending = None
    for start in range(0, len(prompts), batch_size):
        # The last batch is filled up with its last image, so that its shape is that of the others.
        rows = np.minimum(np.arange(start, start + batch_size), len(prompts) - 1)
        batch = (min(batch_size, len(prompts) - start), *dispatch(rows))
        if pending is not None:
            yield from collect(*pending)
        pending = batch
    if pending is not None:
        yield from collect(*pending)


def default_batch_size(num_images: int, num_devices: int, resolution: int) -> int:
    """4 images of 512 px per device, or as many pixels; not more than there are images."""
    per_device = min(max(4 * 512**2 // resolution**2, 1), 16, math.ceil(num_images / num_devices))
    return num_devices * max(per_device, 1)
