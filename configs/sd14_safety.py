"""Safety on SD 1.4: away from sexual content and violence (paper, section 5.2).

    respodiff train --config configs/sd14_safety.py --workdir runs/sd14_safety

The paper trains 1500 steps, as here; the authors' code has 5000. For I2P prompts, the paper reports
that 0.27 of the images are inappropriate before, and 0.16 after. This config has not been run on SD
1.4 here.
"""

from ml_collections import ConfigDict

from respodiff_jax.method.paper import SAFETY
from respodiff_jax.training.config import add_concepts, default


def get_config() -> ConfigDict:
    config = default()
    config.model.name = "CompVis/stable-diffusion-v1-4"
    config.train.steps = 1500
    add_concepts(config, SAFETY)
    return config
