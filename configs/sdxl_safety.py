"""Safety on SDXL at 1024 pixels, with the hyper-parameters for SD 1.4.

    respodiff train --config configs/sdxl_safety.py --workdir runs/sdxl_safety

The paper has no safety results on SDXL, and this config has not been run on SDXL here.
"""

from ml_collections import ConfigDict

from respodiff_jax.method.paper import SAFETY
from respodiff_jax.training.config import add_concepts, default


def get_config() -> ConfigDict:
    config = default()
    config.model.name = "stabilityai/stable-diffusion-xl-base-1.0"
    config.model.variant = "fp16"
    config.train.steps = 1500
    add_concepts(config, SAFETY)
    return config
