"""Devices: where states live and how the pure step runs on all of them, on one host or many.

All devices form one mesh with the axes `concept` and `data`. The number of concept shards is the
greatest common divisor of the numbers of concepts and of devices; the devices of a concept shard
split its batch. The frozen parameters are on every device.

Two strategies run the same step on the mesh, each device on its own share, with gradients averaged
among the devices of a concept shard:

* `pmap`: `jax.pmap` over a flat axis of devices.
* `mesh`: `jax.jit` of `jax.shard_map`.

States, concepts and metrics are global arrays on the mesh under both. Checkpoints hold these, so a
run may continue under the other strategy or on another number of devices.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from respodiff_jax.errors import UserError
from respodiff_jax.method.embedding import EmbeddedConcepts
from respodiff_jax.method.state import ConceptState, TrainState

P = PartitionSpec
_BY_CONCEPT, _BY_DEVICE = P("concept"), P(("concept", "data"))
# How a state lies on the mesh: a prefix of its tree.
_STATE = TrainState(
    step=P(),
    key=P(),
    concepts=ConceptState(
        ram=_BY_CONCEPT,
        sam=_BY_CONCEPT,
        opt_ram=_BY_CONCEPT,
        opt_sam=_BY_CONCEPT,
        ema=_BY_CONCEPT,
        rollout=P("concept", "data"),
        diverged_at=_BY_CONCEPT,
    ),
)


def devices_per_concept(num_concepts: int, num_devices: int) -> int:
    """The number of devices that share the batch of a concept."""
    return num_devices // math.gcd(num_concepts, num_devices)


class Placement:
    """A mesh of devices and a way to run the step on it.

    Args:
      strategy: "pmap" or "mesh".
      num_concepts: N.
      batch_size: samples of each concept in a step, over all devices.
      devices: by default all devices of all processes. With others, such as those of a described
        TPU topology, the placement can only `lower`.

    Attributes:
      mesh: axes "concept" and "data".
      concept_shards, data_shards: the sizes of these axes.
      strategy, batch_size: as given.

    Raises:
      UserError: if the batch cannot be divided over the devices of a concept shard.
    """

    def __init__(
        self,
        strategy: str,
        num_concepts: int,
        batch_size: int,
        devices: Sequence[jax.Device] | None = None,
    ):
        if devices is None:
            processes = range(jax.process_count())
            devices = [d for p in processes for d in jax.local_devices(process_index=p)]
        # pmap numbers devices by process; on TPU pods `jax.devices()` has another order.
        devices = np.asarray(sorted(devices, key=lambda device: device.process_index))
        self.data_shards = devices_per_concept(num_concepts, devices.size)
        self.concept_shards = devices.size // self.data_shards
        if batch_size % self.data_shards:
            raise UserError(
                f"train.batch_size is {batch_size}, expected a multiple of {self.data_shards}:"
                f" {devices.size} devices and {num_concepts} concept(s) in {self.concept_shards}"
                f" shard(s) leave {self.data_shards} devices to share the batch of each concept;"
                " change the number of devices or, in a new workdir, train.batch_size"
            )
        shape = self.concept_shards, self.data_shards
        self.mesh = Mesh(devices.reshape(shape), ("concept", "data"))
        self.strategy = strategy
        self.batch_size = batch_size

    def replicate(self, tree: Any) -> Any:
        """Puts host arrays, such as the frozen parameters, on every device."""
        return self._place(tree, P())

    def place_by_device(self, tree: Any) -> Any:
        """Gives each device its part of host arrays, along their first axis."""
        return self._place(tree, _BY_DEVICE)

    def place_concepts(self, concepts: EmbeddedConcepts) -> EmbeddedConcepts:
        """Puts host arrays `(N, ...)` on the devices of their concepts, as `compile` needs them."""
        placed = self._place(concepts, _BY_CONCEPT)
        return placed if self.strategy == "mesh" else self._per_device(_stack, _BY_CONCEPT)(placed)

    def place_state(self, state: TrainState) -> TrainState:
        """Puts a host state, the same on all processes, on the mesh."""
        return jax.tree.map(self._place, state, _state_specs(state))

    def _place(self, tree: Any, spec: PartitionSpec) -> Any:
        def put(x):
            x = np.asarray(x)
            sharding = NamedSharding(self.mesh, spec)
            return jax.make_array_from_callback(x.shape, sharding, x.__getitem__)

        return jax.tree.map(put, tree)

    def fetch(self, tree: Any) -> Any:
        """Host arrays of a tree on the mesh, whole on every process."""
        if jax.process_count() > 1:
            return multihost_utils.process_allgather(tree, tiled=True)
        return jax.tree.map(np.asarray, tree)

    def abstract(self, state: TrainState) -> TrainState:
        """Shapes, dtypes and shardings of a state on the mesh, for restoring one."""
        return jax.tree.map(self._placed_shape, state, _state_specs(state))

    def init_state(self, init: Callable[..., TrainState], *args: Any) -> TrainState:
        """The state that a pure `init` gives of host arrays, the same on all processes.

        Each device makes its own part.
        """
        shardings = jax.tree.map(lambda x: x.sharding, self.abstract(jax.eval_shape(init, *args)))
        return jax.jit(init, out_shardings=shardings)(*args)

    def compile(self, step: Callable) -> Callable:
        """The step on all devices; its first call compiles it.

        Args:
          step: `step(state, frozen, concepts, sample_ids, average=...) -> (state, metrics)`.

        Returns:
          `f(state, frozen, concepts) -> (state, metrics)` on placed arrays. It may donate the
          state's buffers.
        """
        sample_ids = self._place(np.arange(self.batch_size, dtype=np.int32), P("data"))
        if self.strategy == "mesh":
            mapped = self._shard_mapped(step)
            return lambda state, frozen, concepts: mapped(state, frozen, concepts, sample_ids)

        mapped = self._pmapped(step)
        sample_ids = self._per_device(_stack, P("data"))(sample_ids)
        stack_state = self._per_device(_stack, _STATE)
        unstack = self._per_device(_unstack, _BY_DEVICE, (_STATE, _BY_CONCEPT))

        def run(state, frozen, concepts):
            stacked = stack_state(state)
            jax.tree.map(lambda x: x.delete(), state)  # "mesh" donates it
            results = mapped(stacked, frozen, concepts, sample_ids)
            return unstack(jax.tree.map(self._global, results))

        return run

    def lower(
        self, step: Callable, state: TrainState, frozen: Any, concepts: EmbeddedConcepts
    ) -> jax.stages.Lowered:
        """Lowers the program of `compile` from shapes, to be compiled ahead of time.

        `concepts` are the shapes of the host arrays, `(N, ...)`.
        """
        ids = jax.ShapeDtypeStruct((self.batch_size,), np.int32)
        mesh = self.strategy == "mesh"
        mapped = self._shard_mapped(step) if mesh else self._pmapped(step)
        shape = self._placed_shape if mesh else self._stacked_shape
        return mapped.lower(
            jax.tree.map(shape, state, _state_specs(state)),
            jax.tree.map(lambda x: self._placed_shape(x, P()), frozen),
            jax.tree.map(lambda x: shape(x, _BY_CONCEPT), concepts),
            shape(ids, P("data")),
        )

    def _shard_mapped(self, step: Callable) -> Callable:
        mapped = jax.shard_map(
            partial(step, average=partial(jax.lax.pmean, axis_name="data")),
            mesh=self.mesh,
            in_specs=(_STATE, P(), _BY_CONCEPT, P("data")),
            out_specs=(_STATE, _BY_CONCEPT),
            check_vma=False,
        )
        return jax.jit(mapped, donate_argnums=0)

    def _pmapped(self, step: Callable) -> Callable:
        """Takes and gives arrays `(devices, ...)`, but for the frozen parameters."""
        groups = np.arange(self.mesh.size).reshape(self.mesh.devices.shape).tolist()
        average = partial(jax.lax.pmean, axis_name="device", axis_index_groups=groups)
        return jax.pmap(
            partial(step, average=average),
            axis_name="device",
            in_axes=(0, None, 0, 0),
            devices=self.mesh.devices.ravel().tolist(),
            donate_argnums=0,
        )

    def _per_device(self, function: Callable, specs: Any, out_specs: Any = _BY_DEVICE) -> Callable:
        """`function` of a tree, run by each device on its own part."""
        options = {"in_specs": (specs,), "out_specs": out_specs, "check_vma": False}
        return jax.jit(jax.shard_map(function, mesh=self.mesh, **options))

    def _global(self, x: jax.Array) -> jax.Array:
        """Joins the parts of pmap's result that the processes have to a global array."""
        sharding = NamedSharding(self.mesh, _BY_DEVICE)
        shards = [shard.data for shard in x.addressable_shards]
        shape = self.mesh.size, *x.shape[1:]
        return jax.make_array_from_single_device_arrays(shape, sharding, shards)

    def _placed_shape(self, x: Any, spec: PartitionSpec) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(self.mesh, spec))

    def _stacked_shape(self, x: Any, spec: PartitionSpec) -> jax.ShapeDtypeStruct:
        shard = NamedSharding(self.mesh, spec).shard_shape(x.shape)
        return jax.ShapeDtypeStruct((self.mesh.size, *shard), x.dtype)


def _stack(tree: Any) -> Any:
    return jax.tree.map(lambda x: x[None], tree)


def _unstack(tree: Any) -> Any:
    return jax.tree.map(lambda x: x[0], tree)


def _state_specs(state: TrainState) -> TrainState:
    """`_STATE`, leaf by leaf."""
    return jax.tree.map(lambda spec, part: jax.tree.map(lambda _: spec, part), _STATE, state)
