"""A test of the whole pipeline, in a minute on two CPU cores.

    respodiff train --config configs/smoke.py --workdir runs/smoke

The model is a miniature with random weights, so nothing is downloaded. Its pictures are noise; only
the losses are meaningful.
"""

from ml_collections import ConfigDict

from respodiff_jax.method.paper import GENDER
from respodiff_jax.training.config import add_concepts, default


def get_config() -> ConfigDict:
    config = default()
    config.model.name = "random/tiny"
    config.model.dtype = "float32"
    config.rollout.num_steps = 10
    config.train.steps = 60
    config.train.batch_size = 8
    config.checkpoint.every = 20
    config.log.grid_every = 30
    config.log.grid_steps = 10
    config.reading.train = False  # random text states cannot be read
    add_concepts(config, GENDER)
    return config
