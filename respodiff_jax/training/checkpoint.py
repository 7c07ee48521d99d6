"""Orbax checkpoints of a run.

Checkpoints hold the training state: modules, optimisers, trajectories in flight, step and random
key; never a base weight.
"""

import json
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from jax.experimental import multihost_utils

from respodiff_jax.errors import UserError
from respodiff_jax.method.state import TrainState
from respodiff_jax.storage import is_remote, open_path

# What damaged files look like: missing, not UTF-8, not JSON, or one of these TensorStore statuses.
_DAMAGE = (FileNotFoundError, UnicodeDecodeError, json.JSONDecodeError)
_DAMAGE_STATUSES = ("DATA_LOSS", "FAILED_PRECONDITION", "NOT_FOUND", "OUT_OF_RANGE")


class Checkpoints:
    """The checkpoints in a run's working directory, saved asynchronously.

    Only the newest `keep` stay; None keeps all. `create` makes the directory if it does not exist.
    """

    def __init__(self, workdir: epath.PathLike, keep: int | None = None, create: bool = True):
        # `resolve` would take a URL for a relative path.
        path = open_path(workdir) if is_remote(workdir) else epath.Path(workdir).resolve()
        self.directory = path / "checkpoints"
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, create=create)
        self._manager = ocp.CheckpointManager(
            self.directory, options=options, item_handlers=ocp.StandardCheckpointHandler()
        )

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
            self._manager.save(step, args=ocp.args.StandardSave(state), force=True)

    def restore_latest(self, abstract: TrainState) -> TrainState | None:
        """The newest undamaged state, or None if none was saved.

        Newer, damaged ones are reported and moved to `damaged_checkpoints/` of the working
        directory. Every other error is raised: it is the machine's or this package's. `abstract`
        has shapes, dtypes and shardings of the state.

        Raises:
          UserError: if every checkpoint is damaged. They stay where they are.
        """
        damaged = []
        for step in reversed(self.steps):
            state, error = None, None
            try:
                state = self._restore(step, abstract)
            except Exception as e:
                if not _is_damage(e):
                    raise
                error = e
            if _all_processes(error is None):
                self._set_aside(damaged)
                return state
            reason = _first_line(error) if error else "on another process"
            print(f"checkpoint {step} is damaged ({reason}); trying an older one", flush=True)
            damaged.append(step)
        if damaged:
            raise UserError(
                f"all checkpoints {damaged} in {self.directory} are damaged; they stay where they"
                " are: use another `workdir`"
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

    def restore_host(self, step: int | None = None) -> tuple[int, dict[str, Any]]:
        """A saved step, by default the newest undamaged one, and its state on the host, as dicts.

        Raises:
          UserError: if there is no such step, or it is damaged.
        """
        if not self.steps:
            raise UserError(f"{self.directory} holds no checkpoint; has the run saved one yet?")
        if step is not None and step not in self.steps:
            raise UserError(f"{self.directory} holds no step {step}, only {self.steps}")
        for candidate in reversed(self.steps) if step is None else [step]:
            try:
                return candidate, self._restore_host(candidate)
            except Exception as error:
                if not _is_damage(error):
                    raise
                print(f"checkpoint {candidate} is damaged ({_first_line(error)})", flush=True)
        raise UserError(
            f"all tried checkpoints in {self.directory} are damaged: {step or self.steps}"
        )

    def _restore_host(self, step: int) -> dict[str, Any]:
        device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        metadata = self._manager.item_metadata(step)
        abstract = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device), metadata
        )
        state = self._manager.restore(step, args=ocp.args.StandardRestore(abstract))
        return jax.tree.map(np.asarray, state)

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
