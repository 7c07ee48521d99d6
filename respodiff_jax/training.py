"""`respodiff train`: from a config to checkpoints, pictures and an adapter."""

import dataclasses
from collections.abc import Sequence
from functools import partial

import jax
from etils import epath
from ml_collections import ConfigDict

from respodiff_jax.adapter_card import export_adapter
from respodiff_jax.adapters import Adapter, check_fits, load_adapter
from respodiff_jax.backbone import load_backbone
from respodiff_jax.checkpoint import (
    Checkpoints,
    Preemption,
    RunRecord,
    check_same_config,
    make_adapter,
)
from respodiff_jax.concepts import Concept
from respodiff_jax.config import concepts_from, validate
from respodiff_jax.diffusion import Schedule
from respodiff_jax.modules import MidBlockModule
from respodiff_jax.monitoring import Profiler, RunLog, ValidationGrids, newest_grids
from respodiff_jax.objective import concept_arrays
from respodiff_jax.parallel import make_placement
from respodiff_jax.train_step import Metrics, Recipe, init_state, start_from, train_step


def train(config: ConfigDict, workdir: str, *, profile: bool = False) -> None:
    """Trains the config's concepts, continuing where the working directory stands.

    SIGTERM saves and returns; calling again continues bit for bit.

    Args:
      config: as from `respodiff_jax.config.load_config`.
      workdir: directory of the run, made if needed.
      profile: also write a trace of a few steps to `workdir/profile`.

    Raises:
      ValueError: for what the user can mend: config, devices, directory, model.
      FloatingPointError: if a loss or a module is no longer finite, naming step and concept. What
        was saved before stays.
    """
    validate(config)
    concepts = concepts_from(config)
    batch_size = config.train.batch_size
    placement = make_placement(
        config.parallel.strategy, len(concepts), batch_size, config.parallel.fsdp
    )
    workdir = _writable(workdir)
    check_same_config(config, workdir)

    saved = RunRecord.read(workdir)

    # All that can be wrong is looked for before the weights are read.
    open_model = partial(
        load_backbone,
        config.model.name,
        # A run goes on with the commit that it began with, wherever the branch is now.
        revision=config.model.revision or (saved and saved.backbone["revision"]),
        variant=config.model.variant,
        dtype=config.model.dtype,
    )
    _say(f"opening {config.model.name}")
    sketch = open_model(abstract=True)
    resolution = config.model.resolution or sketch.default_resolution
    recipe = Recipe.from_config(config, concepts, sketch, resolution)
    if config.log.grid_every:
        Schedule.from_config(sketch.scheduler_config, config.log.grid_steps)
    sketch.tokenise([prompt for concept in concepts for prompt in concept.prompts])
    identity = sketch.identity | {
        "resolution": resolution,
        "prediction_type": recipe.schedule.prediction_type,
    }
    record = RunRecord.of(config, concepts, recipe.module, identity)
    if saved:
        record.check_continues(saved, workdir)
    start = None
    if config.train.init_adapter is not None:
        start = load_adapter(config.train.init_adapter)
        check_fits(start, sketch, resolution)
        _check_start(start, concepts, recipe.module)

    _say("loading the weights")
    backbone = open_model()
    arrays = concept_arrays(backbone, concepts, resolution)
    parts = ("unet", "vae") if config.log.grid_every else ("unet",)
    frozen = placement.place_frozen({part: backbone.params[part] for part in parts})
    del backbone  # its host copy of the weights
    placed_concepts = placement.place_concepts(arrays)
    step_fn = placement.compile(partial(train_step, placement.prepare(recipe)))

    with (
        Checkpoints(workdir, config.checkpoint.every, config.checkpoint.keep) as checkpoints,
        Preemption() as preemption,
    ):
        fresh = init_state(recipe, arrays, config.seed, batch_size)
        if start is not None:
            fresh = start_from(fresh, concepts, start)
        restored = checkpoints.restore_latest(placement.abstract(fresh))
        state = placement.to_canonical_devices(fresh) if restored is None else restored
        del fresh, restored
        step = first_step = int(placement.fetch(state.step))
        if jax.process_index() == 0:
            record.write(workdir)
        state = placement.place_state(state)
        grids = None
        if config.log.grid_every:
            grids = ValidationGrids(
                workdir, config.log, sketch, placement, recipe.module, concepts, arrays, resolution
            )

        def adapter_now():
            """The modules as they are; all processes take part."""
            trained = placement.canonical(state).concepts
            return make_adapter(record, *placement.fetch((trained.ram, trained.sam, trained.ema)))

        with (
            RunLog(workdir, concepts, batch_size, first_step, config.train.steps) as log,
            Profiler(workdir / "profile" if profile else None) as profiler,
        ):
            log.say(
                f"{len(concepts)} concept(s) on {jax.device_count()} {jax.devices()[0].platform}"
                f" device(s): {placement.concept_shards} concept × {placement.data_shards} data"
                f" shard(s), {config.parallel.strategy}"
            )
            if step >= config.train.steps:
                log.say(f"step {step} of {config.train.steps} is done: nothing left to train")
            else:
                log.say(f"continuing at step {step}" if step else "compiling the step")
            pending: list[Metrics] = []
            stopped = False
            while step < config.train.steps and not stopped:
                profiler.before_step(step - first_step)
                state, metrics = step_fn(state, frozen, placed_concepts)
                pending.append(metrics)
                step += 1
                # Two steps under way keep the devices busy; more would delay a stop.
                jax.block_until_ready(pending[-3:-2])

                stopped = preemption.reached(step)
                last = step == config.train.steps or stopped
                saving = last or checkpoints.due(step)
                drawing = grids and (last or step % config.log.grid_every == 0) and not stopped
                if saving or drawing or step % config.log.every == 0:
                    host_metrics = [placement.fetch(placement.canonical(m)) for m in pending]
                    pending.clear()
                    log.write(step, host_metrics)
                    _check_finite(host_metrics[-1], concepts, workdir)
                if saving:
                    checkpoints.save(step, placement.canonical(state))
                if drawing:
                    grids.write(step, frozen, adapter_now(), log)
            if stopped:
                log.say(f"stopped at step {step}, saved; run the same command to continue")
                return
            adapter = adapter_now()
            if jax.process_index() == 0:
                adapter = dataclasses.replace(adapter, training=record.summary(step))
                export_adapter(adapter, workdir / "adapter", newest_grids(workdir))
            log.say(f"adapter written to {workdir / 'adapter'}")


def _say(text: str) -> None:
    if jax.process_index() == 0:
        print(text, flush=True)


def _writable(workdir: str) -> epath.Path:
    """Makes the directory and checks that it can be written to."""
    path = epath.Path(workdir)
    probe = path / f".write_probe_{jax.process_index()}"
    try:
        path.mkdir(parents=True, exist_ok=True)
        probe.write_text("")
        probe.unlink(missing_ok=True)
    except OSError as e:
        raise ValueError(
            f"workdir {workdir} cannot be written to ({e.strerror or e}); give a directory that can"
        ) from e
    return path


def _check_start(adapter: Adapter, concepts: Sequence[Concept], module: MidBlockModule) -> None:
    """Checks that an adapter has one of the concepts at least, and modules of that architecture."""
    names = [concept.name for concept in concepts]
    if not set(names) & set(adapter.names):
        raise ValueError(
            f"train.init_adapter has the concepts {', '.join(adapter.names)}, none of the config's"
            f" {', '.join(names)}; they are found by name"
        )
    ours, theirs = (
        jax.eval_shape(m.init_params, jax.random.key(0)) for m in (module, adapter.module)
    )
    if ours != theirs:
        raise ValueError(
            f"train.init_adapter has {adapter.module.kind} modules with parameters {theirs}, the"
            f" config makes {module.kind} modules with {ours}; set module.kind and"
            " module.hidden_channels to the adapter's"
        )


def _check_finite(metrics: Metrics, concepts, workdir: epath.Path) -> None:
    diverged = [
        f"{concept.name!r} at step {int(step)}"
        for concept, step in zip(concepts, metrics.diverged_at, strict=True)
        if step >= 0
    ]
    if diverged:
        raise FloatingPointError(
            f"loss or module no longer finite: {', '.join(diverged)}; checkpoints in {workdir} are"
            " from before and good. In a new --workdir, lower that concept's learning rates or its"
            " guidance, or set optimizer.clip_norm"
        )
