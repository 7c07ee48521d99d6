"""`tensorflow_datasets` builder of the WinoBias protocol's prompts; needs no TensorFlow.

    builder = Builder(config="winobias", data_dir=DIR, file_format="array_record")
    builder.download_and_prepare()
    examples = builder.as_data_source("test")   # random access; examples[0]["prompt"] is bytes

`winobias`, `winobias-successful` and `winobias-extended` are the evaluation suites of these names:
every profession under every template. `custom` is a CSV file of yours,
`Builder(config="custom", file=...)`.
"""

from typing import ClassVar

import numpy as np
import tensorflow_datasets as tfds

from respodiff_jax.data.prompt_builder import PromptBuilder
from respodiff_jax.data.prompt_files import PROFESSIONS, complete
from respodiff_jax.evaluation.suites import load_suite

_SUITES = ("winobias", "winobias-successful", "winobias-extended")


class Builder(PromptBuilder):
    """Prompts that name a profession and say nothing of who has it."""

    name = "winobias_prompts"
    BUILDER_CONFIGS: ClassVar = [
        tfds.core.BuilderConfig(name=name) for name in (*_SUITES, "custom")
    ]
    LAYOUT = complete(PROFESSIONS)
    FEATURES: ClassVar = {
        "prompt": tfds.features.Text(),
        "profession": tfds.features.Text(),
        "evaluation_seed": tfds.features.Scalar(np.int64),
    }

    def __init__(self, *, file=None, **options):
        super().__init__(file=file, **options)
        if file is not None and self.builder_config.name != "custom":
            raise ValueError(
                f"winobias_prompts: file={file!r} is given for the config"
                f" {self.builder_config.name!r}, which is a shipped suite; expected"
                ' config="custom"'
            )

    def _split_generators(self, dl_manager):
        if self.builder_config.name == "custom":
            return super()._split_generators(dl_manager)
        prompts = load_suite(self.builder_config.name).prompts_for("fairness")
        rows = [
            {"prompt": prompt.text, "profession": prompt.subject, "evaluation_seed": number}
            for number, prompt in enumerate(prompts)
        ]
        return {"test": self._generate_examples(rows)}
