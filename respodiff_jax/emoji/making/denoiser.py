"""Stage `unet`: the latent diffusion UNet.

Text enters only at the mid-block: no other block has cross-attention. RAM and SAM steer the
mid-block's output, which therefore carries all that the text asks for.
"""

import concurrent.futures
import functools
import hashlib
import multiprocessing
import os
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax

from respodiff_jax.backbone.clip import build_clip, encode_contexts
from respodiff_jax.backbone.flax_models import FlaxUNet2DConditionModel
from respodiff_jax.emoji.making import autoencoder, captions, clip, loop, rendering
from respodiff_jax.method.schedule import Schedule

CONFIG = dict(
    sample_size=16,
    in_channels=4,
    out_channels=4,
    down_block_types=("DownBlock2D",) * 3,
    up_block_types=("UpBlock2D",) * 3,
    block_out_channels=(64, 64, 192),
    layers_per_block=1,
    transformer_layers_per_block=(1, 1, 4),  # the last is that of the mid-block
    attention_head_dim=4,  # the number of heads, as in diffusers' configs of Stable Diffusion 1.x
    cross_attention_dim=clip.TEXT["hidden_size"],
)
SCHEDULER = {
    "_class_name": "DDIMScheduler",
    "num_train_timesteps": 1000,
    "beta_schedule": "squaredcos_cap_v2",
    "prediction_type": "epsilon",
    "timestep_spacing": "leading",
    "steps_offset": 1,
    "clip_sample": False,
    "set_alpha_to_one": False,
}
NAMING = captions.Naming(tone=0.4, unsafe=0.3, safe=0.15)
MIN_SNR = 5.0
EMA_DECAY = 0.999
_CHUNK = 1000


def encode_pool(workdir, vae_params, *, size, seed, batch_size=100):
    """Renders and encodes `size` captioned pictures, once for the whole training of the UNet.

    The folder `<workdir>/pool-<hash of the encoder>` keeps them.

    Returns:
      Unscaled latents, float16 (size, 16, 16, 4), and the list of their captions.
    """
    vae = autoencoder.build()
    encode = jax.jit(functools.partial(autoencoder.encode, vae))
    encoder = jax.tree.leaves([vae_params["encoder"], vae_params["quant_conv"]])
    digest = hashlib.sha256(b"".join(np.asarray(leaf).tobytes() for leaf in encoder))
    folder = pathlib.Path(workdir) / f"pool-{digest.hexdigest()[:8]}"
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{chunk:04d}.npz" for chunk in range(-(-size // _CHUNK))]
    missing = [chunk for chunk, path in enumerate(paths) if not path.exists()]
    spawn = multiprocessing.get_context("spawn")
    workers = min(os.cpu_count(), len(missing)) or 1
    with concurrent.futures.ProcessPoolExecutor(workers, spawn) as renderers:
        drawn = renderers.map(functools.partial(_draw_chunk, seed), missing)
        for chunk, (texts, images) in zip(missing, drawn, strict=True):
            encoded = [
                np.asarray(encode(vae_params, images[start : start + batch_size]), np.float16)
                for start in range(0, _CHUNK, batch_size)
            ]
            partial = paths[chunk].with_suffix(".partial.npz")
            np.savez(partial, latents=np.concatenate(encoded), captions=np.array(texts))
            partial.replace(paths[chunk])
            print(f"pool: {min((chunk + 1) * _CHUNK, size)}/{size}", flush=True)
    latents, texts = [], []
    for path in paths:
        with np.load(path) as stored:
            latents.append(stored["latents"])
            texts += stored["captions"].tolist()
    return np.concatenate(latents)[:size], texts[:size]


def _draw_chunk(seed, chunk):
    """Draws a chunk of the pool: captions, and pictures as uint8 (_CHUNK, 64, 64, 3)."""
    rng = np.random.default_rng([seed, chunk])
    drawn = [captions.draw(rng, NAMING) for _ in range(_CHUNK)]
    images = np.stack([rendering.render(scene, rng) for _, _, scene in drawn])
    return [caption for caption, _, _ in drawn], images


def encode_captions(params, tokenizer, texts, batch_size=200):
    """Encodes the distinct captions with the text tower.

    Returns:
      contexts: last hidden states, float16 (U, L, D).
      rows: for each text, the row of its context, int (len(texts),).
    """
    encode = jax.jit(functools.partial(encode_contexts, build_clip(clip.config(tokenizer))))
    distinct, rows = np.unique(np.array(texts), return_inverse=True)
    ids = clip.tokenize(tokenizer, distinct.tolist())
    ids = np.pad(ids, ((0, -len(ids) % batch_size), (0, 0)))
    contexts = [
        np.asarray(encode(params, part), np.float16)
        for part in np.split(ids, len(ids) // batch_size)
    ]
    return np.concatenate(contexts)[: len(distinct)], rows


def loss_fn(unet, params, batch, alpha_bars, key):
    """Loss and metrics: error of the noise, weighted by min(SNR, 5) / SNR (Hang et al., 2023)."""
    time_key, noise_key = jax.random.split(key)
    z_0 = batch["latents"].astype(jnp.float32)
    timesteps = jax.random.randint(time_key, (len(z_0),), 0, len(alpha_bars))
    eps = jax.random.normal(noise_key, z_0.shape)
    alpha_bar = alpha_bars[timesteps]
    a = alpha_bar[:, None, None, None]
    z_t = jnp.sqrt(a) * z_0 + jnp.sqrt(1 - a) * eps
    predicted = unet.apply(
        {"params": params},
        z_t.transpose(0, 3, 1, 2),
        timesteps,
        batch["context"].astype(jnp.float32),
    ).sample.transpose(0, 2, 3, 1)
    error = ((predicted - eps) ** 2).mean((1, 2, 3))
    snr = alpha_bar / (1 - alpha_bar)
    return (jnp.minimum(snr, MIN_SNR) / snr * error).mean(), {"mse": error.mean()}


def train(
    workdir,
    latents,
    contexts,
    rows,
    *,
    steps,
    batch_size,
    seed,
    learning_rate=1e-3,
    params=None,
    on_save=None,
):
    """Trains the UNet; returns the moving average of its parameters.

    Args:
      workdir: folder of the checkpoint.
      latents: float16 (N, 16, 16, 4), scaled to unit variance.
      contexts, rows: from `encode_captions`.
      steps, batch_size, seed, learning_rate: of the training.
      params: initial parameters; None draws them.
      on_save: called with the averaged parameters at each checkpoint.
    """
    unet = FlaxUNet2DConditionModel(**CONFIG)
    timesteps = SCHEDULER["num_train_timesteps"]
    alpha_bars = jnp.array(
        Schedule.from_config(SCHEDULER | {"steps_offset": 0}, timesteps).alpha_bars[::-1]
    )
    warmup, decay = min(200, steps // 10), steps // 4
    schedule = optax.join_schedules(
        [
            optax.linear_schedule(0.0, learning_rate, warmup),
            optax.constant_schedule(learning_rate),
            optax.linear_schedule(learning_rate, learning_rate / 50, decay),
        ],
        [warmup, steps - decay],
    )
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(schedule, b2=0.99))

    def batch_fn(step):
        index = np.random.default_rng([seed, step]).integers(len(latents), size=batch_size)
        return {"latents": latents[index], "context": contexts[rows[index]]}

    def loss(params, batch, step):
        key = jax.random.fold_in(jax.random.key(seed), step)
        return loss_fn(unet, params, batch, alpha_bars, key)

    update = loop.gradient_step(loss, optimizer)

    def step_fn(state, batch, step):
        updated, metrics = update(state, batch, step)
        decay = jnp.minimum(EMA_DECAY, (1.0 + step) / (10.0 + step))
        average = jax.tree.map(
            lambda old, new: decay * old + (1 - decay) * new, state["average"], updated["params"]
        )
        return updated | {"average": average}, metrics

    if params is None:
        params = jax.jit(unet.init_weights)(jax.random.key(seed))
    average = jax.tree.map(jnp.copy, params)
    state = {"params": params, "average": average, "opt_state": optimizer.init(params)}

    def save_average(state):
        if on_save is not None:
            on_save(jax.device_get(state["average"]))

    final = loop.train_stage("unet", state, step_fn, batch_fn, steps, workdir, on_save=save_average)
    return final["average"]
