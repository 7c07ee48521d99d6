"""The method of RespoDiff (arXiv 2509.15257, "the paper") as pure functions.

A training loop of your own:

spec = respodiff_jax.step_spec(config, model)
concepts = embed_concepts(model, [*GENDER.values()])
state = init_state(spec, concepts, seed=0, batch_size=8)
step = jax.jit(partial(train_step, spec))
state, metrics = step(state, model.params, concepts, jnp.arange(8))

Axes in annotations: B samples, N concepts, P neutral prompts of each; L tokens of a prompt, D
features of a token; h, w, c of latents; H, W, C of the mid-block; S steps of the sampler; T
timesteps of the frozen model's training. `#B` is 1 or B. An `ArrayLike` may be a numpy array or,
without axes, a number. The tests check each annotated call.
"""

from respodiff_jax.method.concepts import Concept
from respodiff_jax.method.embedding import EmbeddedConcepts, embed_concepts
from respodiff_jax.method.modules import MidBlockModule
from respodiff_jax.method.paper import GENDER, RACE, SAFETY
from respodiff_jax.method.rollout import FaithfulRollout, StreamingRollout, run_trajectory
from respodiff_jax.method.schedule import Schedule
from respodiff_jax.method.state import StepSpec, TrainState, init_state
from respodiff_jax.method.train_step import (
    StepValues,
    algorithm_1,
    guided_prediction,
    step_values,
    train_step,
)

__all__ = [
    "GENDER",
    "RACE",
    "SAFETY",
    "Concept",
    "EmbeddedConcepts",
    "FaithfulRollout",
    "MidBlockModule",
    "Schedule",
    "StepSpec",
    "StepValues",
    "StreamingRollout",
    "TrainState",
    "algorithm_1",
    "embed_concepts",
    "guided_prediction",
    "init_state",
    "run_trajectory",
    "step_values",
    "train_step",
]
