"""One run: trains a set of concepts in its own folder, from its last checkpoint to the end."""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial

import jax
import numpy as np
from etils import epath
from ml_collections import ConfigDict

from respodiff_jax.adapters import Adapter, check_fits
from respodiff_jax.adapters.card import export_adapter
from respodiff_jax.backbone import Backbone
from respodiff_jax.backbone.memory import is_small, report_memory
from respodiff_jax.errors import Interrupted, UserError
from respodiff_jax.generation.limits import check_memory
from respodiff_jax.generation.sampling import make_sampler
from respodiff_jax.method.concepts import Concept
from respodiff_jax.method.embedding import EmbeddedConcepts, embed_concepts
from respodiff_jax.method.modules import MidBlockModule
from respodiff_jax.method.state import StepSpec, TrainState, init_state, start_from
from respodiff_jax.method.train_step import train_step
from respodiff_jax.training.checkpoint import Checkpoints
from respodiff_jax.training.distributed import Preemption
from respodiff_jax.training.grids import ValidationGrids, newest_grids
from respodiff_jax.training.memory import REMEDIES, training_bytes
from respodiff_jax.training.monitoring import Profiler, RunLog
from respodiff_jax.training.parallel import Placement
from respodiff_jax.training.reading import (
    TrainedReading,
    join,
    load_reading,
    train_reading,
    with_reading,
    write_reading,
)
from respodiff_jax.training.record import RunRecord
from respodiff_jax.training.spec import open_model, step_spec
from respodiff_jax.training.trained import load_adapter, make_adapter


@dataclasses.dataclass(frozen=True)
class Run:
    """Concepts that are trained together.

    Attributes:
      folder: working directory of the run.
      config: the training's config with only these concepts.
      concepts: N concepts.
      size: concepts in the training state, at least N; copies of the last concept fill it up.
      label: shown before the progress bar; "" for the only run of a training.
    """

    folder: epath.Path
    config: ConfigDict
    concepts: tuple[Concept, ...]
    size: int
    label: str = ""

    @property
    def filled_up(self) -> tuple[Concept, ...]:
        """The concepts of the training state."""
        return fill_up(self.concepts, self.size)


def fill_up(concepts: tuple[Concept, ...], size: int) -> tuple[Concept, ...]:
    """The concepts, followed by copies of the last one up to this size."""
    return concepts + concepts[-1:] * (size - len(concepts))


@dataclasses.dataclass(frozen=True, eq=False)
class Session:
    """What the runs of a training share: the model on the devices and the compiled programs.

    Attributes:
      model: the model with the parameters of its text encoders only, on the host.
      resolution: in pixels.
      max_neutral: the largest number of neutral prompts of a concept.
      spec, placement: the training step, and how a run is laid out on the devices.
      frozen: the parameters of UNet and VAE, on the devices.
      step: the training step on all devices, compiled at its first call.
      sample: the compiled sampler of the validation grids; None without grids.
      start: the adapter that concepts start from, or None.
      reading: concept -> its reading, on process 0; empty if none is trained.
    """

    model: Backbone
    resolution: int
    max_neutral: int
    spec: StepSpec
    placement: Placement
    frozen: dict
    step: Callable
    sample: Callable | None
    start: Adapter | None
    reading: Mapping[str, TrainedReading]


def open_session(
    config: ConfigDict, concepts: Sequence[Concept], runs: Sequence[Run], placement: Placement
) -> Session:
    """Checks the runs, then reads the model and puts it on the devices.

    Concepts and runs are those of the whole training, finished ones included.

    Raises:
      UserError: for every mistake in config, model, adapter or folders, before weights are read.
    """
    say(f"opening {config.model.name}")
    records = [RunRecord.read(run.folder) for run in runs]
    # A training continues with the model commit that it began with, even if the branch moved.
    begun = next((record.backbone["revision"] for record in records if record), None)
    model = open_model(config, revision=begun or config.model.revision, abstract=True)
    resolution = config.model.resolution or model.default_resolution
    spec = step_spec(config, model, resolution)
    # Each sample has a latent and its noise in float32.
    samples = max(run.size for run in runs) * config.train.batch_size
    what = f"train.batch_size={config.train.batch_size}"
    check_memory(what, 8 * samples * math.prod(spec.latent_shape))
    sample = None
    if config.log.grid_every:
        sample = make_sampler(model, (spec.module,), config.log.grid_steps, placement.mesh)
    prompts = [prompt for concept in concepts for prompt in concept.prompts]
    model.tokenise([*prompts, *config.log.grid_prompts])
    for run, record in zip(runs, records, strict=True):
        if record:
            make_record(run, spec, model, resolution).check_continues(record, run.folder)
    start = None
    if config.train.init_adapter is not None:
        start = load_adapter(config.train.init_adapter)
        check_fits(start, model, resolution)
        _check_start(start, concepts, spec.module)

    if not is_small(model.params):
        needed = training_bytes(config, model, spec, placement, concepts, runs[0].size)
        say(report_memory(needed, REMEDIES))
    say("loading the weights")
    params = model.loaded().params
    parts = ("unet", "vae") if sample else ("unet",)
    texts = {name: tree for name, tree in params.items() if name.startswith("text_encoder")}
    model = dataclasses.replace(model, params=texts, load=None)
    reading = {}
    if config.reading.train and jax.process_index() == 0:
        reading = train_reading(config, concepts, model, say)
    return Session(
        model=model,
        resolution=resolution,
        max_neutral=max(len(concept.neutral_prompts) for concept in concepts),
        spec=spec,
        placement=placement,
        frozen=placement.replicate({part: params[part] for part in parts}),
        step=placement.compile(partial(train_step, spec)),
        sample=sample,
        start=start,
        reading=reading,
    )


def make_record(run: Run, spec: StepSpec, model: Backbone, resolution: int) -> RunRecord:
    """Makes the record that is written to the run's folder."""
    return RunRecord.make(run.config, run.concepts, spec.module, model.trained_at(resolution))


def train_run(
    session: Session, run: Run, preemption: Preemption, profile: bool = False
) -> tuple[int, np.ndarray]:
    """Trains a run to its end, or until all of its concepts have diverged.

    The folder gets `run.json`, checkpoints, logs, grids and, at the end, the adapter; with
    `profile` also a trace of a few steps, in `profile/`. `preemption` says when to stop.

    Returns:
      The steps done, and int `(N,)`: for each concept the step at which it diverged, or -1.

    Raises:
      Interrupted: on SIGTERM, Ctrl-C or a preemption before the end; the state is saved.
    """
    config, placement, workdir = run.config, session.placement, run.folder
    steps = config.train.steps
    record = make_record(run, session.spec, session.model, session.resolution)
    workdir.mkdir(parents=True, exist_ok=True)
    embedded = embed_concepts(session.model, run.filled_up, session.resolution, session.max_neutral)
    concepts = placement.place_concepts(embedded)
    grids = session.sample and ValidationGrids(
        workdir,
        config,
        run.concepts,
        run.size,
        partial(session.model.encode_prompts, resolution=session.resolution),
        session.sample,
        placement,
        session.spec.latent_shape,
        session.resolution,
    )
    with Checkpoints(workdir, config.checkpoint.keep) as checkpoints:
        state = _newest_state(session, run, embedded, checkpoints)
        step = first_step = int(placement.fetch(state.step))
        if jax.process_index() == 0:
            record.write(workdir)
            readings = [session.reading[c.name] for c in run.concepts] if session.reading else []
            write_reading(workdir, join(readings) if readings else None)
        with (
            RunLog(
                workdir, run.concepts, config.train, first_step, placement.fetch, run.label
            ) as log,
            Profiler(workdir / "profile" if profile else None) as profiler,
        ):
            _say_start(log, session, run, step)
            if step and grids and grids.due(step):
                # The run may have been killed between saving and drawing.
                _draw(grids, session, record, state, log, only_missing=True)
            while step < steps:
                profiler.before_step(step - first_step)
                state, metrics = session.step(state, session.frozen, concepts)
                step += 1
                log.add(metrics)
                stopped = preemption.reached() and step < steps
                saving = stopped or step == steps or step % config.checkpoint.every == 0
                drawing = grids and grids.due(step) and not stopped
                logging = saving or drawing or step % config.log.every == 0
                if logging and log.write(step) == 0:
                    break
                if saving:
                    checkpoints.save(step, state)
                if drawing:
                    _draw(grids, session, record, state, log)
                if stopped:
                    raise Interrupted(f"stopped at step {step} of {steps}, saved", step)
            adapter, diverged_at = _fetch_adapter(session, record, state)
            if jax.process_index() == 0 and adapter is not None:
                adapter = dataclasses.replace(
                    with_reading(adapter, load_reading(workdir), run.concepts),
                    training=record.summary(step),
                )
                export_adapter(adapter, workdir / "adapter", newest_grids(workdir))
                log.say(f"adapter written to {workdir / 'adapter'}")
    return step, diverged_at


def _say_start(log: RunLog, session: Session, run: Run, step: int) -> None:
    placement, steps = session.placement, run.config.train.steps
    log.say(
        f"{len(run.concepts)} concept(s) on {jax.device_count()} {jax.devices()[0].platform}"
        f" device(s): {placement.concept_shards} concept × {placement.data_shards} data shard(s),"
        f" {placement.strategy}"
    )
    if step >= steps:
        log.say(f"step {step} of {steps} is done: nothing left to train")
    else:
        begin = f"continuing at step {step}" if step else "starting"
        # Measured (docs/performance.md): 25.6 s for Emoji World on one CPU core; for SD 1.4, 105 s
        # with an H200, and 7 minutes for a TPU on two CPU cores.
        expected = "about half a minute" if is_small(session.frozen) else "2 to 7 minutes"
        log.say(f"{begin}; the first step compiles: {expected}, less if it is in the cache")


def _newest_state(
    session: Session, run: Run, embedded: EmbeddedConcepts, checkpoints: Checkpoints
) -> TrainState:
    """The run's last checkpoint, or its state before the first step."""
    start, config = session.start, run.config
    names = start.names if start else ()
    rows = {n: names.index(c.name) for n, c in enumerate(run.concepts) if c.name in names}

    def init(embedded, *trained):
        fresh = init_state(session.spec, embedded, config.seed, config.train.batch_size)
        return start_from(fresh, [*rows], *trained) if trained else fresh

    args = (embedded,)
    if rows:
        chosen = [*rows.values()]
        args += jax.tree.map(lambda x: x[chosen], (start.ram, start.sam))
    placement = session.placement
    restored = checkpoints.restore_latest(placement.abstract(jax.eval_shape(init, *args)))
    return placement.init_state(init, *args) if restored is None else restored


def _fetch_adapter(
    session: Session, record: RunRecord, state: TrainState
) -> tuple[Adapter | None, np.ndarray]:
    """The adapter, or None if all concepts diverged, and `diverged_at` `(N,)`, on each process."""
    trained = state.concepts
    ram, sam, ema, diverged_at = session.placement.fetch(
        (trained.ram, trained.sam, trained.ema, trained.diverged_at)
    )
    return make_adapter(record, ram, sam, ema, diverged_at), diverged_at[: len(record.concepts)]


def _draw(
    grids: ValidationGrids,
    session: Session,
    record: RunRecord,
    state: TrainState,
    log: RunLog,
    only_missing: bool = False,
) -> None:
    """Draws the grids of a state's step, unless all concepts have diverged."""
    step = int(session.placement.fetch(state.step))
    adapter, _ = _fetch_adapter(session, record, state)
    if adapter is not None and (not only_missing or grids.missing(step, adapter)):
        grids.write(step, session.frozen, adapter, log)


def say(text: str) -> None:
    """Prints a line, on process 0."""
    if jax.process_index() == 0:
        print(text, flush=True)


def _check_start(adapter: Adapter, concepts: Sequence[Concept], module: MidBlockModule) -> None:
    """Checks that an adapter has at least one of the concepts, and the same architecture."""
    names = [concept.name for concept in concepts]
    if not set(names) & set(adapter.names):
        raise UserError(
            f"train.init_adapter has the concepts {', '.join(adapter.names)}, and none of the"
            f" config's: {', '.join(names)}; concepts are found by name: give a concept the"
            " adapter's name, or leave train.init_adapter out"
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
