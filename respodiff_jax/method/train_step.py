"""One training step of RAM and SAM, and the state it advances (paper, section 4 and algorithm 1).

`train_step` is pure. It is written for N concepts: one concept is N = 1. What a concept does is one
function, `_concept_step`, `vmap`ped over the leading concept axis; the frozen UNet has none.
Devices are the caller's business (`training.parallel`): under `pmap` the step sees its
device's share of the samples and averages gradients over `axis_name`; under `jit` it sees all of
them.
"""

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
from ml_collections import ConfigDict

from respodiff_jax.backbone import Backbone, Conditioning
from respodiff_jax.method import diffusion, objective
from respodiff_jax.method.modules import MidBlockModule, Params, add_delta
from respodiff_jax.method.objective import ConceptArrays
from respodiff_jax.method.rollout import Rollout, make_rollout


class ConceptState(flax.struct.PyTreeNode):
    """What is trained; all leaves have a leading concept axis N.

    Attributes:
      ram, sam: parameters.
      opt_ram, opt_sam: Optax states.
      ema: `optax.EmaState` of `(ram, sam)`, not yet debiased, or None.
      rollout: the rollout's state, leaves `(N, B, ...)`.
      diverged_at: int32 `(N,)`; step of the first non-finite loss, from which on the concept is
        left as it was before that step; -1 if all is well.
    """

    ram: Params
    sam: Params
    opt_ram: optax.OptState
    opt_sam: optax.OptState
    ema: optax.EmaState | None
    rollout: Any
    diverged_at: jax.Array


class TrainState(flax.struct.PyTreeNode):
    """All that a checkpoint holds.

    Attributes:
      step: int32 `()`, optimiser steps taken.
      key: uint32 `(2,)`, data of the run's random key; step n uses `fold_in(key, n)`.
      concepts: the concepts' states.
    """

    step: jax.Array
    key: jax.Array
    concepts: ConceptState


class Metrics(NamedTuple):
    """Of one step; leaves `(N,)`."""

    loss_resp: jax.Array
    loss_sem: jax.Array
    grad_norm_ram: jax.Array
    grad_norm_sam: jax.Array
    ddim_index: jax.Array
    diverged_at: jax.Array


@dataclasses.dataclass(frozen=True, eq=False)
class Recipe:
    """What is fixed for a run: functions and hyper-parameters, no arrays.

    Attributes:
      encode: `e(params, z_t, timesteps, cond) -> (h, skips)`, up to and with the mid-block.
      decode: `g(params, h, skips) -> model output`.
      latent_shape: `(h, w, c)`.
      module: architecture of RAM and SAM.
      schedule: DDIM schedule of the rollout; the losses' timesteps are its.
      rollout: where the losses are evaluated.
      rollout_guidance_scale: guidance of the neutral trajectories.
      optimizer: gradient transformation, up to the factor `-learning_rate`.
      ema_decay: of the moving averages, or None.
      batch_shards: devices that share the batch where XLA partitions the step, see
        `diffusion.join`.
    """

    encode: Callable
    decode: Callable
    latent_shape: tuple[int, int, int]
    module: MidBlockModule
    schedule: diffusion.Schedule
    rollout: Rollout
    rollout_guidance_scale: float
    optimizer: optax.GradientTransformation
    ema_decay: float | None
    batch_shards: int = 1

    @classmethod
    def from_config(
        cls,
        config: ConfigDict,
        backbone: Backbone,
        resolution: int,
    ) -> "Recipe":
        schedule = diffusion.Schedule.from_config(
            backbone.scheduler_config, config.rollout.num_steps
        )
        return cls(
            encode=backbone.encode,
            decode=partial(backbone.decode, remat=config.train.remat),
            latent_shape=backbone.latent_shape(resolution),
            module=MidBlockModule(
                kind=config.module.kind,
                mid_block_shape=backbone.mid_block_shape(resolution),
                hidden_channels=config.module.hidden_channels,
                init_scheme=config.module.init,
            ),
            schedule=schedule,
            rollout=make_rollout(config.rollout, schedule),
            rollout_guidance_scale=config.rollout.guidance_scale,
            optimizer=make_optimizer(config.optimizer, config.train.steps),
            ema_decay=config.optimizer.ema_decay,
        )


def make_lr_schedule(config: ConfigDict, steps: int) -> optax.Schedule:
    """What learning rates are multiplied by at each of the training's steps: warm-up and decay."""
    decay_steps = steps - config.warmup_steps
    decay = {
        "constant": optax.constant_schedule(1.0),
        "linear": optax.linear_schedule(1.0, 0.0, decay_steps),
        "cosine": optax.cosine_decay_schedule(1.0, decay_steps),
    }[config.lr_schedule]
    if not config.warmup_steps:
        return decay
    warmup = optax.linear_schedule(0.0, 1.0, config.warmup_steps)
    return optax.join_schedules([warmup, decay], [config.warmup_steps])


def make_optimizer(config: ConfigDict, steps: int) -> optax.GradientTransformation:
    """Adam with optional clipping, warm-up and decay; updates still lack `-learning_rate`.

    Learning rates differ between concepts and modules, so that they multiply outside.
    """
    clip = [] if config.clip_norm is None else [optax.clip_by_global_norm(config.clip_norm)]
    adam = optax.scale_by_adam(b1=config.b1, b2=config.b2, eps=config.eps)
    return optax.chain(*clip, adam, optax.scale_by_schedule(make_lr_schedule(config, steps)))


def init_state(recipe: Recipe, concepts: ConceptArrays, seed: int, batch_size: int) -> TrainState:
    """The state before the first step: the same for a concept alone or among others."""
    key = jax.random.key(seed)

    def init_concept(stream, num_neutral):
        concept_key = jax.random.fold_in(key, stream)
        ram_key, sam_key, rollout_key = jax.random.split(concept_key, 3)
        ram, sam = recipe.module.init_params(ram_key), recipe.module.init_params(sam_key)
        rollout_keys = jax.vmap(jax.random.fold_in, in_axes=(None, 0))(
            rollout_key, jnp.arange(batch_size)
        )
        return ConceptState(
            ram=ram,
            sam=sam,
            opt_ram=recipe.optimizer.init(ram),
            opt_sam=recipe.optimizer.init(sam),
            ema=None if recipe.ema_decay is None else _ema(recipe).init((ram, sam)),
            rollout=recipe.rollout.init(rollout_keys, num_neutral, recipe.latent_shape),
            diverged_at=jnp.int32(-1),
        )

    return TrainState(
        step=jnp.int32(0),
        key=jax.random.key_data(key),
        concepts=jax.vmap(init_concept)(
            jnp.asarray(concepts.stream), jnp.asarray(concepts.num_neutral)
        ),
    )


def start_from(state: TrainState, places: Sequence[int], ram: Params, sam: Params) -> TrainState:
    """A fresh state in which some concepts start from trained modules.

    Args:
      state: of N concepts.
      places: which of them; M.
      ram, sam: their parameters, leaves `(M, ...)`.
    """
    places = np.array(places, np.int32)

    def replace(fresh, trained):
        return fresh.at[places].set(trained)

    ram = jax.tree.map(replace, state.concepts.ram, ram)
    sam = jax.tree.map(replace, state.concepts.sam, sam)
    return state.replace(concepts=state.concepts.replace(ram=ram, sam=sam))


def train_step(
    recipe: Recipe,
    state: TrainState,
    frozen: dict,
    concepts: ConceptArrays,
    sample_ids: jax.Array,
    axis_name: str | None = None,
    axis_index_groups: list[list[int]] | None = None,
    concept_axis: str | None = None,
) -> tuple[TrainState, Metrics]:
    """Advances N concepts by one step.

    Args:
      recipe: static.
      state: leaves of `state.concepts` are `(N, ...)`.
      frozen: the backbone's parameters, never changed.
      concepts: leaves `(N, ...)`.
      sample_ids: int32 `(B,)`, which samples of the global batch these are; they name the samples'
        random streams, so that a batch is the same however it is split.
      axis_name: of the mapped axis that the rest of the batch lies on, if any.
      axis_index_groups: which of its positions share concepts.
      concept_axis: of the mesh, that N is sharded over where XLA partitions the step.

    Returns:
      The new state and the step's metrics.
    """
    step_key = jax.random.fold_in(jax.random.wrap_key_data(state.key), state.step)
    rollout_key, samples_key = jax.random.split(step_key)

    def pmean(tree):
        if axis_name is None:
            return tree
        return jax.lax.pmean(tree, axis_name, axis_index_groups=axis_index_groups)

    def one_concept(concept_state, concept):
        concept_key = jax.random.fold_in(samples_key, concept.stream)
        keys = jax.vmap(jax.random.fold_in, in_axes=(None, 0))(concept_key, sample_ids)
        return _concept_step(
            recipe, concept_state, frozen, concept, keys, rollout_key, state.step, pmean
        )

    all_concepts = jax.vmap(one_concept, spmd_axis_name=concept_axis)
    new_concepts, metrics = all_concepts(state.concepts, concepts)
    return state.replace(step=state.step + 1, concepts=new_concepts), metrics


def _guided_prediction(
    recipe: Recipe,
    state: ConceptState,
    frozen: dict,
    concept: ConceptArrays,
    z_t: jax.Array,
    ddim_index: jax.Array,
    prompt_index: jax.Array,
) -> jax.Array:
    """The model's guided output with RAM and SAM on the conditional half only; of one concept."""
    cond = _pick(concept.neutral, prompt_index)
    uncond = _repeat(concept.empty, len(prompt_index))
    join = partial(diffusion.join, shards=recipe.batch_shards)
    t = _timesteps(recipe.schedule, ddim_index, len(z_t))
    h, skips = recipe.encode(frozen, join(z_t, z_t), join(t, t), join(cond, uncond))
    h_cond, h_uncond = diffusion.part(h, 2, recipe.batch_shards)
    delta = recipe.module.delta(state.ram, h_cond) + recipe.module.delta(state.sam, h_cond)
    output = recipe.decode(frozen, join(add_delta(h_cond, delta), h_uncond), skips)
    outputs = diffusion.part(output, 2, recipe.batch_shards)
    return diffusion.cfg_combine(*outputs, recipe.rollout_guidance_scale)


def _concept_step(
    recipe: Recipe,
    state: ConceptState,
    frozen: dict,
    concept: ConceptArrays,
    keys: jax.Array,
    rollout_key: jax.Array,
    step: jax.Array,
    pmean: Callable,
) -> tuple[ConceptState, Metrics]:
    """Latents, RAM's update, SAM's with the updated RAM, the trajectories' step; one concept, no
    leading axis."""
    module = recipe.module
    draw = recipe.rollout.draw(
        state.rollout,
        partial(_guided_prediction, recipe, state, frozen, concept),
        keys,
        rollout_key,
        concept.num_neutral,
        recipe.latent_shape,
    )
    z_t, batch_size = draw.z_t, len(draw.z_t)

    def to_eps(output):
        return diffusion.predict_eps(recipe.schedule, output, z_t, draw.ddim_index)

    # The base model's predictions as one batch: one pass of the encoder, one of the decoder.
    conditions = (
        _pick(concept.neutral, draw.prompt_index),
        _repeat(concept.own, batch_size),
        _repeat(concept.empty, batch_size),
    )
    t = _timesteps(recipe.schedule, draw.ddim_index, batch_size)
    join = partial(diffusion.join, shards=recipe.batch_shards)
    h_all, skips_all = recipe.encode(frozen, join(z_t, z_t, z_t), join(t, t, t), join(*conditions))
    predictions = recipe.decode(frozen, h_all, skips_all)
    outputs = diffusion.part(predictions, 3, recipe.batch_shards)
    eps_neutral, eps_own, eps_empty = map(to_eps, outputs)
    output_empty = outputs[2]
    eps_target = objective.target(concept, eps_neutral, eps_own, eps_empty)
    h, skips = diffusion.part((h_all, skips_all), 3, recipe.batch_shards)[0]

    def loss_resp(ram):
        output = recipe.decode(frozen, add_delta(h, module.delta(ram, h)), skips)
        return objective.responsible_loss(to_eps(output), eps_target)

    ram_loss, ram_grad = pmean(jax.value_and_grad(loss_resp)(state.ram))
    ram, opt_ram = _update(recipe, ram_grad, state.opt_ram, state.ram, concept.lr_ram)
    ram_delta = module.delta(ram, h)

    def loss_sem(sam):
        output = recipe.decode(frozen, add_delta(h, ram_delta + module.delta(sam, h)), skips)
        return objective.semantic_loss(to_eps(output), eps_neutral, concept.lambda_sem), output

    (sam_loss, output_steered), sam_grad = jax.value_and_grad(loss_sem, has_aux=True)(state.sam)
    mean_index = jnp.mean(jnp.asarray(draw.ddim_index, jnp.float32))
    sam_loss, sam_grad, mean_index = pmean((sam_loss, sam_grad, mean_index))
    sam, opt_sam = _update(recipe, sam_grad, state.opt_sam, state.sam, concept.lr_sam)

    rollout_state = recipe.rollout.advance(
        state.rollout,
        draw,
        lambda: diffusion.cfg_combine(output_steered, output_empty, recipe.rollout_guidance_scale),
        keys,
        concept.num_neutral,
    )

    ema = state.ema
    if recipe.ema_decay is not None:
        _, ema = _ema(recipe).update((ram, sam), state.ema)

    finite = _all_finite((ram_loss, sam_loss, ram, sam, opt_ram, opt_sam))
    healthy = finite & (state.diverged_at < 0)
    advanced = state.replace(
        ram=ram, sam=sam, opt_ram=opt_ram, opt_sam=opt_sam, ema=ema, rollout=rollout_state
    )
    new_state = jax.tree.map(lambda new, old: jnp.where(healthy, new, old), advanced, state)
    diverged_at = jnp.where(healthy | (state.diverged_at >= 0), state.diverged_at, step)
    metrics = Metrics(
        loss_resp=ram_loss,
        loss_sem=sam_loss,
        grad_norm_ram=optax.tree.norm(ram_grad),
        grad_norm_sam=optax.tree.norm(sam_grad),
        ddim_index=mean_index,
        diverged_at=diverged_at,
    )
    return new_state.replace(diverged_at=diverged_at), metrics


def _ema(recipe: Recipe) -> optax.GradientTransformation:
    """The moving average of the modules; what starts at zero is debiased where it is read."""
    return optax.ema(recipe.ema_decay, debias=False)


def _update(recipe, grad, opt_state, params, learning_rate):
    updates, opt_state = recipe.optimizer.update(grad, opt_state, params)
    updates = jax.tree.map(lambda u: -learning_rate * u, updates)
    return optax.apply_updates(params, updates), opt_state


def _timesteps(schedule, ddim_index, batch_size) -> jax.Array:
    """The UNet's timesteps, int32 `(batch_size,)`."""
    return jnp.broadcast_to(jnp.asarray(schedule.timesteps)[ddim_index], (batch_size,))


def _pick(conditions: Conditioning, index: jax.Array) -> Conditioning:
    return jax.tree.map(lambda x: x[index], conditions)


def _repeat(condition: Conditioning, batch_size: int) -> Conditioning:
    return jax.tree.map(lambda x: jnp.broadcast_to(x, (batch_size, *x.shape)), condition)


def _all_finite(tree) -> jax.Array:
    return jnp.all(jnp.stack([jnp.isfinite(x).all() for x in jax.tree.leaves(tree)]))
