"""Reading the prompt: is a picture to be steered? The text states alone decide.

The paper adds the same modules whatever the prompt says. Here each group of concepts has three
*heads*, linear read-outs of the text states `c_1 ... c_L` that the UNet's cross-attention gets:

    score = log(mean_k exp(s (w . c_k))) / s + b

* SOMEBODY: does the prompt name somebody whom the group is about, "a doctor"?
* THING: does it name something else, "a cat"?
* VALUE: does it name a value of the group, "a woman"?

A picture is not steered if its prompt names a value, or names a thing but nobody. The score follows
the token with the largest response, as in EquiSteer (arXiv 2607.01147): the place of a word in the
prompt does not matter.

Deviation: the paper steers every prompt.
"""

import enum
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, Float, Float32, Int

HEADS = SOMEBODY, THING, VALUE = 0, 1, 2
# s of each head: a person or a value is one word, the sense of a thing is spread over several.
SHARPNESS = (4.0, 1.0, 4.0)

_STEPS, _LEARNING_RATE = 400, 1e-2


class Reading(NamedTuple):
    """The heads of N concepts; the concepts of a group have the same heads.

    Attributes:
      weight: `w` of each head, for the D features of a text state.
      bias: `b` of each head.
    """

    weight: Float32[Array | np.ndarray, "N heads D"]
    bias: Float32[Array | np.ndarray, "N heads"]


class Decision(enum.IntEnum):
    """What a prompt says about a concept's group; only OPEN is steered.

    * OPEN: neither of the others.
    * NAMED: a value of the group is named.
    * NOBODY: a thing is named, and nobody whom the group is about.
    """

    OPEN = 0
    NAMED = 1
    NOBODY = 2


def always(num_concepts: int, num_features: int) -> Reading:
    """Heads that find every prompt open."""
    bias = np.tile(np.float32([1, -1, -1]), (num_concepts, 1))
    return Reading(np.zeros((num_concepts, len(HEADS), num_features), np.float32), bias)


def scores(
    reading: Reading, context: Float[Array | np.ndarray, "B L D"]
) -> Float[Array, "B N heads"]:
    """Each head's score of each prompt, in float32; above 0 means yes.

    Args:
      reading: the heads.
      context: the text states of B prompts, as the UNet gets them.
    """
    responses = jnp.einsum("bld,nhd->bnhl", jnp.asarray(context, jnp.float32), reading.weight)
    return _pool(responses, jnp.array(SHARPNESS)[None, None, :, None]) + reading.bias[None]


def decide(scores: Float[Array | np.ndarray, "B N heads"]) -> Int[np.ndarray, "B N"]:
    """The `Decision` on each prompt for each concept."""
    somebody, thing, named = np.moveaxis(np.asarray(scores) > 0, -1, 0)
    return np.select([thing & ~somebody, named], [Decision.NOBODY, Decision.NAMED], Decision.OPEN)


def fit_heads(
    context: Float[np.ndarray, "P L D"],
    labels: Bool[np.ndarray, "P heads"],
    weights: Float[np.ndarray, "P heads"],
) -> Reading:
    """Fits the heads of a group by logistic regression.

    Args:
      context: text states of P prompts.
      labels: what each head should say about each prompt.
      weights: of each prompt for each head, 0 or above. Both labels of a head have the same total
        weight.

    Returns:
      The heads, with N = 1.
    """
    context = np.asarray(context, np.float32)
    mean, scale = context.mean((0, 1)), context.std((0, 1)) + 1e-6
    totals = [(weights * chosen).sum(0) for chosen in (labels, ~labels)]
    weights = np.float32(np.where(labels, weights / totals[0], weights / totals[1]) / 2)
    w, b = _descend((context - mean) / scale, labels, weights)
    w = np.asarray(w) / scale
    return Reading(w[None], (np.asarray(b) - w @ mean)[None])


def _pool(responses, sharpness):
    """A smooth maximum over the last axis, the tokens; copies of padding hardly change it."""
    pooled = jax.nn.logsumexp(sharpness * responses, -1) - jnp.log(responses.shape[-1])
    return pooled / jnp.squeeze(sharpness, -1)


@jax.jit
def _descend(context, labels, weights):
    # A plain product of two matrices, which XLA computes faster on a CPU than the same einsum.
    tokens = context.reshape(-1, context.shape[-1])

    def loss(params):
        w, b = params
        responses = (tokens @ w.T).reshape(*context.shape[:2], len(HEADS)).swapaxes(1, 2)
        score = _pool(responses, jnp.array(SHARPNESS)[None, :, None]) + b[None]
        return jnp.sum(weights * optax.sigmoid_binary_cross_entropy(score, labels))

    optimizer = optax.adam(_LEARNING_RATE)

    def step(carry, _):
        params, state = carry
        updates, state = optimizer.update(jax.grad(loss)(params), state, params)
        return (optax.apply_updates(params, updates), state), None

    params = jnp.zeros((len(HEADS), context.shape[-1])), jnp.zeros(len(HEADS))
    carry, _ = jax.lax.scan(step, (params, optimizer.init(params)), length=_STEPS)
    return carry[0]
