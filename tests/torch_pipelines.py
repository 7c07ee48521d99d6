"""Sampling with diffusers' pipelines and adapters that were saved by JAX."""

import diffusers
import numpy as np
import torch
from test_adapters import MAN, VIOLENCE, WOMAN, make_adapter

from respodiff_jax.adapters import save_adapter
from respodiff_jax.generation.sampling import initial_noise
from respodiff_jax.torch_adapter import RespoDiffAdapter

SHAPE = (4, 4, 64)  # of the tiny models' mid-blocks
PROMPTS = ["a person", "two women on a boat"]
ROWS = [{"a woman": 1.0}, {"a man": 0.5}, {"a woman": 0.3, "anti-violence": 1.0}, {}]
NOISE = np.asarray(initial_noise(range(4), (8, 8, 4)))  # for the tiny models


def pipeline(folder):
    pipe = diffusers.DiffusionPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def torch_latents(pipe, prompts=PROMPTS, noise=NOISE, steps=50, guidance_scale=7.5, **options):
    """z_0, (B, h, w, c), of a text-to-image pipeline; each prompt gets equally many images."""
    latents = pipe(
        prompts,
        latents=torch.tensor(noise).permute(0, 3, 1, 2).to(pipe.unet.dtype),
        num_images_per_prompt=len(noise) // len(prompts),
        num_inference_steps=steps,
        guidance_scale=guidance_scale,
        output_type="latent",
        **options,
    ).images
    return latents.permute(0, 2, 3, 1).float().numpy()


def make_load(tmp_path):
    """A function that saves a Flax adapter and loads it in PyTorch."""
    folders = map(str, range(100))

    def load(adapter):
        folder = tmp_path / next(folders)
        save_adapter(adapter, folder)
        return RespoDiffAdapter.from_pretrained(folder)

    return load


def people(kind="constant", shape=SHAPE, **options):
    return make_adapter(kind, (WOMAN, MAN, VIOLENCE), shape=shape, **options)


def assert_close(ours, theirs, tolerance=1e-3):
    assert np.linalg.norm(ours - theirs) <= tolerance * np.linalg.norm(theirs)
