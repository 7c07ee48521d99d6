"""The programs that `train` and `generate` run, lowered from shapes alone."""

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from respodiff_jax.backbone import Backbone
from respodiff_jax.backbone.memory import nbytes
from respodiff_jax.generation.sampling import default_batch_size, denoise, make_sampler
from respodiff_jax.method.embedding import EmbeddedConcepts, concept_shapes
from respodiff_jax.method.modules import Steering
from respodiff_jax.method.rollout import last_loss_index
from respodiff_jax.method.schedule import Schedule
from respodiff_jax.method.state import StepSpec, init_state
from respodiff_jax.method.train_step import train_step
from respodiff_jax.training.config import concepts_from
from respodiff_jax.training.parallel import Placement, devices_per_concept
from respodiff_jax.training.spec import step_spec
from respodiff_jax.training.waves import wave_size

P = PartitionSpec
Shape = jax.ShapeDtypeStruct


@dataclasses.dataclass(frozen=True, eq=False)
class Program:
    """A program to compile, and the facts that `analysis` compares with its cost.

    Attributes:
      lower: lowers the program.
      samples_per_device: samples on a device, over all of its concepts.
      parameters: bytes of frozen parameters on a device.
      unused: bytes of frozen parameters on a device that the program does not take as arguments.
      gradients: bytes of gradients that the devices of a concept exchange.
      weights: `(dtype, dims)` of the frozen parameters with more than one axis.
      repeats: how often the program's loop runs, on average; None without a loop.
      lower_body: lowers one pass of the loop as a program of its own.
    """

    lower: Callable[[], jax.stages.Lowered]
    samples_per_device: int
    parameters: int
    unused: int
    gradients: int = 0
    weights: frozenset[tuple[str, tuple[int, ...]]] = frozenset()
    repeats: float | None = None
    lower_body: Callable[[], jax.stages.Lowered] | None = None


def concepts_at_a_time(config: ConfigDict, num_devices: int) -> int:
    """The number of concepts that train together."""
    per_device = config.train.concepts_per_device
    return wave_size(len(concepts_from(config)), num_devices, per_device)


def data_shards(config: ConfigDict, num_devices: int) -> int:
    """The number of devices that share the batch of a concept."""
    return devices_per_concept(concepts_at_a_time(config, num_devices), num_devices)


def training(config: ConfigDict, backbone: Backbone, devices: Sequence[jax.Device]) -> Program:
    """The training step that `respodiff train` runs on these devices.

    Raises:
      UserError: as `Placement`.
    """
    concepts, batch_size = concepts_from(config), config.train.batch_size
    count = concepts_at_a_time(config, len(devices))
    placement = Placement(config.parallel.strategy, count, batch_size, devices)
    resolution = config.model.resolution or backbone.default_resolution
    spec = step_spec(config, backbone, resolution)
    arrays = concept_shapes(backbone, concepts, resolution, count)
    state = jax.eval_shape(partial(init_state, spec, seed=0, batch_size=batch_size), arrays)
    frozen = {"unet": backbone.params["unet"]}
    for_grids = backbone.params["vae"] if config.log.grid_every else {}

    samples = batch_size // placement.data_shards
    samples_per_device = count // placement.concept_shards * samples
    modules = state.concepts.ram, state.concepts.sam
    body = partial(_lower_ddim_step, backbone, spec, arrays, samples_per_device, 1, devices[0])
    loops = spec.rollout.has_loop
    return Program(
        lower=lambda: placement.lower(partial(train_step, spec), state, frozen, arrays),
        samples_per_device=samples_per_device,
        parameters=nbytes((frozen, for_grids)),
        unused=nbytes(for_grids),
        gradients=nbytes(modules) // placement.concept_shards if placement.data_shards > 1 else 0,
        weights=_matrices(frozen),
        repeats=last_loss_index(spec.schedule) / 2 if loops else None,
        lower_body=body if loops else None,
    )


def sampling(config: ConfigDict, backbone: Backbone, devices: Sequence[jax.Device]) -> Program:
    """The sampler that `respodiff generate` runs on one host, with an adapter of all concepts.

    Steps and guidance are those of the config's validation grids.
    """
    # A process samples on the devices of its own host.
    devices = [d for d in devices if d.process_index == devices[0].process_index]
    concepts = concepts_from(config)
    resolution = config.model.resolution or backbone.default_resolution
    spec = step_spec(config, backbone, resolution)
    arrays = concept_shapes(backbone, concepts, resolution)
    num_steps, guidance_scale = config.log.grid_steps, config.log.grid_guidance_scale
    batch_size = default_batch_size(2**20, len(devices), resolution)
    mesh = Mesh(np.asarray(devices), ("data",))
    program = make_sampler(backbone, (spec.module,), num_steps, mesh)

    def placed(spec, tree):
        sharding = NamedSharding(mesh, spec)
        return jax.tree.map(lambda x: Shape(x.shape, x.dtype, sharding=sharding), tree)

    def lower():
        args = backbone.params, *_sampler_shapes(spec, arrays, batch_size, len(concepts))
        specs = P(), P("data"), P("data"), P(), (Steering(P(), P(), P("data"), P("data")),)
        return program.lower(*jax.tree.map(placed, specs, args), guidance_scale)

    texts = {k: v for k, v in backbone.params.items() if k.startswith("text_encoder")}
    share = batch_size // len(devices)
    return Program(
        lower=lower,
        samples_per_device=share,
        parameters=nbytes(backbone.params),
        unused=nbytes(texts),
        weights=_matrices(backbone.params),
        repeats=num_steps,
        lower_body=partial(
            _lower_ddim_step, backbone, spec, arrays, share, len(concepts), devices[0]
        ),
    )


def _lower_ddim_step(backbone, spec, arrays, batch_size, num_concepts, device):
    """Lowers one guided, steered DDIM step on a device; rollouts and sampling repeat it."""
    schedule = Schedule.from_config(backbone.scheduler_config, 1)
    shapes = _sampler_shapes(spec, arrays, batch_size, num_concepts)
    args = ({"unet": backbone.params["unet"]}, *shapes)
    on_device = jax.sharding.SingleDeviceSharding(device)
    args = jax.tree.map(lambda x: Shape(x.shape, x.dtype, sharding=on_device), args)
    return jax.jit(partial(denoise, backbone, (spec.module,), schedule)).lower(*args, 1.0)


def _sampler_shapes(
    spec: StepSpec, arrays: EmbeddedConcepts, batch_size: int, num_concepts: int
) -> tuple[Any, ...]:
    """Shapes of a batch's noise, its prompts, the negative prompt and the steering."""
    keys = jax.random.split(jax.random.key(0), num_concepts)
    modules = jax.eval_shape(jax.vmap(spec.module.init_params), keys)
    scales = Shape((batch_size, num_concepts), np.float32)
    cond = jax.tree.map(lambda x: Shape((batch_size, *x.shape[1:]), x.dtype), arrays.empty)
    uncond = jax.tree.map(lambda x: Shape((1, *x.shape[1:]), x.dtype), arrays.empty)
    noise = Shape((batch_size, *spec.latent_shape), np.float32)
    return noise, cond, uncond, (Steering(modules, modules, scales, scales),)


def _matrices(tree: Any) -> frozenset[tuple[str, tuple[int, ...]]]:
    names = {"float32": "f32", "bfloat16": "bf16"}
    return frozenset(
        (names[x.dtype.name], x.shape) for x in jax.tree.leaves(tree) if len(x.shape) > 1
    )
