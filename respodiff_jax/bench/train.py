"""`respodiff bench train`: a config's training step, compared with the published procedure."""

import dataclasses
import itertools
import random
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from respodiff_jax.bench import measure, published
from respodiff_jax.bench import model as model_lib
from respodiff_jax.bench.model import Setup
from respodiff_jax.bench.report import Report, Side
from respodiff_jax.method.embedding import EmbeddedConcepts
from respodiff_jax.method.rollout import last_loss_index
from respodiff_jax.method.state import StepSpec, TrainState
from respodiff_jax.method.train_step import Metrics, train_step
from respodiff_jax.training.parallel import Placement


def evaluations_per_sample(
    spec: StepSpec, state: TrainState, frozen: Any, arrays: EmbeddedConcepts, batch_size: int
) -> float:
    """The average number of UNet evaluations for a training sample.

    It is the FLOPs of a training step over those of one plain forward pass with the same batch.
    Arguments are those of `train_step`, or their shapes; `batch_size` is that of each concept.
    """
    ids = jax.ShapeDtypeStruct((batch_size,), jnp.int32)
    step = measure.flops(partial(train_step, spec), state, frozen, arrays, ids)
    prompt = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), arrays.empty)
    latents = jax.ShapeDtypeStruct((batch_size, *spec.latent_shape), jnp.float32)
    one = model_lib.forward_flops(spec, frozen, latents, prompt)
    counted = step / (arrays.guidance_scale.shape[0] * one)
    if not spec.rollout.has_loop:
        return counted
    # XLA counts a loop's body once. Each step of a faithful rollout is a guided prediction.
    guided = model_lib.forward_flops(spec, frozen, latents, prompt, prompts=2) / one
    return counted + guided * (last_loss_index(spec.schedule) / 2 - 1)


class _Ours:
    """The training step of `respodiff train`, on all devices."""

    def __init__(self, setup: Setup):
        config, self._setup = setup.config, setup
        self._placement = Placement(
            config.parallel.strategy, len(setup.concepts), config.train.batch_size
        )
        self._function = partial(train_step, setup.spec)
        self._frozen = self._placement.replicate(setup.frozen)
        self._concepts = self._placement.place_concepts(setup.arrays)
        self._state = self._placement.place_state(setup.state)
        self._starts = None
        if setup.spec.rollout.has_loop:
            longest = last_loss_index(setup.spec.schedule)
            self._starts = itertools.cycle(_balanced_steps(config.seed, longest))
        self.program()

    def program(self) -> Callable[[], Metrics]:
        """Makes a new program, not yet compiled; returns a function that takes one step."""
        self._step = self._placement.compile(self._function)
        return self._one

    def _one(self) -> Metrics:
        self._state, metrics = self._step(self._state, self._frozen, self._concepts)
        return metrics

    def take_pairs(self, count: int) -> None:
        """Takes `count` pairs of steps; each pair has the mean rollout length."""
        for _ in range(count):
            if self._starts is not None:
                step = self._state.step
                start = np.full(step.shape, next(self._starts), np.int32)
                self._state = self._state.replace(step=jax.device_put(start, step.sharding))
            self._one()
            self._one()
        jax.block_until_ready(self._state)

    def compile(self) -> jax.stages.Compiled:
        """Compiles the program ahead of time, for its memory analysis."""
        setup = self._setup
        shapes = jax.eval_shape(lambda *args: args, setup.state, setup.frozen, setup.arrays)
        return self._placement.lower(self._function, *shapes).compile()


def _balanced_steps(seed: int, longest: int) -> list[int]:
    """Training steps whose rollout and the next step's are together `longest` long."""
    # A step's time grows linearly with the length of its rollout, so each such pair of steps takes
    # the mean time, and few pairs are enough.

    def length(step):
        rollout_key, _ = jax.random.split(jax.random.fold_in(jax.random.key(seed), step))
        return jax.random.randint(rollout_key, (), 0, longest + 1)

    lengths = np.asarray(jax.vmap(length)(jnp.arange(50 * (longest + 1))))
    return np.flatnonzero(lengths[:-1] + lengths[1:] == longest).tolist()


def bench_train(config: ConfigDict, against_torch: bool, repeats: int) -> Report:
    """Measures the training step of a config; the arguments are those of `benchmark`.

    Raises:
      UserError: for a mistake in the config or the model, or if PyTorch is missing.
    """
    torch_side = model_lib.torch_side(against_torch)
    environment = model_lib.environment(against_torch)
    setup = Setup.of(config)
    ours = _Ours(setup)
    costs = measure.program_costs(ours.program, ours.compile)
    sides = {"ours": ours.take_pairs}
    if torch_side:
        training = published.make_training(setup)
        longest, rng = last_loss_index(setup.spec.schedule), random.Random(0)

        def theirs(count):
            for _ in range(count):
                length = rng.randint(0, longest)
                training.step(length)
                training.step(longest - length)
            torch_side.synchronise()

        sides["theirs"] = theirs
    best = measure.Peak(config.model.dtype)
    pairs = measure.take_turns(sides | best.sides, repeats)
    peak = best.to_dict(pairs)

    batch_size = config.train.batch_size
    prompt = jax.tree.map(lambda x: x[0], setup.arrays.empty)
    latents = jax.ShapeDtypeStruct((1, *setup.spec.latent_shape), jnp.float32)
    plain = model_lib.with_plain_attention(setup.backbone)
    # The plain model's FLOPs: all of fused attention's, and none that `train.remat` repeats.
    spec = dataclasses.replace(setup.spec, encode=plain.encode, decode=plain.decode)
    forward = model_lib.forward_flops(spec, setup.frozen, latents, prompt)

    def side(name, pairs, evaluations, **others):
        rate = pairs * (2 * len(setup.concepts) * batch_size)
        flops = evaluations * forward
        utilisation = rate.median * flops / peak["flops_per_second"]
        return Side(name, rate, evaluations, flops, utilisation, **others)

    evaluations = evaluations_per_sample(spec, setup.state, setup.frozen, setup.arrays, batch_size)
    measured = [side(f"JAX, {config.rollout.kind}", pairs["ours"], evaluations, **costs)]
    if torch_side:
        used = torch_side.peak_memory()
        evaluations = training.evaluations_per_sample()
        name = "PyTorch, published procedure"
        measured.append(side(name, pairs["theirs"], evaluations, peak_memory=used))
    workload = {
        "model": config.model.name,
        "resolution": setup.resolution,
        "dtype": config.model.dtype,
        "concepts": len(setup.concepts),
        "batch size": batch_size,
        "module": config.module.kind,
        "schedule steps": config.rollout.num_steps,
    }
    return Report("train", "samples", workload, environment, peak, tuple(measured))
