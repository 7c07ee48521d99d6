"""The code that a PyTorch user copies, from docs/pytorch.md and from model cards, runs."""

import pathlib
import re
import sys

import pytest
from diffusers import DiffusionPipeline
from test_adapters import VIOLENCE, make_adapter

from respodiff_jax.adapter_card import export_adapter

PAGE = pathlib.Path(__file__).parents[1] / "docs" / "pytorch.md"


def snippets(text):
    return re.findall(r"^```python\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)


@pytest.fixture
def steps(monkeypatch):
    """Two sampling steps instead of 50, and the images of each call."""
    calls = []
    load = DiffusionPipeline.from_pretrained

    def load_and_shorten(name):
        pipe = load(name)
        pipe.set_progress_bar_config(disable=True)
        pipeline_class = type(pipe)

        class Short(pipeline_class):
            def __call__(self, *args, **options):
                calls.append(super().__call__(*args, num_inference_steps=2, **options))
                return calls[-1]

        pipe.__class__ = Short
        return pipe

    monkeypatch.setattr(DiffusionPipeline, "from_pretrained", load_and_shorten)
    return calls


def test_the_pages_snippets_run_in_order(sd_folder, tmp_path, monkeypatch, steps, capsys):
    export_adapter(make_adapter(shape=(4, 4, 64)), tmp_path / "adapters" / "gender")
    export_adapter(make_adapter("mlp", (VIOLENCE,), shape=(4, 4, 64)), tmp_path / "adapters/safety")
    monkeypatch.chdir(tmp_path)
    blocks = snippets(PAGE.read_text())
    code = "".join(blocks).replace("CompVis/stable-diffusion-v1-4", str(sd_folder))
    names = {}
    exec(compile(code.replace('"cuda"', '"cpu"'), str(PAGE), "exec"), names)
    assert len(blocks) == 5
    assert [len(output.images) for output in steps] == [1, 8, 4, 3, 3, 2, 1]
    assert isinstance(names["pipe"], DiffusionPipeline)
    assert not names["pipe"].unet.mid_block._forward_hooks
    told = capsys.readouterr().out
    assert "{'gender': ('a woman', 'a man')}" in told and told.count("a woman'") == 5


@pytest.mark.parametrize("concepts", [None, (VIOLENCE,)])
def test_the_cards_snippet_runs_in_the_adapters_folder(
    sdxl_folder, tmp_path, monkeypatch, steps, concepts
):
    options = {} if concepts is None else {"concepts": concepts}
    adapter = make_adapter(shape=(4, 4, 64), name=str(sdxl_folder), resolution=16, **options)
    export_adapter(adapter, tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "torch_adapter", raising=False)
    (code,) = snippets((tmp_path / "README.md").read_text())
    names = {}
    exec(compile(code, "README.md", "exec"), names)
    assert len(names["images"]) == 4
    assert pathlib.Path(sys.modules.pop("torch_adapter").__file__) == tmp_path / "torch_adapter.py"
