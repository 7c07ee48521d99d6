"""Devices: where states live and how the pure step runs on all of them, on one host or many.

All devices form one mesh with the axes `concept` and `data`: as many concept shards as divide both
the number of concepts and of devices; the devices of a concept shard split its batch. Two
strategies run the same step on it:

* `pmap`: each device runs the step on its own share, gradients are averaged by `pmean` among the
  devices of a concept shard, the frozen parameters are replicated.
* `mesh`: `jit` with `NamedSharding`s; the frozen parameters are replicated or, with `fsdp`,
  sharded.

A state has one *canonical* form, global arrays sharded over the mesh. Checkpoints hold it, so that
a run may continue under the other strategy or on another number of devices.
"""

import abc
import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from respodiff_jax.errors import UserError
from respodiff_jax.method.modules import Steering
from respodiff_jax.method.objective import ConceptArrays
from respodiff_jax.method.train_step import Metrics, Recipe, TrainState

P = PartitionSpec
_AXIS = "device"  # the pmapped axis
_BY_DEVICE = P(("concept", "data"))  # each device has its part


def devices_per_concept(num_concepts: int, num_devices: int) -> int:
    """How many devices share the batch of a concept."""
    return num_devices // math.gcd(num_concepts, num_devices)


def make_placement(
    strategy: str,
    num_concepts: int,
    batch_size: int,
    fsdp: bool = False,
    devices: Sequence[jax.Device] | None = None,
) -> "Placement":
    """Lays concepts and samples out over devices.

    Args:
      strategy: "pmap" or "mesh".
      num_concepts: N.
      batch_size: samples of each concept in a step, over all devices.
      fsdp: "mesh" only, shard the frozen parameters.
      devices: by default all devices of all processes; of others, such as those of a topology that
        is not there, the placement can only `lower`.

    Raises:
      UserError: if the batch cannot be divided over the devices of a concept shard.
    """
    if devices is None:
        processes = range(jax.process_count())
        devices = [d for p in processes for d in jax.local_devices(process_index=p)]
    # The order in which pmap numbers them, which on TPU pods is not that of `jax.devices()`.
    devices = np.asarray(sorted(devices, key=lambda device: device.process_index))
    data_shards = devices_per_concept(num_concepts, devices.size)
    concept_shards = devices.size // data_shards
    if batch_size % data_shards:
        raise UserError(
            f"train.batch_size is {batch_size}, expected a multiple of {data_shards}:"
            f" {devices.size} devices and {num_concepts} concept(s) in {concept_shards} shard(s)"
            f" leave {data_shards} devices to share the batch of each; change the number of devices"
            " or, of a new workdir, train.batch_size"
        )
    mesh = Mesh(devices.reshape(concept_shards, data_shards), ("concept", "data"))
    if strategy == "pmap":
        return PmapPlacement(mesh, batch_size)
    return MeshPlacement(mesh, batch_size, fsdp)


def _state_specs(state: TrainState) -> TrainState:
    """How a canonical state lies on the mesh, leaf by leaf."""
    by_concept = jax.tree.map(lambda _: P("concept"), state.concepts)
    rollout = jax.tree.map(lambda _: P("concept", "data"), state.concepts.rollout)
    return TrainState(step=P(), key=P(), concepts=by_concept.replace(rollout=rollout))


class Placement(abc.ABC):
    """A mesh of devices and a way to run the step on it.

    `state`, `frozen` and `concepts` below are in the placement's own form, made by the `place_*`
    functions; `canonical` is its inverse for states.
    """

    def __init__(self, mesh: Mesh, batch_size: int):
        self.mesh = mesh
        self.batch_size = batch_size
        self.concept_shards, self.data_shards = mesh.devices.shape

    @abc.abstractmethod
    def place_frozen(self, params: dict) -> dict:
        """Puts the frozen parameters on the devices."""

    @abc.abstractmethod
    def place_concepts(self, concepts: ConceptArrays) -> ConceptArrays:
        """Puts host arrays `(N, ...)` on the devices that train these concepts."""

    @abc.abstractmethod
    def place_state(self, state: TrainState) -> TrainState:
        """Takes a canonical state."""

    @abc.abstractmethod
    def canonical(self, tree: TrainState | Metrics) -> TrainState | Metrics:
        """Global arrays of a state, or of metrics, without copying between devices."""

    @abc.abstractmethod
    def compile(self, step: Callable) -> Callable:
        """Turns `step(state, frozen, concepts, sample_ids, **axis)` into `f(state, frozen,
        concepts)`.

        The state's buffers are donated.
        """

    @abc.abstractmethod
    def lower(
        self, step: Callable, state: TrainState, frozen: dict, concepts: ConceptArrays
    ) -> jax.stages.Lowered:
        """Lowers what `compile` jits, from shapes and dtypes alone, to be compiled ahead of time.

        Args:
          step: as for `compile`.
          state: shapes of a canonical state.
          frozen: shapes of the frozen parameters, unplaced.
          concepts: shapes of the host arrays `(N, ...)`.
        """

    def compile_sampler(self, sample: Callable) -> Callable:
        """Turns `sampling.make_sampler`'s function into one in which each device samples its own
        images.

        Every process calls it with the same arguments: the placed frozen parameters and host
        arrays, of as many images as a multiple of the number of devices. It gets the host array of
        all images.
        """
        sample_placed = self._compile_sampler(sample)

        def sample_all(frozen, noise, cond, uncond, steering, guidance_scale):
            noise, cond, *scales = jax.tree.map(
                self._place_by_device, (noise, cond, steering.ram_scale, steering.sam_scale)
            )
            steering = Steering(steering.ram, steering.sam, *scales)
            return self.fetch(sample_placed(frozen, noise, cond, uncond, steering, guidance_scale))

        return sample_all

    @abc.abstractmethod
    def _compile_sampler(self, sample: Callable) -> Callable:
        """The same, from arrays that `_place_by_device` placed to a global one."""

    @abc.abstractmethod
    def _place_by_device(self, x: Any) -> jax.Array:
        """Gives each device its part of a host array."""

    def frozen_spec(self, shape: tuple[int, ...]) -> PartitionSpec:
        """How a frozen parameter of that shape lies on the mesh."""
        del shape
        return P()

    def prepare(self, recipe: Recipe) -> Recipe:
        """The recipe as this placement runs it."""
        return recipe

    def init_state(self, init: Callable[..., TrainState], *args: Any) -> TrainState:
        """The canonical state that `init(*args)` gives, of host arrays that are the same on all
        processes; each device makes its own part, so that none has to hold the whole."""
        shapes = jax.eval_shape(init, *args)
        shardings = jax.tree.map(lambda x: x.sharding, self.abstract(shapes))
        return jax.jit(init, out_shardings=shardings)(*args)

    def to_canonical_devices(self, state: TrainState) -> TrainState:
        """Puts a host state, the same on all processes, on the mesh in canonical form."""
        return jax.tree.map(self._put, state, _state_specs(state))

    def abstract(self, state: TrainState) -> TrainState:
        """Shapes, dtypes and shardings of a state's canonical form, for restoring one."""
        return jax.tree.map(
            lambda x, spec: jax.ShapeDtypeStruct(
                x.shape, x.dtype, sharding=NamedSharding(self.mesh, spec)
            ),
            state,
            _state_specs(state),
        )

    def fetch(self, tree: Any) -> Any:
        """Host arrays of a canonical tree, whole on every process."""
        if jax.process_count() > 1:
            return multihost_utils.process_allgather(tree, tiled=True)
        return jax.tree.map(np.asarray, tree)

    def _put(self, x: Any, spec: PartitionSpec) -> jax.Array:
        x = np.asarray(x)
        return jax.make_array_from_callback(x.shape, NamedSharding(self.mesh, spec), x.__getitem__)


class PmapPlacement(Placement):
    """Own form: `(local devices, ...)` arrays, one slice a device."""

    def __init__(self, mesh: Mesh, batch_size: int):
        super().__init__(mesh, batch_size)
        self.local_mesh = Mesh(np.asarray(jax.local_devices()), (_AXIS,))

    def place_frozen(self, params):
        stacked = NamedSharding(self.local_mesh, P(_AXIS))

        def replicate(x):
            x = np.asarray(x)[None]
            shape = (self.local_mesh.size, *x.shape[1:])
            return jax.make_array_from_callback(shape, stacked, lambda _: x)

        return jax.tree.map(replicate, params)

    def place_concepts(self, concepts):
        return jax.tree.map(lambda x: self._stack(self._put(x, P("concept"))), concepts)

    def place_state(self, state):
        return jax.tree.map(self._stack, state)

    def canonical(self, tree):
        specs = (
            _state_specs(tree)
            if isinstance(tree, TrainState)
            else jax.tree.map(lambda _: P("concept"), tree)
        )
        return jax.tree.map(self._unstack, tree, specs)

    def _mapped(self, step):
        groups = np.arange(self.mesh.size).reshape(self.mesh.devices.shape).tolist()
        return jax.pmap(
            lambda *args: step(*args, axis_name=_AXIS, axis_index_groups=groups),
            axis_name=_AXIS,
            devices=self.mesh.devices.ravel().tolist(),
            donate_argnums=(0,),
        )

    def compile(self, step):
        mapped = self._mapped(step)
        ids = np.arange(self.batch_size, dtype=np.int32)
        sample_ids = self._stack(self._put(ids, P("data")))
        return lambda state, frozen, concepts: mapped(state, frozen, concepts, sample_ids)

    def lower(self, step, state, frozen, concepts):
        def stacked(x, spec):
            shard = NamedSharding(self.mesh, spec).shard_shape(x.shape)
            return jax.ShapeDtypeStruct((self.mesh.size, *shard), x.dtype)

        return self._mapped(step).lower(
            jax.tree.map(stacked, state, _state_specs(state)),
            jax.tree.map(lambda x: stacked(x, P()), frozen),
            jax.tree.map(lambda x: stacked(x, P("concept")), concepts),
            stacked(jax.ShapeDtypeStruct((self.batch_size,), np.int32), P("data")),
        )

    def _compile_sampler(self, sample):
        mapped = jax.pmap(
            sample,
            axis_name=_AXIS,
            in_axes=(0, 0, 0, None, Steering(None, None, 0, 0), None),
            devices=self.mesh.devices.ravel().tolist(),
        )

        return lambda *args: self._unstack(mapped(*args), _BY_DEVICE)

    def _place_by_device(self, x):
        return self._stack(self._put(x, _BY_DEVICE))

    def _stack(self, x: jax.Array) -> jax.Array:
        """Global array -> `(local devices, ...)`, each device's shard its slice."""
        by_device = {shard.device: shard.data for shard in x.addressable_shards}
        slices = [by_device[device][None] for device in self.local_mesh.devices]
        return jax.make_array_from_single_device_arrays(
            (len(slices), *slices[0].shape[1:]), NamedSharding(self.local_mesh, P(_AXIS)), slices
        )

    def _unstack(self, x: jax.Array, spec: PartitionSpec) -> jax.Array:
        """`(local devices, ...)` -> global array of that spec."""
        shards = [shard.data[0] for shard in x.addressable_shards]
        sharding = NamedSharding(self.mesh, spec)
        # Into how many parts the spec splits each axis: what is left of an axis that all divide.
        divisible = (self.mesh.size,) * shards[0].ndim
        parts = [self.mesh.size // n for n in sharding.shard_shape(divisible)]
        shape = tuple(n * part for n, part in zip(shards[0].shape, parts, strict=True))
        return jax.make_array_from_single_device_arrays(shape, sharding, shards)


class MeshPlacement(Placement):
    """Own form: the canonical one."""

    def __init__(self, mesh: Mesh, batch_size: int, fsdp: bool):
        super().__init__(mesh, batch_size)
        self.fsdp = fsdp

    def place_frozen(self, params):
        return jax.tree.map(lambda x: self._put(x, self.frozen_spec(x.shape)), params)

    def frozen_spec(self, shape):
        """Shards a kernel's largest dimension that all devices divide; vectors stay whole."""
        divisible = [n if n % self.mesh.size == 0 else 0 for n in shape]
        if not self.fsdp or len(shape) < 2 or not any(divisible):
            return P()
        axis = int(np.argmax(divisible))
        return P(*[None] * axis, *_BY_DEVICE)

    def prepare(self, recipe):
        recipe = dataclasses.replace(recipe, batch_shards=self.data_shards)
        if not self.fsdp:
            return recipe
        return dataclasses.replace(
            recipe, encode=self._gathering(recipe.encode), decode=self._gathering(recipe.decode)
        )

    def _gathering(self, apply: Callable) -> Callable:
        """`apply(frozen, ...)` in which each layer gathers its parameters when its input is there.

        A barrier ties the gathering to the input: otherwise XLA gathers early, and shares what it
        gathered between passes, until the whole model is in memory after all. For the same reason
        each layer is a checkpoint of its own: the backward pass gathers again.
        """

        def gathered(x):
            # Sharded up to here: XLA lets the barrier have what comes behind it.
            for spec in (self.frozen_spec(x.shape), P()):
                x = jax.lax.with_sharding_constraint(x, NamedSharding(self.mesh, spec))
            return x

        def gather(next_function, args, kwargs, context):
            layer = context.module
            inside = isinstance(layer.parent, nn.Module)  # of a model, not gathered and applied
            if not isinstance(layer, nn.Conv | nn.Dense) or not inside:
                return next_function(*args, **kwargs)

            @jax.checkpoint
            def gather_and_apply(params, x):
                params = jax.tree.map(gathered, params)
                return layer.clone(parent=None).apply({"params": params}, x, *args[1:], **kwargs)

            params, x = jax.lax.optimization_barrier((layer.variables["params"], args[0]))
            return gather_and_apply(jax.lax.stop_gradient(params), x)

        def apply_gathering(*args):
            with nn.intercept_methods(gather):
                return apply(*args)

        return apply_gathering

    def place_concepts(self, concepts):
        return jax.tree.map(lambda x: self._put(x, P("concept")), concepts)

    def place_state(self, state):
        return state

    def canonical(self, tree):
        return tree

    def _jitted(self, step):
        def with_shardings(state, frozen, concepts, sample_ids):
            # Kernels, which XLA cannot partition, look here for the devices that share a batch.
            with jax.sharding.use_abstract_mesh(self.mesh.abstract_mesh):
                new_state, metrics = step(
                    state, frozen, concepts, sample_ids, concept_axis="concept"
                )
            shardings = jax.tree.map(lambda s: NamedSharding(self.mesh, s), _state_specs(state))
            return jax.lax.with_sharding_constraint(new_state, shardings), metrics

        return jax.jit(with_shardings, donate_argnums=(0,))

    def compile(self, step):
        jitted = self._jitted(step)
        sample_ids = self._put(np.arange(self.batch_size, dtype=np.int32), P("data"))
        return lambda state, frozen, concepts: jitted(state, frozen, concepts, sample_ids)

    def lower(self, step, state, frozen, concepts):
        def sharded(x, spec):
            return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(self.mesh, spec))

        return self._jitted(step).lower(
            self.abstract(state),
            jax.tree.map(lambda x: sharded(x, self.frozen_spec(x.shape)), frozen),
            jax.tree.map(lambda x: sharded(x, P("concept")), concepts),
            sharded(jax.ShapeDtypeStruct((self.batch_size,), np.int32), P("data")),
        )

    def _compile_sampler(self, sample):
        # For kernels, which attend for their own share along "data".
        mesh = Mesh(self.mesh.devices.reshape(1, -1), self.mesh.axis_names)

        def on_mesh(*args):
            with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
                return sample(*args)

        return jax.jit(on_mesh, out_shardings=NamedSharding(mesh, _BY_DEVICE))

    def _place_by_device(self, x):
        return self._put(x, _BY_DEVICE)
