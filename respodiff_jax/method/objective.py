"""The score-matching objectives of RAM and SAM (paper, section 4.2).

    L_resp = mean || eps(z_t, y_neu; RAM)     - eps_target ||^2              gradient to RAM
    L_sem  = lambda * mean || eps(z_t, y_neu; RAM+SAM) - eps(z_t, y_neu; 0) ||^2   gradient to SAM
    eps_target = eps(z_t, y_unc; 0) + s_tar * (eps(z_t, y_tar; 0) - eps(z_t, y_unc; 0))

Fairness: `y_tar` is the target prompt and `y_unc` the empty one. Safety: `y_tar` is the neutral
prompt and `y_unc` the unsafe one, so that the target points away from it. Both choose from the base
model's predictions for three prompts: the neutral, the concept's own and the empty one. The mean is
over all elements of the batch. The neutral predictions have guidance 1, so their unconditional half
cancels.
"""

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from respodiff_jax.backbone import Backbone, Conditioning
from respodiff_jax.method import diffusion
from respodiff_jax.method.concepts import Concept


class ConceptArrays(NamedTuple):
    """What a training step reads of each concept; all leaves have a leading concept axis N.

    Attributes:
      neutral: `y_neu`, `(N, P, ...)`; concepts with fewer than P neutral prompts repeat their last.
      num_neutral: int32 `(N,)`, how many of the P are the concept's own.
      own: the target prompt of fairness, the unsafe one of safety, `(N, ...)`.
      empty: the empty prompt, also the rollout's unconditional half, `(N, ...)`.
      is_safety: bool `(N,)`.
      guidance_scale: `s_tar`, float32 `(N,)`.
      lambda_sem: weight of L_sem, float32 `(N,)`.
      lr_ram: float32 `(N,)`.
      lr_sam: float32 `(N,)`.
      stream: uint32 `(N,)`, names the concept's random stream.
    """

    neutral: Conditioning
    num_neutral: jax.Array
    own: Conditioning
    empty: Conditioning
    is_safety: jax.Array
    guidance_scale: jax.Array
    lambda_sem: jax.Array
    lr_ram: jax.Array
    lr_sam: jax.Array
    stream: jax.Array


def concept_arrays(
    backbone: Backbone,
    concepts: Sequence[Concept],
    resolution: int,
    most_neutral: int | None = None,
) -> ConceptArrays:
    """Embeds the concepts' prompts, each distinct prompt once; returns host arrays.

    Args:
      backbone: with its text encoders' parameters.
      concepts: N.
      resolution: in pixels.
      most_neutral: P; by default as many as a concept has at most.
    """
    most_neutral = most_neutral or max(len(c.neutral_prompts) for c in concepts)

    def padded(prompts):
        return [*prompts, *[prompts[-1]] * (most_neutral - len(prompts))]

    distinct = sorted({"", *itertools.chain(*(c.prompts for c in concepts))})
    table = jax.tree.map(np.asarray, backbone.encode_prompts(distinct, resolution))
    row = {prompt: i for i, prompt in enumerate(distinct)}

    def embedded(prompts):
        rows = np.vectorize(row.get, otypes=[int])(np.asarray(prompts, object))
        return jax.tree.map(lambda x: x[rows], table)

    def per_concept(field: str, dtype=np.float32):
        return np.asarray([getattr(c, field) for c in concepts], dtype)

    return ConceptArrays(
        neutral=embedded([padded(c.neutral_prompts) for c in concepts]),
        num_neutral=np.asarray([len(c.neutral_prompts) for c in concepts], np.int32),
        own=embedded([c.own_prompt for c in concepts]),
        empty=embedded([""] * len(concepts)),
        is_safety=per_concept("is_safety", np.bool_),
        guidance_scale=per_concept("guidance_scale"),
        lambda_sem=per_concept("lambda_sem"),
        lr_ram=per_concept("lr_ram"),
        lr_sam=per_concept("lr_sam"),
        stream=per_concept("stream", np.uint32),
    )


def target(
    concept: ConceptArrays, eps_neutral: jax.Array, eps_own: jax.Array, eps_empty: jax.Array
) -> jax.Array:
    """`eps_target` of one concept, from the base model's predictions `(B, h, w, c)`."""
    eps_tar = jnp.where(concept.is_safety, eps_neutral, eps_own)
    eps_unc = jnp.where(concept.is_safety, eps_own, eps_empty)
    return diffusion.cfg_combine(eps_tar, eps_unc, concept.guidance_scale)


def responsible_loss(eps_ram: jax.Array, eps_target: jax.Array) -> jax.Array:
    """L_resp of predictions `(B, h, w, c)`; a scalar."""
    return jnp.mean(jnp.square(eps_ram - eps_target))


def semantic_loss(
    eps_ram_sam: jax.Array, eps_neutral: jax.Array, lambda_sem: jax.Array
) -> jax.Array:
    """L_sem of predictions `(B, h, w, c)`; a scalar."""
    return lambda_sem * jnp.mean(jnp.square(eps_ram_sam - eps_neutral))
