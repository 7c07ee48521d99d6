"""Orbax checkpoints of a run.

Checkpoints hold the training state: modules, optimisers, trajectories in flight, step and random
key; never a base weight. A checksum of each array is saved beside them and compared when they are
restored, because the files themselves notice only some kinds of damage.
"""

import functools
import json
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from jax.experimental import multihost_utils

from respodiff_jax.errors import UserError
from respodiff_jax.method.state import TrainState
from respodiff_jax.storage import checked, is_remote, open_path, parse_json

# What damaged files look like: missing, not UTF-8, not JSON, or one of these TensorStore statuses.
_DAMAGE = (FileNotFoundError, UnicodeDecodeError, json.JSONDecodeError)
_DAMAGE_STATUSES = ("DATA_LOSS", "FAILED_PRECONDITION", "NOT_FOUND", "OUT_OF_RANGE")
_MACHINE_STATUSES = ("PERMISSION_DENIED", "RESOURCE_EXHAUSTED", "UNAUTHENTICATED", "UNAVAILABLE")


class Checkpoints:
    """The checkpoints in a run's working directory, saved asynchronously.

    Only the newest `keep` stay; None keeps all. `create` makes the directory if it does not exist.
    """

    def __init__(self, workdir: epath.PathLike, keep: int | None = None, create: bool = True):
        # `resolve` would take a URL for a relative path.
        path = open_path(workdir) if is_remote(workdir) else epath.Path(workdir).resolve()
        self.directory = path / "checkpoints"
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, create=create)
        try:
            self._manager = ocp.CheckpointManager(
                self.directory, options=options, item_handlers=ocp.StandardCheckpointHandler()
            )
        except (ValueError, TypeError, LookupError) as error:  # in one checkpoint's own record
            raise UserError(
                f"the checkpoints in {self.directory} cannot be opened: {_first_line(error)}; move"
                " the one away whose _CHECKPOINT_METADATA is damaged"
            ) from error

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *exc) -> None:
        self._manager.close()  # waits for unfinished saves

    @property
    def steps(self) -> list[int]:
        """Steps saved, ascending."""
        return sorted(self._manager.all_steps())

    def save(self, step: int, state: TrainState) -> None:
        """Saves a state, unless that step is already saved."""
        if step not in self._manager.all_steps():
            self._manager.save(
                step,
                args=ocp.args.StandardSave(state),
                custom_metadata={"checksums": _checksums(state)},
                force=True,
            )

    def restore_latest(self, abstract: TrainState) -> TrainState | None:
        """The newest undamaged state, or None if none was saved.

        Newer, damaged ones are reported and moved to `damaged_checkpoints/` of the working
        directory. Errors of the machine are raised, and those of this package: what fails for
        every checkpoint. `abstract` has shapes, dtypes and shardings of the state.

        Raises:
          UserError: if every checkpoint is damaged. They stay where they are.
        """
        damaged: dict[int, Exception | None] = {}
        for step in reversed(self.steps):
            state, error = None, None
            try:
                state = self._restore(step, abstract)
            except Exception as e:
                _raise_if_of_machine(e)
                error = e
            if _all_processes(error is None):
                error = self._changed(step, state)
                if _all_processes(error is None):
                    _report(damaged)
                    self._set_aside(list(damaged))
                    return state
            damaged[step] = error
        if damaged:
            _raise_unless_damage(damaged)
            _report(damaged)
            raise UserError(
                f"all checkpoints {list(damaged)} in {self.directory} are damaged; they stay where"
                " they are: use another `workdir`"
            )
        return None

    def _restore(self, step: int, abstract: TrainState) -> TrainState:
        """A state as this process reads it. It does not wait for others, should it fail alone."""
        me = jax.process_index()
        alone = ocp.options.MultiprocessingOptions(
            primary_host=me, active_processes={me}, barrier_sync_key_prefix=f"process {me}"
        )
        handler = ocp.StandardCheckpointHandler(multiprocessing_options=alone)
        with ocp.Checkpointer(handler, multiprocessing_options=alone) as checkpointer:
            path = self.directory / str(step) / "default"
            return checkpointer.restore(path, args=ocp.args.StandardRestore(abstract))

    def _changed(self, step: int, state: Any) -> ValueError | None:
        """An error, if the values are not those that were saved; every process takes part."""
        found, file = _checksums(state), self.directory / str(step) / "_CHECKPOINT_METADATA"
        try:
            kept = parse_json(file.read_bytes().decode(), str(file))["custom_metadata"]
            if not kept:
                return None  # saved by a version without checksums
            saved = checked(dict[str, int], kept["checksums"], str(file))
        except (OSError, ValueError, LookupError, TypeError) as error:
            return ValueError(f"DATA_LOSS: its checksums cannot be read: {_first_line(error)}")
        if saved == found:
            return None
        changed = [name for name in found if saved.get(name) != found[name]]
        return ValueError(f"DATA_LOSS: values of {', '.join(changed)[:200]} have changed")

    def restore_host(self, step: int | None = None) -> tuple[int, dict[str, Any]]:
        """A saved step, by default the newest undamaged one, and its state on the host, as dicts.

        Raises:
          UserError: if there is no such step, or it is damaged.
        """
        if not self.steps:
            raise UserError(f"{self.directory} holds no checkpoint; has the run saved one yet?")
        if step is not None and step not in self.steps:
            raise UserError(f"{self.directory} holds no step {step}, only {self.steps}")
        damaged: dict[int, Exception | None] = {}
        for candidate in reversed(self.steps) if step is None else [step]:
            try:
                state = self._restore_host(candidate)
                error = self._changed(candidate, state)
            except Exception as e:
                _raise_if_of_machine(e)
                error = e
            if error is None:
                _report(damaged)
                return candidate, jax.tree.map(np.asarray, state)
            damaged[candidate] = error
        _raise_unless_damage(damaged)
        _report(damaged)
        raise UserError(
            f"all tried checkpoints in {self.directory} are damaged: {step or self.steps}"
        )

    def _restore_host(self, step: int) -> dict[str, Any]:
        device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        metadata = self._manager.item_metadata(step)
        abstract = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device), metadata
        )
        return self._manager.restore(step, args=ocp.args.StandardRestore(abstract))

    def _set_aside(self, steps: Sequence[int]) -> None:
        """Moves damaged checkpoints away, so that later steps can be saved in their place."""
        if steps and jax.process_index() == 0:
            damaged = self.directory.parent / "damaged_checkpoints"
            damaged.mkdir(parents=True, exist_ok=True)
            # A folder of a bucket exists only with a file in it.
            (damaged / "README").write_text("Checkpoints that could not be read.\n")
            for step in steps:
                (self.directory / str(step)).replace(damaged / str(step))
        _all_processes(True)  # a barrier: no process continues before they are moved
        self._manager.reload()


def _checksums(state: Any) -> dict[str, int]:
    """A checksum of each array of a state, by its name; the same on any devices.

    The devices compute it, so only a number for each array leaves them.
    """
    leaves = jax.tree_util.tree_leaves_with_path(state)
    names = [jax.tree_util.keystr(path, simple=True, separator=".") for path, _ in leaves]
    arrays = [leaf for _, leaf in leaves]
    mesh = getattr(arrays[0].sharding, "mesh", None)
    everywhere = mesh and jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    values = jax.device_get(_sums_on(everywhere)(arrays))
    return dict(zip(names, map(int, values), strict=True))


@functools.cache
def _sums_on(sharding: jax.sharding.Sharding | None) -> Any:
    return jax.jit(lambda arrays: [_weighted_sum(x) for x in arrays], out_shardings=sharding)


def _weighted_sum(x: jax.Array) -> jax.Array:
    """The sum of an array's bits, element i times 2i + 1, modulo 2^32.

    The factors are odd, so a flipped bit always changes the sum. Integers have the same sum in any
    order.
    """
    unsigned = jnp.dtype(f"uint{8 * x.dtype.itemsize}")
    bits = x if x.dtype == bool else jax.lax.bitcast_convert_type(x, unsigned)
    index = jnp.zeros(x.shape, jnp.uint32)
    for axis, size in enumerate(x.shape):
        index = index * jnp.uint32(size) + jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis)
    return jnp.sum(bits.astype(jnp.uint32) * (2 * index + 1), dtype=jnp.uint32)


def _raise_if_of_machine(error: Exception) -> None:
    """Raises an error that says nothing about the files: memory, permission, network."""
    of_machine = isinstance(error, MemoryError) or (
        isinstance(error, OSError) and not isinstance(error, FileNotFoundError)
    )
    if of_machine or str(error).startswith(_MACHINE_STATUSES):
        raise error


def _raise_unless_damage(errors: Mapping[int, Exception | None]) -> None:
    """Raises the first error that is not known to come from damage.

    A changed byte in a checkpoint's own JSON may raise any error in Orbax. Where another
    checkpoint can be read, such an error is damage as well; where none can, it may be a fault of
    this package.
    """
    for error in errors.values():
        if error is not None and not _is_damage(error):
            raise error


def _report(damaged: Mapping[int, Exception | None]) -> None:
    for step, error in damaged.items():
        reason = _first_line(error) if error else "on another process"
        print(f"checkpoint {step} is damaged ({reason}); trying an older one", flush=True)


def _is_damage(error: BaseException | None) -> bool:
    """Whether an error of reading a checkpoint, or what caused it, comes from damaged files."""
    while error is not None:
        if isinstance(error, _DAMAGE) or str(error).startswith(_DAMAGE_STATUSES):
            return True
        error = error.__cause__ or error.__context__
    return False


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]


def _all_processes(ok: bool) -> bool:
    """Whether `ok` holds on all processes; a barrier."""
    if jax.process_count() == 1:
        return ok
    return bool(multihost_utils.process_allgather(np.int32(ok)).all())
