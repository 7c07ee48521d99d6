"""`tensorflow_datasets` builder of a concepts file; needs no TensorFlow.

builder = Builder(file="concepts.jsonl", data_dir=DIR, file_format="array_record")
builder.download_and_prepare()
builder.data_path   # what `respodiff train --concepts` takes, as it takes the file itself
"""

import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from etils import epath

from respodiff_jax.data.concept_files import SUFFIXES, read_concepts, read_rows, to_example
from respodiff_jax.data.prompt_files import file_sha256
from respodiff_jax.errors import UserError
from respodiff_jax.method.concepts import HYPER_PARAMETERS


class Builder(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """Concepts to train, in the file's order. Blank texts and NaN stand for what a row leaves out.

    Args:
      file: a concepts file, .jsonl or .csv. Needed to prepare, not to read what is prepared.
      kwargs: of `tfds.core.GeneratorBasedBuilder`, such as `data_dir` and
        `file_format="array_record"`.
    """

    name = "concept_prompts"
    VERSION = tfds.core.Version("1.0.0")

    def __init__(self, *, file: str | os.PathLike | None = None, **kwargs: Any):
        self._file = file
        super().__init__(**kwargs)

    def _info(self):
        text, number = tfds.features.Text(), tfds.features.Scalar(np.float32)
        return tfds.core.DatasetInfo(
            builder=self,
            description=self.__doc__,
            features=tfds.features.FeaturesDict(
                {
                    "name": text,
                    "group": text,
                    "kind": text,
                    "neutral_prompts": tfds.features.Sequence(text),
                    "target_prompt": text,
                    "unsafe_prompt": text,
                }
                | dict.fromkeys(HYPER_PARAMETERS, number)
            ),
            metadata=tfds.core.MetadataDict(),
            disable_shuffling=True,
        )

    def _split_generators(self, dl_manager):
        if self._file is None:
            raise UserError(
                f"{self.name} is made from a concepts file, {' or '.join(SUFFIXES)}; give it as"
                " Builder(file=...)"
            )
        read_concepts(self._file)  # whatever is wrong with them is told now
        path = epath.Path(self._file)
        self.info.metadata.update(file=path.name, sha256=file_sha256(path))
        return {"train": self._generate_examples(read_rows(path))}

    def _generate_examples(self, rows: Sequence[Mapping[str, Any]]):
        for number, row in enumerate(rows):
            yield number, to_example(row)
