"""The working directory of a run: what it is (`run.json`) and where it stands (`checkpoints/`).

Checkpoints hold the training state, that is modules, optimisers, trajectories in flight, step and
random key, and never a base weight. `run.json` beside them holds the resolved config, the concepts
and the backbone's identity: a directory is only continued by the run that it belongs to.
"""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
import optax
import orbax.checkpoint as ocp
from etils import epath
from jax.experimental import multihost_utils
from ml_collections import ConfigDict

from respodiff_jax.adapters import Adapter
from respodiff_jax.errors import UserError
from respodiff_jax.method.concepts import Concept
from respodiff_jax.method.modules import MidBlockModule, Params
from respodiff_jax.method.train_step import TrainState
from respodiff_jax.storage import is_remote, open_path, write_whole

RUN_FILE = "run.json"

# Options that do not change what is trained; they may differ when a run is continued. (The concepts
# have taken what they needed of the defaults.)
_FREE_SECTIONS = ("parallel", "checkpoint", "log", "concept_defaults")

# What TensorStore's errors, all of one kind, say where a good checkpoint cannot be read now.
_NOT_NOW = (
    *("PERMISSION_DENIED", "UNAUTHENTICATED", "UNAVAILABLE", "DEADLINE_EXCEEDED", "ABORTED"),
    *("RESOURCE_EXHAUSTED", "CANCELLED"),
)


@dataclasses.dataclass(frozen=True)
class RunRecord:
    """What a working directory belongs to; `run.json`.

    Attributes:
      config: the resolved config.
      concepts: in the order of the state's concept axis.
      module: fields of the `MidBlockModule`.
      backbone: identity of the frozen model, resolution and prediction type.
    """

    config: Mapping[str, Any]
    concepts: Sequence[Mapping[str, Any]]
    module: Mapping[str, Any]
    backbone: Mapping[str, Any]

    @classmethod
    def of(
        cls,
        config: ConfigDict,
        concepts: Sequence[Concept],
        module: MidBlockModule,
        backbone: Mapping[str, Any],
    ) -> "RunRecord":
        module_fields = {
            "kind": module.kind,
            "mid_block_shape": list(module.mid_block_shape),
            "hidden_channels": module.hidden_channels,
        }
        record = cls(
            config.to_dict(), [c.to_dict() for c in concepts], module_fields, dict(backbone)
        )
        # As it will be read back: tuples become lists.
        return cls(**json.loads(json.dumps(dataclasses.asdict(record))))

    @classmethod
    def read(cls, workdir: epath.PathLike) -> "RunRecord | None":
        """The record of a directory, or None where there is none."""
        path = open_path(workdir) / RUN_FILE
        if not path.exists():
            return None
        try:
            return cls(**json.loads(path.read_text()))
        except (json.JSONDecodeError, TypeError) as e:
            raise UserError(f"{path} is not a run record that this version can read: {e}") from e

    def write(self, workdir: epath.PathLike) -> None:
        text = json.dumps(dataclasses.asdict(self), indent=2) + "\n"
        write_whole(epath.Path(workdir) / RUN_FILE, text)

    def summary(self, step: int) -> dict[str, Any]:
        """How an adapter of this run was trained, for its config."""
        config = self.config
        sections = {name: config[name] for name in ("rollout", "optimizer", "module")}
        return {
            "steps": step,
            "batch_size": config["train"]["batch_size"],
            "seed": config["seed"],
            "dtype": config["model"]["dtype"],
            "init_adapter": config["train"].get("init_adapter"),
        } | sections

    def check_continues(self, saved: "RunRecord", workdir: epath.PathLike) -> None:
        """Checks that this run may continue a saved one.

        Raises:
          UserError: listing each difference that changes what is trained.
        """
        ours = {"config": _binding(self.config), "module": self.module, "backbone": self.backbone}
        theirs = {
            "config": _binding(saved.config),
            "module": saved.module,
            "backbone": saved.backbone,
        }
        _check_equal(ours, theirs, workdir)


def check_same_config(config: ConfigDict, workdir: epath.PathLike) -> None:
    """Checks, before any model is loaded, that a directory is new or belongs to this config.

    Raises:
      UserError: listing each difference that changes what is trained.
    """
    if saved := RunRecord.read(workdir):
        ours = json.loads(json.dumps(config.to_dict()))
        _check_equal({"config": _binding(ours)}, {"config": _binding(saved.config)}, workdir)


def _binding(config: Mapping[str, Any]) -> dict[str, Any]:
    """The part of a config that must not change when a run is continued."""
    free = {"concepts_per_device", "remat"}
    if config["optimizer"]["lr_schedule"] == "constant":  # more steps then change none before
        free.add("steps")
    train = {k: v for k, v in config["train"].items() if k not in free}
    model = {k: v for k, v in config["model"].items() if k != "attention"}
    binding = {k: v for k, v in config.items() if k not in _FREE_SECTIONS}
    return binding | {"train": train, "model": model}


def _check_equal(ours: Mapping, theirs: Mapping, workdir: epath.PathLike) -> None:
    ours, theirs = _flatten(ours), _flatten(theirs)
    differences = [
        f"  {key}: {theirs.get(key, '(absent)')!r} there, {ours.get(key, '(absent)')!r} here"
        for key in sorted(ours.keys() | theirs.keys())
        if ours.get(key, "(absent)") != theirs.get(key, "(absent)")
    ]
    if differences:
        raise UserError(
            f"workdir {workdir} belongs to another run:\n"
            + "\n".join(differences)
            + "\nuse another --workdir, or the saved values to continue it"
        )


def _flatten(tree: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(tree, Mapping):
        return {prefix: tree}
    flat = {}
    for key, value in tree.items():
        flat |= _flatten(value, f"{prefix}.{key}" if prefix else key)
    return flat


class Checkpoints:
    """Orbax checkpoints of a run, saved asynchronously.

    Args:
      workdir: of the run, absolute or relative.
      every: save each time that this many steps are done.
      keep: how many to keep, the newest.
      create: the directory, if it is not there.
    """

    def __init__(
        self,
        workdir: epath.PathLike,
        every: int = 1,
        keep: int | None = None,
        create: bool = True,
    ):
        # `resolve` takes a URL for a relative path.
        path = open_path(workdir) if is_remote(workdir) else epath.Path(workdir).resolve()
        self.directory = path / "checkpoints"
        self._every = every
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, create=create)
        self._manager = ocp.CheckpointManager(
            self.directory, options=options, item_handlers=ocp.StandardCheckpointHandler()
        )

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *exc) -> None:
        self.close()

    def close(self) -> None:
        """Waits for a save under way."""
        self._manager.wait_until_finished()
        self._manager.close()

    @property
    def steps(self) -> list[int]:
        """Steps saved, ascending."""
        return sorted(self._manager.all_steps())

    def due(self, step: int) -> bool:
        """Whether the interval says to save after this step."""
        return step % self._every == 0

    def save(self, step: int, state: TrainState) -> None:
        """Saves a canonical state, unless that step is already there."""
        if step not in self._manager.all_steps():
            self._manager.save(step, args=ocp.args.StandardSave(state), force=True)

    def restore_latest(self, abstract: TrainState) -> TrainState | None:
        """The newest state that can be read, or None if none was saved.

        Newer ones that cannot are reported and moved to `damaged_checkpoints/` of the working
        directory.

        Raises:
          UserError: if there are checkpoints and none can be read; they stay where they are.
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
            print(f"checkpoint {step} is damaged ({reason}); trying the one before", flush=True)
            damaged.append(step)
        if damaged:
            raise UserError(
                f"none of the checkpoints {damaged} in {self.directory} can be read; were they"
                " written by another version? They stay where they are: use another --workdir"
            )
        return None

    def _restore(self, step: int, abstract: TrainState) -> TrainState:
        """A state as this process reads it. It waits for no other: where one cannot read its part,
        the others would not know what it waits for."""
        me = jax.process_index()
        alone = ocp.options.MultiprocessingOptions(
            primary_host=me, active_processes={me}, barrier_sync_key_prefix=f"process {me}"
        )
        handler = ocp.StandardCheckpointHandler(multiprocessing_options=alone)
        with ocp.Checkpointer(handler, multiprocessing_options=alone) as checkpointer:
            path = self.directory / str(step) / "default"
            return checkpointer.restore(path, args=ocp.args.StandardRestore(abstract))

    def restore_host(self, step: int | None = None) -> tuple[int, dict[str, Any]]:
        """A saved state as nested dicts of host arrays, and its step; the newest by default.

        Raises:
          UserError: if it is not there.
        """
        if not self.steps:
            raise UserError(f"{self.directory} holds no checkpoint; has the run saved one yet?")
        if step is not None and step not in self.steps:
            raise UserError(f"{self.directory} holds no step {step}, only {self.steps}")
        for candidate in reversed(self.steps) if step is None else [step]:
            try:
                return candidate, self._restore_host(candidate)
            except Exception as error:  # as in `restore_latest`, but nothing is moved
                if not _is_damage(error):
                    raise
                print(f"checkpoint {candidate} is damaged ({_first_line(error)})", flush=True)
        raise UserError(
            f"no checkpoint in {self.directory} can be read; tried {step or self.steps}"
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
        """Moves checkpoints out of the way of the steps to come."""
        if steps and jax.process_index() == 0:
            damaged = self.directory.parent / "damaged_checkpoints"
            damaged.mkdir(parents=True, exist_ok=True)
            # A folder of a bucket is only there with a file in it.
            (damaged / "README").write_text("Checkpoints that could not be read.\n")
            for step in steps:
                (self.directory / str(step)).replace(damaged / str(step))
        _all_processes(True)  # none goes on before they are moved
        self._manager.reload()


def _is_damage(error: Exception) -> bool:
    """Whether an error of reading a checkpoint is the checkpoint's; if not, the machine failed."""
    if isinstance(error, OSError):
        return isinstance(error, FileNotFoundError)
    # JAX's own is such as no memory left on a device.
    of_machine = isinstance(error, MemoryError | jax.errors.JaxRuntimeError)
    return not of_machine and not any(status in str(error) for status in _NOT_NOW)


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]


def _all_processes(ok: bool) -> bool:
    """Whether all processes say so; a barrier."""
    if jax.process_count() == 1:
        return ok
    return bool(multihost_utils.process_allgather(np.int32(ok)).all())


def adapter_from_workdir(workdir: epath.PathLike, step: int | None = None) -> Adapter:
    """The adapter that a run has trained so far: its moving average, where it keeps one.

    Args:
      workdir: of the run.
      step: a saved step; the newest by default.

    Raises:
      UserError: if the directory is not a run's or has no such checkpoint.
    """
    record = RunRecord.read(workdir)
    if record is None:
        raise UserError(f"{workdir} is not a training workdir: it has no run.json")
    with Checkpoints(workdir, create=False) as checkpoints:
        step, state = checkpoints.restore_host(step)
    state = state["concepts"]
    ema = None if state["ema"] is None else optax.EmaState(**state["ema"])
    adapter = make_adapter(record, state["ram"], state["sam"], ema, state["diverged_at"])
    if adapter is None:
        raise UserError(f"{workdir}: every concept diverged, there is nothing to use")
    return dataclasses.replace(adapter, training=record.summary(step))


def make_adapter(
    record: RunRecord,
    ram: Params,
    sam: Params,
    ema: optax.EmaState | None,
    diverged_at: np.ndarray,
) -> Adapter | None:
    """The adapter of a run's concepts that have not diverged; None if all have.

    Args:
      record: of the run.
      ram, sam, ema, diverged_at: host arrays, those fields of its `ConceptState`. Rows past the
        record's concepts are copies that fill up a wave.
    """
    rows = np.flatnonzero(diverged_at[: len(record.concepts)] < 0)
    if not len(rows):
        return None
    if ema is not None:
        # Those that have not diverged have counted the same steps.
        debiasing = 1 - record.config["optimizer"]["ema_decay"] ** int(ema.count[rows[0]])
        ram, sam = jax.tree.map(lambda x: x / debiasing, ema.ema)
    ram, sam = jax.tree.map(lambda x: x[rows], (ram, sam))
    return Adapter(
        concepts=tuple(Concept.from_dict(record.concepts[row]) for row in rows),
        module=MidBlockModule(
            **dict(record.module) | {"mid_block_shape": tuple(record.module["mid_block_shape"])}
        ),
        ram=ram,
        sam=sam,
        backbone=dict(record.backbone),
    )
