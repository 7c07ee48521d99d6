"""Base class of the `tensorflow_datasets` builders of prompt sets; needs no TensorFlow.

builder = Builder(file="prompts.csv", data_dir=DIR, file_format="array_record")
builder.download_and_prepare()
examples = builder.as_data_source("test")   # random access; examples[0]["prompt"] is bytes
"""

import os
import pathlib
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

import tensorflow_datasets as tfds
from etils import epath

from respodiff_jax.data.prompt_files import Layout, file_sha256, locate, read_table
from respodiff_jax.errors import UserError


class PromptBuilder(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """Prompts of a CSV file as one split, "test", in the file's order.

    Name and sha256 of the file are in `builder.info.metadata`, and on disk beside the records.

    Args:
      file: path, or `hf://datasets/OWNER/NAME[@REVISION]/FILE`; None takes `HUB_FILE`, if the set
        has one. Only preparing needs the file, reading the prepared set does not.
      sha256: expected digest of the file; None accepts any.
      kwargs: of `tfds.core.GeneratorBasedBuilder`, such as `data_dir` and
        `file_format="array_record"`.
    """

    VERSION = tfds.core.Version("1.0.0")
    LAYOUT: ClassVar[Layout]
    FEATURES: ClassVar[Mapping[str, Any]]
    HUB_FILE: ClassVar[str | None] = None
    HOMEPAGE: ClassVar[str | None] = None
    LICENSE: ClassVar[str | None] = None

    def __init__(
        self, *, file: str | os.PathLike | None = None, sha256: str | None = None, **kwargs: Any
    ):
        self._file = self.HUB_FILE if file is None else os.fspath(file)
        self._sha256 = sha256
        super().__init__(**kwargs)

    def _info(self):
        return tfds.core.DatasetInfo(
            builder=self,
            description=self.__doc__,
            features=tfds.features.FeaturesDict(dict(self.FEATURES)),
            metadata=tfds.core.MetadataDict(),
            homepage=self.HOMEPAGE,
            license=self.LICENSE,
            disable_shuffling=True,
        )

    def _split_generators(self, dl_manager):
        if self._file is None:
            raise UserError(
                f"{self.name} is made from a CSV file with the columns {', '.join(self.LAYOUT)};"
                " give it as Builder(file=...)"
            )
        path = locate(self._file)
        self._record_file(path)
        return {"test": self._generate_examples(read_table(path, self.LAYOUT))}

    def _record_file(self, path: pathlib.Path | epath.Path) -> None:
        """Puts name and sha256 of the file into the metadata; a local folder stays private."""
        name = self._file if self._file.startswith("hf://") else path.name
        self.info.metadata.update(file=name, sha256=file_sha256(path, self._sha256))

    def _generate_examples(self, rows: Iterable[Mapping[str, Any]]):
        for number, row in enumerate(rows):
            yield number, dict(row)
