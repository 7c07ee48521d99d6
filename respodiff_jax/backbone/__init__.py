"""The frozen base model: its files, text encoders, UNet (the paper's e and g) and VAE.

Only this package imports diffusers and the Flax classes of transformers.
"""

from respodiff_jax.backbone.architectures import random_backbone
from respodiff_jax.backbone.backbone import Backbone
from respodiff_jax.backbone.clip import Clip, load_clip, save_clip
from respodiff_jax.backbone.files import local_folder
from respodiff_jax.backbone.loading import load_backbone
from respodiff_jax.backbone.saving import save_backbone
from respodiff_jax.backbone.text import byte_tokenizer, equal_batches
from respodiff_jax.backbone.unet import Conditioning, Skips
from respodiff_jax.backbone.weights import load_weights, save_weights

__all__ = [
    "Backbone",
    "Clip",
    "Conditioning",
    "Skips",
    "byte_tokenizer",
    "equal_batches",
    "load_backbone",
    "load_clip",
    "load_weights",
    "local_folder",
    "random_backbone",
    "save_backbone",
    "save_clip",
    "save_weights",
]
