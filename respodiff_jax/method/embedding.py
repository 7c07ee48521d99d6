"""Embedded concepts: the arrays that a training step reads of each concept."""

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import ArrayLike, Bool, Float32, Int32, UInt32

from respodiff_jax.backbone import Backbone, Conditioning
from respodiff_jax.method.concepts import Concept


class EmbeddedConcepts(NamedTuple):
    """N concepts as arrays. Every leaf has a leading concept axis N; in `algorithm_1` it has none.

    Attributes:
      neutral: `y_neu`, `(N, P, ...)`. A concept with fewer than P neutral prompts repeats its last.
      num_neutral: the number of the concept's own neutral prompts, at most P.
      own: the target prompt of each neutral prompt or, for a safety concept without target prompts,
        the unsafe prompt, `(N, P, ...)`.
      empty: the empty prompt, `(N, ...)`. It is also the rollout's unconditional half.
      is_safety: whether it is a safety concept, otherwise a fairness concept.
      has_counterparts: whether each neutral prompt has its own target prompt.
      guidance_scale: `s_tar` of each neutral prompt.
      lambda_sem: lambda, the factor in L_sem.
      lr_ram, lr_sam: learning rates of RAM and of SAM.
      stream: names the concept's random stream.
    """

    neutral: Conditioning
    num_neutral: Int32[ArrayLike, "N"]
    own: Conditioning
    empty: Conditioning
    is_safety: Bool[ArrayLike, "N"]
    has_counterparts: Bool[ArrayLike, "N"]
    guidance_scale: Float32[ArrayLike, "N P"]
    lambda_sem: Float32[ArrayLike, "N"]
    lr_ram: Float32[ArrayLike, "N"]
    lr_sam: Float32[ArrayLike, "N"]
    stream: UInt32[ArrayLike, "N"]


def embed_concepts(
    backbone: Backbone,
    concepts: Sequence[Concept],
    resolution: int | None = None,
    max_neutral: int | None = None,
) -> EmbeddedConcepts:
    """Embeds the concepts' prompts, each distinct prompt once.

    Args:
      backbone: with the parameters of its text encoders.
      concepts: N concepts.
      resolution: in pixels; None is the model's own.
      max_neutral: P, at least the largest number of neutral prompts of a concept, the default.

    Returns:
      numpy arrays on the host, leaves `(N, ...)`.

    Raises:
      UserError: if the model does not have this resolution.
    """
    resolution = resolution or backbone.default_resolution
    max_neutral = max_neutral or max(len(c.neutral_prompts) for c in concepts)

    def padded(prompts):
        return [*prompts, *[prompts[-1]] * (max_neutral - len(prompts))]

    distinct = sorted({"", *itertools.chain(*(c.prompts for c in concepts))})
    table = jax.tree.map(np.asarray, backbone.encode_prompts(distinct, resolution))
    row = {prompt: i for i, prompt in enumerate(distinct)}

    def embedded(prompts):
        rows = np.vectorize(row.get, otypes=[int])(np.asarray(prompts, object))
        return jax.tree.map(lambda x: x[rows], table)

    def per_concept(field: str, dtype=np.float32):
        return np.asarray([getattr(c, field) for c in concepts], dtype)

    return EmbeddedConcepts(
        neutral=embedded([padded(c.neutral_prompts) for c in concepts]),
        num_neutral=np.asarray([len(c.neutral_prompts) for c in concepts], np.int32),
        own=embedded([padded(c.own_prompts) for c in concepts]),
        empty=embedded([""] * len(concepts)),
        is_safety=per_concept("is_safety", np.bool_),
        has_counterparts=per_concept("has_counterparts", np.bool_),
        guidance_scale=np.asarray([padded(c.guidance_scales) for c in concepts], np.float32),
        lambda_sem=per_concept("lambda_sem"),
        lr_ram=per_concept("lr_ram"),
        lr_sam=per_concept("lr_sam"),
        stream=per_concept("stream", np.uint32),
    )


def concept_shapes(
    backbone: Backbone, concepts: Sequence[Concept], resolution: int, count: int | None = None
) -> EmbeddedConcepts:
    """Shapes and dtypes of `embed_concepts`, without embedding a prompt.

    `count` of the concepts train together, by default all. The concept with the most neutral
    prompts sets the length of that axis.
    """
    prompt = jax.eval_shape(
        lambda params: backbone.encode_prompts([""], resolution, params), backbone.params
    )
    n, max_neutral = count or len(concepts), max(len(c.neutral_prompts) for c in concepts)

    def prompts(*axes):
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct((*axes, *x.shape[1:]), x.dtype), prompt)

    return EmbeddedConcepts(
        neutral=prompts(n, max_neutral),
        num_neutral=jax.ShapeDtypeStruct((n,), np.int32),
        own=prompts(n, max_neutral),
        empty=prompts(n),
        is_safety=jax.ShapeDtypeStruct((n,), np.bool_),
        has_counterparts=jax.ShapeDtypeStruct((n,), np.bool_),
        guidance_scale=jax.ShapeDtypeStruct((n, max_neutral), np.float32),
        lambda_sem=jax.ShapeDtypeStruct((n,), np.float32),
        lr_ram=jax.ShapeDtypeStruct((n,), np.float32),
        lr_sam=jax.ShapeDtypeStruct((n,), np.float32),
        stream=jax.ShapeDtypeStruct((n,), np.uint32),
    )
