"""What the command line reads besides options: scales of concepts, files of prompts."""

import pytest

from respodiff_jax.cli import inputs
from respodiff_jax.errors import UserError


def test_scales_of_concepts_are_parsed():
    scales = inputs.read_scales("--concept", ["a man", "a=b=0.5", " young = -1 "], optional=True)
    assert scales == {"a man": None, "a=b": 0.5, "young": -1.0}
    with pytest.raises(UserError, match="names 'a man' twice"):
        inputs.read_scales("--concept", ["a man", "a man=2"], optional=True)


def test_prompts_are_read_from_text_and_csv_files(tmp_path):
    text, table = tmp_path / "a.txt", tmp_path / "b.CSV"
    text.write_text("\ufeffa nurse\n\n  a cook \n", encoding="utf-8")
    table.write_text("text\nx\n")
    assert inputs.read_prompts(["a"], str(text)) == ["a", "a nurse", "a cook"]
    with pytest.raises(UserError, match=r"lacks the column\(s\) \['prompt'\].*has \['text'\]"):
        inputs.read_prompts([], str(table))
