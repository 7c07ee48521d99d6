"""Trained adapters: what a run has trained so far, and adapters from wherever they are."""

import dataclasses
import re
from collections.abc import Sequence

import jax
import numpy as np
import optax
from etils import epath

from respodiff_jax import adapters
from respodiff_jax.adapters import Adapter, combine, select
from respodiff_jax.adapters.combined import check_once
from respodiff_jax.errors import UserError
from respodiff_jax.method.modules import Params
from respodiff_jax.storage import open_path
from respodiff_jax.training.checkpoint import Checkpoints
from respodiff_jax.training.outcomes import OUTCOMES_FILE, has_waves, read_outcomes
from respodiff_jax.training.reading import load_reading, with_reading
from respodiff_jax.training.record import RUN_FILE, RunRecord, is_workdir


def load_adapter(
    source: epath.PathLike, step: int | None = None, only: Sequence[str] = ()
) -> Adapter:
    """Reads an adapter.

    Args:
      source: a training's working directory, of one run or of several waves; an adapter
        directory; or "owner/name" or "owner/name@revision" on the Hugging Face hub.
      step: a saved step of a single run; None is the newest.
      only: names of the concepts to take; () takes all.

    Raises:
      UserError: if there is no adapter, it is damaged, or it lacks a concept or step.
    """
    only = [only] if isinstance(only, str) else list(only or ())
    step = None if step is None else int(step)
    check_once(only)
    if step is None and has_waves(source):
        return _waves_adapter(source, only)
    adapter = _open_whole(source, step)
    return select(adapter, only) if only else adapter


def _open_whole(source: epath.PathLike, step: int | None) -> Adapter:
    if is_workdir(source):
        return _run_adapter(source, step)
    if step is not None:
        raise UserError(
            f"`step` is for a single run's working directory, but {source} has no {RUN_FILE}"
        )
    hub_id = re.fullmatch(r"([\w.-]+/[\w.-]+?)(?:@(\S+))?", str(source))
    if hub_id and not open_path(source).exists():
        from respodiff_jax.adapters.hub import fetch

        return adapters.load_adapter(fetch(*hub_id.groups()))
    return adapters.load_adapter(source)


def _run_adapter(workdir: epath.PathLike, step: int | None) -> Adapter:
    """The adapter that a run has trained so far: its moving average, if it keeps one."""
    record = RunRecord.read(workdir)
    with Checkpoints(workdir, create=False) as checkpoints:
        step, state = checkpoints.restore_host(step)
    state = state["concepts"]
    ema = None if state["ema"] is None else optax.EmaState(**state["ema"])
    adapter = make_adapter(record, state["ram"], state["sam"], ema, state["diverged_at"])
    if adapter is None:
        raise UserError(f"{workdir}: every concept diverged, there is nothing to use")
    adapter = with_reading(adapter, load_reading(workdir), record.adapter_concepts)
    return dataclasses.replace(adapter, training=record.summary(step))


def _waves_adapter(workdir: epath.PathLike, only: Sequence[str]) -> Adapter:
    """The adapter of the concepts that the finished waves have trained."""
    outcomes = {outcome["name"]: outcome for outcome in read_outcomes(workdir)}
    if not outcomes:
        raise UserError(f"no wave of {workdir} has finished yet: continue the training")
    for name in only:
        if name not in outcomes:
            raise UserError(
                f"{workdir} has no concept {name!r} yet, see its {OUTCOMES_FILE}; continue the"
                " training, or choose one of these"
            )
        if outcomes[name]["adapter"] is None:
            raise UserError(
                f"{workdir}: concept {name!r} diverged at step {outcomes[name]['diverged_at']};"
                " choose others, or train it again with lower learning rates"
            )
    wanted = [outcomes[name] for name in only] or [*outcomes.values()]
    folders = dict.fromkeys(o["adapter"] for o in wanted if o["adapter"] is not None)
    if not folders:
        raise UserError(
            f"{workdir}: all concepts of the finished waves diverged, see its {OUTCOMES_FILE};"
            " train again with lower learning rates"
        )
    found = combine([adapters.load_adapter(open_path(workdir) / folder) for folder in folders])
    return select(found, only) if only else found


def make_adapter(
    record: RunRecord,
    ram: Params,
    sam: Params,
    ema: optax.EmaState | None,
    diverged_at: np.ndarray,
) -> Adapter | None:
    """The adapter of a run's concepts that have not diverged; None if all have.

    Args:
      record: of the run, with N concepts.
      ram, sam, ema, diverged_at: these fields of its `ConceptState`, host arrays. Rows past N are
        copies that fill up the state.
    """
    rows = np.flatnonzero(diverged_at[: len(record.concepts)] < 0)
    if not len(rows):
        return None
    if ema is not None:
        # All concepts that have not diverged have counted the same number of steps.
        debiasing = 1 - record.config["optimizer"]["ema_decay"] ** int(ema.count[rows[0]])
        ram, sam = (jax.tree.map(lambda x: x / debiasing, tree) for tree in ema.ema)
    ram, sam = (jax.tree.map(lambda x: x[rows], tree) for tree in (ram, sam))
    return Adapter(
        concepts=tuple(record.adapter_concepts[row] for row in rows),
        module=record.adapter_module,
        ram=ram,
        sam=sam,
        backbone=dict(record.backbone),
    )
