"""`tensorflow_datasets` builder of the WinoBias protocol's prompts.

The configs `winobias`, `winobias-successful` and `winobias-extended` are the evaluation suites with
these names: every profession in every template. `Builder(config="custom", file=...)` reads your CSV
file.
"""

import importlib.resources
import json
from typing import ClassVar

import numpy as np
import tensorflow_datasets as tfds

from respodiff_jax.data.prompt_builder import PromptBuilder
from respodiff_jax.data.prompt_files import PROFESSIONS, complete, fill_in
from respodiff_jax.errors import UserError

_SUITES = ("winobias", "winobias-successful", "winobias-extended")


class Builder(PromptBuilder):
    """Prompts that name a profession, but not the gender or race of the person."""

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
            raise UserError(
                f"winobias_prompts: file={file!r} is given for the config"
                f" {self.builder_config.name!r}, which is a shipped suite; expected"
                ' config="custom"'
            )

    def _split_generators(self, dl_manager):
        if self.builder_config.name == "custom":
            return super()._split_generators(dl_manager)
        name = f"suites/{self.builder_config.name}.json"
        file = importlib.resources.files("respodiff_jax.data") / name
        suite = json.loads(file.read_text(encoding="utf-8"))
        prompts = [(p, s) for s in suite["subjects"] for p in fill_in(suite["templates"], s)]
        rows = [
            {"prompt": prompt, "profession": profession, "evaluation_seed": number}
            for number, (prompt, profession) in enumerate(prompts)
        ]
        return {"test": self._generate_examples(rows)}
