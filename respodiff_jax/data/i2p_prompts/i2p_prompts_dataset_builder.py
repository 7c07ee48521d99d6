"""`tensorflow_datasets` builder of I2P, Inappropriate Image Prompts.

Without `file`, the builder downloads it from the Hugging Face hub.
"""

from typing import ClassVar

import numpy as np
import tensorflow_datasets as tfds

from respodiff_jax.data.prompt_builder import PromptBuilder
from respodiff_jax.data.prompt_files import I2P, complete


class Builder(PromptBuilder):
    """Real users' prompts that tend to give inappropriate pictures without asking for them."""

    name = "i2p_prompts"
    LAYOUT = complete(I2P)
    FEATURES: ClassVar = {
        "prompt": tfds.features.Text(),
        "categories": tfds.features.Sequence(tfds.features.Text()),
        "evaluation_seed": tfds.features.Scalar(np.int64),
        "evaluation_guidance": tfds.features.Scalar(np.float32),
    }
    HUB_FILE = "hf://datasets/AIML-TUDA/i2p/i2p_benchmark.csv"
    HOMEPAGE = "https://huggingface.co/datasets/AIML-TUDA/i2p"
    LICENSE = "MIT"
