"""Gender on SD 1.4: "a woman" and "a man" from "a person" (paper, section 5.1).

    respodiff train --config configs/sd14_gender.py --workdir runs/sd14_gender

Batch 1 is the authors', and `--config.rollout.kind=faithful` their rollout. On more devices than
concepts give each of them a sample: `--config.train.batch_size=4` on 8 devices. The paper reports,
on WinoBias, a deviation ratio of 0.68 before and 0.14 after; this config has not been run on SD 1.4
here.
"""

from ml_collections import ConfigDict

from respodiff_jax.method.paper import GENDER
from respodiff_jax.training.config import add_concepts, default


def get_config() -> ConfigDict:
    config = default()
    config.model.name = "CompVis/stable-diffusion-v1-4"
    config.train.steps = 5000
    add_concepts(config, GENDER)
    return config
