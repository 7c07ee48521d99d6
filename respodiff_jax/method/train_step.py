"""One training step of RAM and SAM (paper, section 4, Algorithm 1).

`algorithm_1` is the paper's step for one concept. `train_step` maps it over N concepts with `vmap`;
the frozen UNet has no concept axis. Both are pure. Where devices share a batch, the caller runs
`train_step` on each device's samples and gives it `average`, the mean over these devices.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, ArrayLike, Bool, Float32, Int32

from respodiff_jax.backbone import Conditioning, Skips
from respodiff_jax.method import diffusion, objective
from respodiff_jax.method.adversary import Attack, Attacked
from respodiff_jax.method.diffusion import DdimIndex, Latent, concatenate, split
from respodiff_jax.method.embedding import EmbeddedConcepts
from respodiff_jax.method.modules import MidBlock, Params, add_delta
from respodiff_jax.method.rollout import Latents, Samples
from respodiff_jax.method.state import ConceptState, StepSpec, TrainState

Average = Callable[[Any], Any]  # the mean of a tree over the devices that share a batch


class StepValues(NamedTuple):
    """The intermediate values of a step. `step_values` returns them with a leading axis N.

    Attributes:
      latents: `z_t`, its place on the schedule and its neutral prompt.
      eps_neutral, eps_own, eps_empty: the base model's predictions.
      eps_target: target of RAM's loss.
      eps_ram: prediction with RAM as it was before the step.
      eps_ram_sam: prediction with the updated RAM, and SAM as it was before.
      loss_resp, loss_sem: L_resp and L_sem.
      grad_ram, grad_sam: their gradients, shaped as the parameters of one concept.
    """

    latents: Latents
    eps_neutral: Latent
    eps_own: Latent
    eps_empty: Latent
    eps_target: Latent
    eps_ram: Latent
    eps_ram_sam: Latent
    loss_resp: Float32[Array, ""]
    loss_sem: Float32[Array, ""]
    grad_ram: Params
    grad_sam: Params


class Metrics(NamedTuple):
    """Numbers of one step.

    Attributes:
      loss_resp, loss_sem: L_resp and L_sem, means over the whole batch.
      grad_norm_ram, grad_norm_sam: Euclidean norms of the gradients, before clipping.
      ddim_index: mean place of the latents on the schedule.
      diverged_at: as in `ConceptState`.
    """

    loss_resp: Float32[Array, "N"]
    loss_sem: Float32[Array, "N"]
    grad_norm_ram: Float32[Array, "N"]
    grad_norm_sam: Float32[Array, "N"]
    ddim_index: Float32[Array, "N"]
    diverged_at: Int32[Array, "N"]


def algorithm_1(
    spec: StepSpec,
    state: ConceptState,
    frozen: dict,
    concept: EmbeddedConcepts,
    samples: Samples,
    average: Average = lambda tree: tree,
    step: Int32[ArrayLike, ""] = 0,
) -> tuple[ConceptState, StepValues]:
    """Algorithm 1 of the paper for one concept; no leaf has a concept axis.

    RAM is updated first; SAM's loss then uses the updated RAM. The paper has no adversary.

    Args:
      spec: static.
      state: of one concept; leaves of `state.rollout` are `(B, ...)`. With an adversary it is an
        `Attacked`.
      frozen: the backbone's parameters, never changed.
      concept: embedded, without a concept axis.
      samples: of B samples; `FaithfulRollout` needs `step_key`.
      average: the mean over the devices that share the batch; the identity for one device.
      step: training steps done; only an adversary reads it.

    Returns:
      The new state, with the moving average and `diverged_at` unchanged, and the step's values.
    """
    predict = partial(guided_prediction, spec, frozen, concept, state.ram, state.sam)
    rollout, attack = state.rollout, None
    if spec.adversary is not None:
        rollout, attack = state.rollout
    latents = spec.rollout.draw(rollout, samples, predict)
    if attack is not None:
        attack = _renew_attack(spec, frozen, concept, state, attack, samples, latents, step)
    base = base_predictions(spec, frozen, concept, latents, attack)
    eps_neutral, eps_own, eps_empty = (_to_eps(spec, y, latents) for y in base.outputs)
    eps_target = objective.target(concept, latents.prompt_index, eps_neutral, eps_own, eps_empty)

    def loss_resp(ram):
        eps_ram = _to_eps(spec, steered_output(spec, frozen, base, ram), latents)
        return objective.responsible_loss(eps_ram, eps_target), eps_ram

    (resp, eps_ram), grad_ram = jax.value_and_grad(loss_resp, has_aux=True)(state.ram)
    resp, grad_ram = average((resp, grad_ram))
    ram, opt_ram = _update(spec, grad_ram, state.opt_ram, state.ram, concept.lr_ram)

    def loss_sem(sam):
        output = steered_output(spec, frozen, base, ram, sam)
        eps_ram_sam = _to_eps(spec, output, latents)
        target = eps_neutral if attack is None else attack.keep(eps_ram_sam, eps_neutral)
        loss = objective.semantic_loss(eps_ram_sam, target, concept.lambda_sem)
        return loss, (output, eps_ram_sam)

    (sem, (output, eps_ram_sam)), grad_sam = jax.value_and_grad(loss_sem, has_aux=True)(state.sam)
    sem, grad_sam = average((sem, grad_sam))
    sam, opt_sam = _update(spec, grad_sam, state.opt_sam, state.sam, concept.lr_sam)

    guided = diffusion.cfg_combine(output, base.outputs[-1], spec.rollout_guidance_scale)
    rollout = spec.rollout.advance(rollout, samples, latents, guided)
    if attack is not None:
        rollout = Attacked(rollout, attack)
    values = StepValues(
        *(latents, eps_neutral, eps_own, eps_empty, eps_target, eps_ram, eps_ram_sam),
        *(resp, sem, grad_ram, grad_sam),
    )
    new = state.replace(ram=ram, sam=sam, opt_ram=opt_ram, opt_sam=opt_sam, rollout=rollout)
    return new, values


def train_step(
    spec: StepSpec,
    state: TrainState,
    frozen: dict,
    concepts: EmbeddedConcepts,
    sample_ids: Int32[ArrayLike, "B"],
    average: Average = lambda tree: tree,
) -> tuple[TrainState, Metrics]:
    """Advances N concepts by one step of `algorithm_1`.

    Args:
      spec: static.
      state: leaves of `state.concepts` are `(N, ...)`.
      frozen: the backbone's parameters, never changed.
      concepts: leaves `(N, ...)`.
      sample_ids: the numbers of these samples in the global batch, `arange(B)` on one device. They
        select the samples' random streams, so a batch is the same however it is split.
      average: the mean over the devices that share the batch.

    Returns:
      The new state and the step's metrics.
    """
    new_concepts, metrics, _ = _advance(spec, state, frozen, concepts, sample_ids, average)
    return state.replace(step=state.step + 1, concepts=new_concepts), metrics


def step_values(
    spec: StepSpec,
    state: TrainState,
    frozen: dict,
    concepts: EmbeddedConcepts,
    sample_ids: Int32[ArrayLike, "B"],
) -> StepValues:
    """The values that `train_step` computes from the same arguments; leaves `(N, ...)`."""
    return _advance(spec, state, frozen, concepts, sample_ids, lambda tree: tree)[2]


def _advance(spec, state, frozen, concepts, sample_ids, average):
    step_key = jax.random.fold_in(jax.random.wrap_key_data(state.key), state.step)
    rollout_key, samples_key = jax.random.split(step_key)

    def one_concept(old, concept):
        concept_key = jax.random.fold_in(samples_key, concept.stream)
        keys = jax.vmap(jax.random.fold_in, in_axes=(None, 0))(concept_key, sample_ids)
        samples = Samples(keys, concept.num_neutral, spec.latent_shape, rollout_key)
        new, values = algorithm_1(spec, old, frozen, concept, samples, average, state.step)
        if spec.ema_decay is not None:
            new = new.replace(ema=spec.ema.update((new.ram, new.sam), old.ema)[1])
        new = _unless_diverged(new, old, values, state.step)
        return new, _metrics(values, new, average), values

    return jax.vmap(one_concept)(state.concepts, concepts)


def _unless_diverged(
    new: ConceptState, old: ConceptState, values: StepValues, step: Int32[Array, ""]
):
    """The new state; after a non-finite number the old state, with `diverged_at` set."""
    trained = (new.ram, new.sam, new.opt_ram, new.opt_sam)
    finite = _all_finite((values.loss_resp, values.loss_sem, *trained))
    healthy = finite & (old.diverged_at < 0)
    diverged_at = jnp.where(finite | (old.diverged_at >= 0), old.diverged_at, step)
    kept = jax.tree.map(lambda n, o: jnp.where(healthy, n, o), new, old)
    return kept.replace(diverged_at=diverged_at)


def _metrics(values: StepValues, state: ConceptState, average: Average) -> Metrics:
    return Metrics(
        loss_resp=values.loss_resp,
        loss_sem=values.loss_sem,
        grad_norm_ram=optax.tree.norm(values.grad_ram),
        grad_norm_sam=optax.tree.norm(values.grad_sam),
        ddim_index=average(jnp.mean(values.latents.ddim_index, dtype=jnp.float32)),
        diverged_at=state.diverged_at,
    )


class BasePredictions(NamedTuple):
    """The base model's results for the latents.

    Attributes:
      h: mid-block output for the neutral prompt or, in an attacked sample, its shifted text states.
      skips: what the decoder needs besides `h`.
      outputs: model outputs for the neutral, the concept's own and the empty prompt.
    """

    h: MidBlock
    skips: Skips
    outputs: tuple[Latent, Latent, Latent]


def base_predictions(
    spec: StepSpec,
    frozen: dict,
    concept: EmbeddedConcepts,
    latents: Latents,
    attack: Attack | None = None,
) -> BasePredictions:
    """Evaluates the base model for the three prompts as one batch, with one UNet pass.

    With an attack, the batch also has the attacked neutral prompts, whose `h` and `skips` are
    returned.
    """
    z_t, batch_size = latents.z_t, len(latents.z_t)
    neutral = _pick(concept.neutral, latents.prompt_index)
    own = _pick(concept.own, latents.prompt_index)
    conditions = [neutral, own, _repeat(concept.empty, batch_size)]
    if attack is not None:
        conditions.append(attack.change(neutral))
    count = len(conditions)
    t = _timesteps(spec, latents.ddim_index, batch_size)
    h, skips = spec.encode(frozen, z_t, t, concatenate(*conditions))
    outputs = split(spec.decode(frozen, h, skips), count)[:3]
    inner = split((h, skips), count)[0 if attack is None else -1]
    return BasePredictions(*inner, outputs)


def _renew_attack(
    spec: StepSpec,
    frozen: dict,
    concept: EmbeddedConcepts,
    state: ConceptState,
    attack: Attack,
    samples: Samples,
    latents: Latents,
    step: Int32[ArrayLike, ""],
) -> Attack:
    """The attack for this step, on the current modules."""
    neutral = _pick(concept.neutral, latents.prompt_index)
    t = _timesteps(spec, latents.ddim_index, len(latents.z_t))
    # The rollout's uses of the samples' keys are 0 to 2.
    keys = jax.vmap(jax.random.fold_in, in_axes=(0, None))(samples.keys, 3)

    def predict(attack):
        cond = neutral if attack is None else attack.change(neutral)
        h, skips = spec.encode(frozen, latents.z_t, t, cond)
        if attack is not None:
            base = BasePredictions(h, skips, ())
            output = steered_output(spec, frozen, base, state.ram, state.sam)
        else:
            output = spec.decode(frozen, h, skips)
        return _to_eps(spec, output, latents)

    return spec.adversary.renew(attack, step, keys, lambda: predict(None), predict)


def steered_output(
    spec: StepSpec, frozen: dict, base: BasePredictions, ram: Params, sam: Params | None = None
) -> Latent:
    """The model output at `base.h` with RAM, or with RAM and SAM."""
    delta = spec.module.delta(ram, base.h)
    if sam is not None:
        delta = delta + spec.module.delta(sam, base.h)
    return spec.decode(frozen, add_delta(base.h, delta), base.skips)


def guided_prediction(
    spec: StepSpec,
    frozen: dict,
    concept: EmbeddedConcepts,
    ram: Params,
    sam: Params,
    z_t: Latent,
    ddim_index: DdimIndex,
    prompt_index: Int32[ArrayLike, "B"],
) -> Latent:
    """One concept's guided output, eps or v; RAM and SAM act on the conditional half only.

    Args:
      spec: static.
      frozen: the backbone's parameters.
      concept: embedded, without a concept axis.
      ram, sam: parameters of one concept.
      z_t, ddim_index: latents and their place on the schedule.
      prompt_index: index of the neutral prompt of each sample.
    """

    def steer(h):
        return add_delta(h, spec.module.delta(ram, h) + spec.module.delta(sam, h))

    return diffusion.guided_output(
        spec.encode,
        spec.decode,
        frozen,
        z_t,
        _timesteps(spec, ddim_index, len(z_t)),
        _pick(concept.neutral, prompt_index),
        _repeat(concept.empty, len(z_t)),
        spec.rollout_guidance_scale,
        steer,
    )


def _to_eps(spec: StepSpec, output: Latent, latents: Latents) -> Latent:
    return diffusion.predict_eps(spec.schedule, output, latents.z_t, latents.ddim_index)


def _update(
    spec: StepSpec, grad: Params, opt_state, params: Params, learning_rate: Float32[ArrayLike, ""]
):
    updates, opt_state = spec.optimizer.update(grad, opt_state, params)
    updates = jax.tree.map(lambda u: -learning_rate * u, updates)
    return optax.apply_updates(params, updates), opt_state


def _timesteps(spec: StepSpec, ddim_index: DdimIndex, batch_size: int) -> Int32[Array, "B"]:
    """The UNet's timesteps."""
    return jnp.broadcast_to(jnp.asarray(spec.schedule.timesteps)[ddim_index], (batch_size,))


def _pick(conditions: Conditioning, index: Int32[ArrayLike, "B"]) -> Conditioning:
    return jax.tree.map(lambda x: x[index], conditions)


def _repeat(condition: Conditioning, batch_size: int) -> Conditioning:
    return jax.tree.map(lambda x: jnp.broadcast_to(x, (batch_size, *x.shape)), condition)


def _all_finite(tree) -> Bool[Array, ""]:
    return jnp.all(jnp.stack([jnp.isfinite(x).all() for x in jax.tree.leaves(tree)]))
