"""Stage `vae`: the KL autoencoder, from 64x64 pixels to 16x16x4 latents and back."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax

from respodiff_jax.backbone.flax_models import FlaxAutoencoderKL
from respodiff_jax.emoji.making import captions, loop, rendering

CONFIG = dict(
    in_channels=3,
    out_channels=3,
    down_block_types=("DownEncoderBlock2D",) * 3,
    up_block_types=("UpDecoderBlock2D",) * 3,
    block_out_channels=(32, 32, 64),
    layers_per_block=1,
    latent_channels=4,
    norm_num_groups=8,
    sample_size=rendering.IMAGE_SIZE,
)
SQUARE_WEIGHT, EDGE_WEIGHT, KL_WEIGHT = 4.0, 0.5, 1e-5


def build():
    """Builds the unbound `FlaxAutoencoderKL`."""
    return FlaxAutoencoderKL(**CONFIG)


def to_model(images):
    """uint8 (B, height, width, 3) -> the Flax model's float32 (B, 3, height, width) in [-1, 1]."""
    return jnp.asarray(images, jnp.float32).transpose(0, 3, 1, 2) / 127.5 - 1


def encode(vae, params, images):
    """uint8 (B, 64, 64, 3) -> mean of the latents (B, 16, 16, 4), unscaled."""
    return vae.apply({"params": params}, to_model(images), method=vae.encode).latent_dist.mean


def _edges(pixels):
    return jnp.diff(pixels, axis=2), jnp.diff(pixels, axis=3)


def loss_fn(vae, params, images, key):
    """Loss and metrics: L1, squared error (colours), L1 of differences (edges), a slight KL."""
    target = to_model(images)
    posterior = vae.apply({"params": params}, target, method=vae.encode).latent_dist
    latents = posterior.mean + posterior.std * jax.random.normal(key, posterior.mean.shape)
    output = vae.apply({"params": params}, latents.transpose(0, 3, 1, 2), method=vae.decode).sample
    pixel = jnp.abs(output - target).mean()
    edge = sum(jnp.abs(a - b).mean() for a, b in zip(_edges(output), _edges(target), strict=True))
    kl = 0.5 * (posterior.mean**2 + jnp.exp(posterior.logvar) - 1 - posterior.logvar).mean()
    square = ((output - target) ** 2).mean()
    loss = pixel + SQUARE_WEIGHT * square + EDGE_WEIGHT * edge + KL_WEIGHT * kl
    return loss, {"l1": pixel, "mse": square, "edge": edge, "kl": kl}


def draw_batch(step, size, seed):
    """Draws the pictures of a step, uint8 (size, 64, 64, 3)."""
    rng = np.random.default_rng([seed, step])
    return np.stack([rendering.render(captions.draw(rng)[2], rng) for _ in range(size)])


def train(workdir, *, steps, batch_size, seed):
    """Trains the autoencoder; returns its parameters."""
    vae = build()
    schedule = optax.warmup_cosine_decay_schedule(0.0, 2e-3, min(100, steps // 10), steps, 2e-5)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(schedule, b2=0.99))

    def loss(params, images, step):
        return loss_fn(vae, params, images, jax.random.fold_in(jax.random.key(seed), step))

    params = jax.jit(vae.init_weights)(jax.random.key(seed))
    state = {"params": params, "opt_state": optimizer.init(params)}
    batch_fn = functools.partial(draw_batch, size=batch_size, seed=seed)
    step_fn = loop.gradient_step(loss, optimizer)
    return loop.train_stage("vae", state, step_fn, batch_fn, steps, workdir)["params"]
