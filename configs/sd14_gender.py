"""Gender on SD 1.4: "a woman" and "a man" from "a person" (paper, section 5.1).

    respodiff train --config configs/sd14_gender.py --workdir runs/sd14_gender

The batch size of 1 is the authors'; their rollout is `--config.rollout.kind=faithful`. With more
devices than concepts, give each device a sample: `--config.train.batch_size=4` on 8 devices.

On WinoBias, the paper reports a deviation ratio of 0.68 before and 0.14 after. This config has not
been run on SD 1.4 here.
"""

from ml_collections import ConfigDict

from respodiff_jax.method.paper import GENDER, PROFESSIONS
from respodiff_jax.training.config import add_concepts, default


def get_config() -> ConfigDict:
    config = default()
    config.model.name = "CompVis/stable-diffusion-v1-4"
    config.train.steps = 5000
    config.log.grid_prompts = PROFESSIONS
    add_concepts(config, GENDER)
    return config
