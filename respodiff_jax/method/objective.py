"""The score-matching objectives of RAM and SAM (paper, section 4.2).

    L_resp = mean || eps(z_t, y_neu; RAM)     - eps_target ||^2              gradient to RAM
    L_sem  = lambda * mean || eps(z_t, y_neu; RAM+SAM) - eps(z_t, y_neu; 0) ||^2   gradient to SAM
    eps_target = eps(z_t, y_unc; 0) + s_tar * (eps(z_t, y_tar; 0) - eps(z_t, y_unc; 0))

Fairness: `y_tar` is the target prompt and `y_unc` the empty one. Safety: `y_tar` is the neutral
prompt and `y_unc` the unsafe one, so that the target points away from it. The base model is
evaluated for three prompts, the neutral one, the concept's own and the empty one; `target` selects
`y_tar` and `y_unc` among them. The losses average over all elements of the batch. Their predictions
for the neutral prompt have guidance 1, which needs no unconditional prediction.
Deviation: a concept with counterparts, which the paper does not have, has the counterpart as
`y_tar` and the neutral prompt as `y_unc`.
"""

import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Float32, Int32

from respodiff_jax.method.diffusion import Latent, cfg_combine
from respodiff_jax.method.embedding import EmbeddedConcepts


def target(
    concept: EmbeddedConcepts,
    prompt_index: Int32[ArrayLike, "B"],
    eps_neutral: Latent,
    eps_own: Latent,
    eps_empty: Latent,
) -> Latent:
    """`eps_target` of one concept, from the base model's predictions."""
    eps_tar = jnp.where(concept.is_safety, eps_neutral, eps_own)
    eps_unc = jnp.where(concept.is_safety, eps_own, eps_empty)
    eps_tar = jnp.where(concept.has_counterparts, eps_own, eps_tar)
    eps_unc = jnp.where(concept.has_counterparts, eps_neutral, eps_unc)
    scale = jnp.asarray(concept.guidance_scale)[prompt_index]
    return cfg_combine(eps_tar, eps_unc, scale[:, None, None, None])


def responsible_loss(eps_ram: Latent, eps_target: Latent) -> Float32[Array, ""]:
    """L_resp, which trains RAM."""
    return jnp.mean(jnp.square(eps_ram - eps_target))


def semantic_loss(
    eps_ram_sam: Latent, eps_neutral: Latent, lambda_sem: Float32[ArrayLike, ""]
) -> Float32[Array, ""]:
    """L_sem, which trains SAM."""
    return lambda_sem * jnp.mean(jnp.square(eps_ram_sam - eps_neutral))
