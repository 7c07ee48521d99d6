"""The score-matching objectives of RAM and SAM (paper, section 4.2).

    L_resp = mean || eps(z_t, y_neu; RAM)     - eps_target ||^2              gradient to RAM
    L_sem  = lambda * mean || eps(z_t, y_neu; RAM+SAM) - eps(z_t, y_neu; 0) ||^2   gradient to SAM
    eps_target = eps(z_t, y_unc; 0) + s_tar * (eps(z_t, y_tar; 0) - eps(z_t, y_unc; 0))

Fairness: `y_tar` is the target prompt and `y_unc` the empty one. Safety: `y_tar` is the neutral
prompt and `y_unc` the unsafe one, so that the target points away from it. The mean is over all
elements of the batch. The neutral predictions have guidance 1, so their unconditional half cancels.
"""

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from respodiff_jax.backbone import Backbone, Conditioning
from respodiff_jax.concepts import Concept


class ConceptArrays(NamedTuple):
    """What a training step reads of each concept; all leaves have a leading concept axis N.

    Attributes:
      neutral: `y_neu`, `(N, P, ...)`; concepts with fewer than P neutral prompts repeat their last.
      num_neutral: int32 `(N,)`, how many of the P are the concept's own.
      target_cond: `y_tar` that goes with each neutral prompt, `(N, P, ...)`.
      target_uncond: `y_unc` of the target, `(N, ...)`.
      empty: the empty prompt, the rollout's unconditional half, `(N, ...)`.
      guidance_scale: `s_tar`, float32 `(N,)`.
      lambda_sem: weight of L_sem, float32 `(N,)`.
      lr_ram: float32 `(N,)`.
      lr_sam: float32 `(N,)`.
      stream: uint32 `(N,)`, names the concept's random stream.
    """

    neutral: Conditioning
    num_neutral: jax.Array
    target_cond: Conditioning
    target_uncond: Conditioning
    empty: Conditioning
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

    neutral = [padded(c.neutral_prompts) for c in concepts]
    target_cond = [
        prompts if c.is_safety else [c.target_prompt] * most_neutral
        for c, prompts in zip(concepts, neutral, strict=True)
    ]
    target_uncond = [c.unsafe_prompt if c.is_safety else "" for c in concepts]

    distinct = sorted({"", *target_uncond, *itertools.chain(*neutral, *target_cond)})
    table = jax.tree.map(np.asarray, backbone.encode_prompts(distinct, resolution))
    row = {prompt: i for i, prompt in enumerate(distinct)}

    def embedded(prompts):
        rows = np.vectorize(row.get, otypes=[int])(np.asarray(prompts, object))
        return jax.tree.map(lambda x: x[rows], table)

    def per_concept(field: str, dtype=np.float32):
        return np.asarray([getattr(c, field) for c in concepts], dtype)

    return ConceptArrays(
        neutral=embedded(neutral),
        num_neutral=np.asarray([len(c.neutral_prompts) for c in concepts], np.int32),
        target_cond=embedded(target_cond),
        target_uncond=embedded(target_uncond),
        empty=embedded([""] * len(concepts)),
        guidance_scale=per_concept("guidance_scale"),
        lambda_sem=per_concept("lambda_sem"),
        lr_ram=per_concept("lr_ram"),
        lr_sam=per_concept("lr_sam"),
        stream=per_concept("stream", np.uint32),
    )


def responsible_loss(eps_ram: jax.Array, eps_target: jax.Array) -> jax.Array:
    """L_resp of predictions `(B, h, w, c)`; a scalar."""
    return jnp.mean(jnp.square(eps_ram - eps_target))


def semantic_loss(
    eps_ram_sam: jax.Array, eps_neutral: jax.Array, lambda_sem: jax.Array
) -> jax.Array:
    """L_sem of predictions `(B, h, w, c)`; a scalar."""
    return lambda_sem * jnp.mean(jnp.square(eps_ram_sam - eps_neutral))
