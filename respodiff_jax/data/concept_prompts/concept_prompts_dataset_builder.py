"""`tensorflow_datasets` builder of a concepts file.

`respodiff train --concepts` takes the prepared folder, `builder.data_path`, or the file itself.
"""

from typing import ClassVar

import numpy as np
import tensorflow_datasets as tfds
from etils import epath

from respodiff_jax.data.concept_files import (
    CONCEPTS,
    SUFFIXES,
    read_concepts,
    read_rows,
    to_example,
)
from respodiff_jax.data.prompt_builder import PromptBuilder
from respodiff_jax.errors import UserError
from respodiff_jax.method.concepts import HYPER_PARAMETERS

_TEXT, _NUMBER = tfds.features.Text(), tfds.features.Scalar(np.float32)


class Builder(PromptBuilder):
    """Concepts to train, in the file's order. "" and NaN stand for fields that a row leaves out."""

    name = "concept_prompts"
    FEATURES: ClassVar = {
        name: _NUMBER if name in HYPER_PARAMETERS else _TEXT for name in CONCEPTS
    } | {"neutral_prompts": tfds.features.Sequence(_TEXT)}

    def _split_generators(self, dl_manager):
        if self._file is None:
            raise UserError(
                f"{self.name} is made from a concepts file, {' or '.join(SUFFIXES)}; give it as"
                " Builder(file=...)"
            )
        read_concepts(self._file)  # reports every mistake before anything is written
        self._record_file(epath.Path(self._file))
        rows = [to_example(row) for _, row in read_rows(self._file)]
        return {"train": self._generate_examples(rows)}
