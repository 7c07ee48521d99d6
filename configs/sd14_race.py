"""Race on SD 1.4: three concepts from "a person" (paper, section 5.1).

    respodiff train --config configs/sd14_race.py --workdir runs/sd14_race

Three concepts cannot be divided among 4 or 8 devices, so all devices share the batch of each
concept: set `--config.train.batch_size` to a multiple of the number of devices.

On WinoBias, the paper reports a deviation ratio of 0.56 before and 0.16 after. This config has not
been run on SD 1.4 here.
"""

from ml_collections import ConfigDict

from respodiff_jax.method.paper import PROFESSIONS, RACE
from respodiff_jax.training.config import add_concepts, default


def get_config() -> ConfigDict:
    config = default()
    config.model.name = "CompVis/stable-diffusion-v1-4"
    config.train.steps = 5000
    config.log.grid_prompts = PROFESSIONS
    add_concepts(config, RACE)
    return config
