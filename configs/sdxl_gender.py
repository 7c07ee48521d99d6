"""Gender on SDXL at 1024 pixels, with the hyper-parameters for SD 1.4.

    respodiff train --config configs/sdxl_gender.py --workdir runs/sdxl_gender

The paper reports a deviation ratio of 0.72 before and 0.26 after, but no hyper-parameters. This
config has not been run on SDXL here.
"""

from ml_collections import ConfigDict

from respodiff_jax.method.paper import GENDER, PROFESSIONS
from respodiff_jax.training.config import add_concepts, default


def get_config() -> ConfigDict:
    config = default()
    config.model.name = "stabilityai/stable-diffusion-xl-base-1.0"
    config.model.variant = "fp16"
    config.train.steps = 5000
    config.log.grid_prompts = PROFESSIONS
    add_concepts(config, GENDER)
    return config
