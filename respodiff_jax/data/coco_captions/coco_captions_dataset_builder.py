"""`tensorflow_datasets` builder of COCO-30k's captions, from a file of your own."""

from typing import ClassVar

import numpy as np
import tensorflow_datasets as tfds

from respodiff_jax.data.prompt_builder import PromptBuilder
from respodiff_jax.data.prompt_files import CAPTIONS, Column, complete


class Builder(PromptBuilder):
    """Captions of everyday pictures, each with the COCO number of its picture."""

    name = "coco_captions"
    LAYOUT = complete(CAPTIONS) | {"image_id": Column(int, "an integer")}
    FEATURES: ClassVar = {
        "prompt": tfds.features.Text(),
        "image_id": tfds.features.Scalar(np.int64),
        "evaluation_seed": tfds.features.Scalar(np.int64),
    }
    HOMEPAGE = "https://cocodataset.org"
    LICENSE = "CC BY 4.0"
