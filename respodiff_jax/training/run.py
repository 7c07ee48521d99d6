"""`respodiff train`: from a config to checkpoints, pictures and an adapter."""

import dataclasses
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import jax
from etils import epath
from ml_collections import ConfigDict

from respodiff_jax.adapters import Adapter, check_fits, load_adapter
from respodiff_jax.adapters.card import export_adapter
from respodiff_jax.backbone import load_backbone
from respodiff_jax.errors import UserError
from respodiff_jax.generation.sampling import make_sampler
from respodiff_jax.method.concepts import Concept
from respodiff_jax.method.diffusion import Schedule
from respodiff_jax.method.modules import MidBlockModule
from respodiff_jax.method.objective import ConceptArrays, concept_arrays
from respodiff_jax.method.train_step import (
    Metrics,
    Recipe,
    TrainState,
    init_state,
    start_from,
    train_step,
)
from respodiff_jax.storage import is_remote, open_path
from respodiff_jax.training.checkpoint import (
    Checkpoints,
    RunRecord,
    check_same_config,
    make_adapter,
)
from respodiff_jax.training.config import concepts_from, validate
from respodiff_jax.training.distributed import Preemption
from respodiff_jax.training.monitoring import Profiler, RunLog, ValidationGrids, newest_grids
from respodiff_jax.training.parallel import Placement, make_placement
from respodiff_jax.training.waves import Wave, gather_outcomes, plan_waves, write_plan


def train(config: ConfigDict, workdir: str, *, profile: bool = False) -> None:
    """Trains the config's concepts, continuing where the working directory stands.

    More concepts than `train.concepts_per_device` allows at a time are trained in waves
    (`training.waves`). SIGTERM saves and returns; calling again continues bit for bit. A
    concept whose loss is no longer finite is dropped and told of; the others go on.

    Args:
      config: as from `respodiff_jax.training.config.load_config`.
      workdir: directory of the run, made if needed.
      profile: also write a trace of a few steps to `workdir/profile`.

    Raises:
      UserError: for what the user can mend: config, devices, directory, model.
      FloatingPointError: if every concept has diverged, naming steps and concepts. What was saved
        before stays.
    """
    validate(config)
    workdir = _writable(workdir)
    waves = plan_waves(workdir, config, jax.device_count())
    placement = make_placement(
        config.parallel.strategy, waves[0].size, config.train.batch_size, config.parallel.fsdp
    )
    for wave in waves:
        check_same_config(wave.config, wave.folder)
    to_do = [wave for wave in waves if not (wave.label and wave.is_done)]
    if to_do:
        begun = next(filter(None, (RunRecord.read(wave.folder) for wave in waves)), None)
        job = _Job(config, concepts_from(config), to_do, placement, begun)
        if jax.process_index() == 0:
            write_plan(workdir, waves)
            gather_outcomes(workdir, waves)
        with Preemption() as preemption:
            for wave in to_do:
                if not job.run(wave, preemption, profile and wave is to_do[0]):
                    return
                if jax.process_index() == 0:
                    gather_outcomes(workdir, [wave])
    else:
        _say(f"all {len(waves)} waves are done: nothing left to train")
    if jax.process_index() == 0:
        _report(gather_outcomes(workdir, waves), workdir)


class _Job:
    """What the waves share: the frozen model on the devices, and the compiled step.

    Args:
      config: of the job.
      concepts: of all waves.
      waves: to run; of one size.
      placement: of such a wave on the devices.
      begun: the record of a wave that has been begun, or None.

    Raises:
      UserError: for all that can be wrong, before the weights are read.
    """

    def __init__(
        self,
        config: ConfigDict,
        concepts: Sequence[Concept],
        waves: Sequence[Wave],
        placement: Placement,
        begun: RunRecord | None,
    ):
        self.config, self.placement = config, placement
        open_model = partial(
            load_backbone,
            config.model.name,
            variant=config.model.variant,
            dtype=config.model.dtype,
            attention=config.model.attention,
        )
        _say(f"opening {config.model.name}")
        # A job goes on with the commit that it began with, wherever the branch is now.
        revision = (begun and begun.backbone["revision"]) or config.model.revision
        self.sketch = open_model(revision=revision, abstract=True)
        self.resolution = config.model.resolution or self.sketch.default_resolution
        self.recipe = Recipe.from_config(config, self.sketch, self.resolution)
        sampler = None
        if config.log.grid_every:
            schedule = Schedule.from_config(self.sketch.scheduler_config, config.log.grid_steps)
            sampler = make_sampler(self.sketch, self.recipe.module, schedule)
        self.sketch.tokenise([prompt for concept in concepts for prompt in concept.prompts])
        for wave in waves:
            if of_wave := RunRecord.read(wave.folder):
                self._record(wave).check_continues(of_wave, wave.folder)
        self.start = None
        if config.train.init_adapter is not None:
            self.start = load_adapter(config.train.init_adapter)
            check_fits(self.start, self.sketch, self.resolution)
            _check_start(self.start, concepts, self.recipe.module)

        _say("loading the weights")
        backbone = open_model(revision=self.sketch.identity["revision"])
        self.most_neutral = max(len(concept.neutral_prompts) for concept in concepts)
        parts = ("unet", "vae") if sampler else ("unet",)
        self.frozen = placement.place_frozen({part: backbone.params[part] for part in parts})
        # The host keeps the text encoders alone.
        texts = {k: v for k, v in backbone.params.items() if k.startswith("text_encoder")}
        self.backbone = dataclasses.replace(backbone, params=texts)
        recipe = placement.prepare(self.recipe)
        self.step = placement.compile(partial(train_step, recipe))
        self.sample = sampler and placement.compile_sampler(sampler)

    def _record(self, wave: Wave) -> RunRecord:
        trained_on = self.sketch.trained_at(self.resolution)
        return RunRecord.of(wave.config, wave.concepts, self.recipe.module, trained_on)

    def _newest_state(
        self, wave: Wave, arrays: ConceptArrays, checkpoints: Checkpoints
    ) -> TrainState:
        """The wave's last checkpoint, or its state before the first step; canonical."""
        names = self.start.names if self.start else ()
        rows = {n: names.index(c.name) for n, c in enumerate(wave.concepts) if c.name in names}

        def init(arrays, *trained):
            fresh = init_state(self.recipe, arrays, self.config.seed, self.config.train.batch_size)
            return start_from(fresh, [*rows], *trained) if trained else fresh

        args = (arrays,)
        if rows:
            chosen = [*rows.values()]
            args += jax.tree.map(lambda x: x[chosen], (self.start.ram, self.start.sam))
        restored = checkpoints.restore_latest(self.placement.abstract(jax.eval_shape(init, *args)))
        return self.placement.init_state(init, *args) if restored is None else restored

    def _grids(self, wave: Wave, arrays: ConceptArrays) -> ValidationGrids | None:
        if self.sample is None:
            return None
        return ValidationGrids(
            wave.folder,
            self.config.log,
            self.config.train.steps,
            self.sketch,
            self.sample,
            wave.concepts,
            arrays,
            self.resolution,
        )

    def run(self, wave: Wave, preemption: Preemption, profile: bool) -> bool:
        """Trains a wave to its end, or until the job is to stop; says whether it came to its end.

        It also ends when all its concepts have diverged.
        """
        config, workdir, placement = self.config, wave.folder, self.placement
        steps, record = config.train.steps, self._record(wave)
        workdir.mkdir(parents=True, exist_ok=True)
        arrays = concept_arrays(self.backbone, wave.filled_up, self.resolution, self.most_neutral)
        concepts = placement.place_concepts(arrays)
        grids = self._grids(wave, arrays)
        with Checkpoints(workdir, config.checkpoint.every, config.checkpoint.keep) as checkpoints:
            state = self._newest_state(wave, arrays, checkpoints)
            step = first_step = int(placement.fetch(state.step))
            if jax.process_index() == 0:
                record.write(workdir)
            state = placement.place_state(state)

            def fetch_adapter():
                """The modules as they are, and where concepts diverged; all processes take part."""
                trained = placement.canonical(state).concepts
                fields = trained.ram, trained.sam, trained.ema, trained.diverged_at
                fields = placement.fetch(fields)
                return make_adapter(record, *fields), fields[-1][: len(wave.concepts)]

            def draw_grids():
                adapter, _ = fetch_adapter()
                if adapter is not None and (step > first_step or grids.missing(step, adapter)):
                    grids.write(step, self.frozen, adapter, log)

            with (
                RunLog(
                    workdir, wave.concepts, config.train.batch_size, first_step, steps, wave.label
                ) as log,
                Profiler(workdir / "profile" if profile else None) as profiler,
            ):
                log.say(
                    f"{len(wave.concepts)} concept(s) on {jax.device_count()}"
                    f" {jax.devices()[0].platform} device(s): {placement.concept_shards} concept ×"
                    f" {placement.data_shards} data shard(s), {config.parallel.strategy}"
                )
                if step >= steps:
                    log.say(f"step {step} of {steps} is done: nothing left to train")
                else:
                    log.say(f"continuing at step {step}" if step else "compiling the step")
                if step and grids and grids.due(step):
                    draw_grids()  # which it did not, if it was stopped or killed at them
                pending: list[Metrics] = []
                stopped = False
                while step < steps and not stopped:
                    profiler.before_step(step - first_step)
                    state, metrics = self.step(state, self.frozen, concepts)
                    pending.append(metrics)
                    step += 1
                    # Two steps under way keep the devices busy; more would delay a stop.
                    jax.block_until_ready(pending[-3:-2])

                    stopped = preemption.reached()
                    last = step == steps or stopped
                    saving = last or checkpoints.due(step)
                    drawing = grids and grids.due(step) and not stopped
                    if saving or drawing or step % config.log.every == 0:
                        host_metrics = [placement.fetch(placement.canonical(m)) for m in pending]
                        pending.clear()
                        if log.write(step, host_metrics) == 0:
                            break
                    if saving:
                        checkpoints.save(step, placement.canonical(state))
                    if drawing:
                        draw_grids()
                if stopped:
                    log.say(f"stopped at step {step}, saved; run the same command to continue")
                    return False
                adapter, diverged_at = fetch_adapter()
                if jax.process_index() == 0:
                    if adapter is not None:
                        adapter = dataclasses.replace(adapter, training=record.summary(step))
                        export_adapter(adapter, workdir / "adapter", newest_grids(workdir))
                        log.say(f"adapter written to {workdir / 'adapter'}")
                    wave.write_outcomes(step, diverged_at)
        return True


def _report(outcomes: Sequence[Mapping[str, Any]], workdir: epath.Path) -> None:
    """Tells which concepts diverged.

    Raises:
      FloatingPointError: if all have.
    """
    diverged = [o for o in outcomes if o["diverged_at"] is not None]
    named = ", ".join(f"{o['name']!r} at step {o['diverged_at']}" for o in diverged)
    advice = (
        "In a new --workdir, lower the learning rates or the guidance of such concepts, or set"
        " optimizer.clip_norm"
    )
    if diverged and len(diverged) == len(outcomes):
        raise FloatingPointError(
            f"loss or module no longer finite: {named}; checkpoints in {workdir} are from before"
            f" and good. {advice}"
        )
    if len(outcomes) > 1:
        _say(f"{len(outcomes) - len(diverged)} of {len(outcomes)} concepts trained")
    if diverged:
        _say(f"dropped, loss or module no longer finite: {named}. {advice}")


def _say(text: str) -> None:
    if jax.process_index() == 0:
        print(text, flush=True)


def _writable(workdir: str) -> epath.Path:
    """Makes the directory and checks that it can be written to."""
    path = open_path(workdir)
    probe = path / f".write_probe_{jax.process_index()}"
    try:
        if not is_remote(workdir):  # there it would make the bucket
            path.mkdir(parents=True, exist_ok=True)
        probe.write_text("")
        probe.unlink(missing_ok=True)
    except Exception as e:  # gcsfs and Google's authentication raise kinds of their own
        raise UserError(
            f"workdir {workdir} cannot be written to ({getattr(e, 'strerror', None) or e}); give a"
            " directory that can"
        ) from e
    return path


def _check_start(adapter: Adapter, concepts: Sequence[Concept], module: MidBlockModule) -> None:
    """Checks that an adapter has one of the concepts at least, and modules of that architecture."""
    names = [concept.name for concept in concepts]
    if not set(names) & set(adapter.names):
        raise UserError(
            f"train.init_adapter has the concepts {', '.join(adapter.names)}, none of the config's"
            f" {', '.join(names)}; they are found by name: give a concept the"
            " adapter's, or leave train.init_adapter out"
        )
    ours, theirs = (
        jax.eval_shape(m.init_params, jax.random.key(0)) for m in (module, adapter.module)
    )
    if ours != theirs:
        raise UserError(
            f"train.init_adapter has {adapter.module.kind} modules with parameters {theirs}, the"
            f" config makes {module.kind} modules with {ours}; set module.kind and"
            " module.hidden_channels to the adapter's"
        )
