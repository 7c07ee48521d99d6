"""What the training step is given: its specification, and the state that it advances."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Int32, UInt32

from respodiff_jax.method.adversary import Adversary, Attacked
from respodiff_jax.method.embedding import EmbeddedConcepts
from respodiff_jax.method.modules import MidBlockModule, Params
from respodiff_jax.method.rollout import Rollout, Samples
from respodiff_jax.method.schedule import Schedule


class ConceptState(flax.struct.PyTreeNode):
    """What is trained. Every leaf has a leading concept axis N; in `algorithm_1` it has none.

    Attributes:
      ram, sam: parameters of RAM and of SAM.
      opt_ram, opt_sam: their Optax states.
      ema: `optax.EmaState` of `(ram, sam)`, not yet debiased; None if no average is kept.
      rollout: the rollout's state, with an adversary `Attacked`; leaves `(N, B, ...)`.
      diverged_at: number of steps done before the first step that gave a non-finite loss, module
        or optimiser state, or -1. A diverged concept stays as it was before that step.
    """

    ram: Params
    sam: Params
    opt_ram: optax.OptState
    opt_sam: optax.OptState
    ema: optax.EmaState | None
    rollout: Any
    diverged_at: Int32[Array, "N"]


class TrainState(flax.struct.PyTreeNode):
    """What a checkpoint holds.

    Attributes:
      step: training steps done.
      key: data of the run's random key; step n uses `fold_in(key, n)`.
      concepts: the concepts' states.
    """

    step: Int32[Array, ""]
    key: UInt32[Array, "2"]
    concepts: ConceptState


@dataclasses.dataclass(frozen=True, eq=False)
class StepSpec:
    """What is fixed during training: functions and hyper-parameters, no arrays.

    Attributes:
      encode: `e(params, z_t, timesteps, cond) -> (h, skips)`, up to and with the mid-block.
      decode: `g(params, h, skips) -> model output`.
      latent_shape: `(h, w, c)`.
      module: architecture of RAM and SAM.
      schedule: DDIM schedule of the rollout; the losses are evaluated at its timesteps.
      rollout: where the losses are evaluated.
      rollout_guidance_scale: guidance of the neutral trajectories.
      optimizer: gradient transformation, up to the factor `-learning_rate`.
      ema_decay: decay of the modules' moving average; None for no average.
      adversary: how samples are attacked; None for the paper's training.
    """

    encode: Callable
    decode: Callable
    latent_shape: tuple[int, int, int]
    module: MidBlockModule
    schedule: Schedule
    rollout: Rollout
    rollout_guidance_scale: float
    optimizer: optax.GradientTransformation
    ema_decay: float | None = None
    adversary: Adversary | None = None

    @property
    def ema(self) -> optax.GradientTransformation:
        """The modules' moving average. It starts at zero and is debiased where it is read."""
        return optax.ema(self.ema_decay, debias=False)


def init_state(
    spec: StepSpec, concepts: EmbeddedConcepts, seed: int = 0, batch_size: int = 1
) -> TrainState:
    """The state before the first step. A concept's part does not depend on the other concepts.

    Args:
      spec: of the training.
      concepts: N embedded concepts.
      seed: of all random numbers of the training.
      batch_size: B, samples of each concept in a step.

    Returns:
      Leaves of `concepts` are `(N, ...)`, those of `concepts.rollout` `(N, B, ...)`.
    """
    key = jax.random.key(seed)

    def init_concept(stream, num_neutral):
        concept_key = jax.random.fold_in(key, stream)
        ram_key, sam_key, rollout_key = jax.random.split(concept_key, 3)
        ram, sam = spec.module.init_params(ram_key), spec.module.init_params(sam_key)
        sample_keys = jax.vmap(jax.random.fold_in, in_axes=(None, 0))(
            rollout_key, jnp.arange(batch_size)
        )
        rollout = spec.rollout.init(Samples(sample_keys, num_neutral, spec.latent_shape))
        if spec.adversary is not None:
            shape = concepts.neutral.context.shape[-2:]
            rollout = Attacked(rollout, spec.adversary.init(batch_size, shape))
        return ConceptState(
            ram=ram,
            sam=sam,
            opt_ram=spec.optimizer.init(ram),
            opt_sam=spec.optimizer.init(sam),
            ema=None if spec.ema_decay is None else spec.ema.init((ram, sam)),
            rollout=rollout,
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
      places: positions of M of them.
      ram, sam: their parameters, leaves `(M, ...)`.
    """
    places = np.array(places, np.int32)

    def replace(fresh, trained):
        return fresh.at[places].set(trained)

    ram = jax.tree.map(replace, state.concepts.ram, ram)
    sam = jax.tree.map(replace, state.concepts.sam, sam)
    return state.replace(concepts=state.concepts.replace(ram=ram, sam=sam))
