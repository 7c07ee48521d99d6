"""The code that a PyTorch user copies, from docs/pytorch.md and from model cards, runs."""

import pathlib
import re
import runpy
import shutil
import sys

import numpy as np
import pytest
from diffusers import DiffusionPipeline
from safetensors.numpy import load_file
from test_adapters import MAN, VIOLENCE, WOMAN, make_adapter

from respodiff_jax.adapters.card import export_adapter
from respodiff_jax.backbone import load_backbone

ROOT = pathlib.Path(__file__).parents[1]
PAGE = ROOT / "docs" / "pytorch.md"


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
                options = {"num_inference_steps": 2} | options
                calls.append(super().__call__(*args, **options))
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
    assert len(blocks) == 6
    assert [len(output.images) for output in steps] == [1, 8, 4, 6, 3, 3, 2, 1]
    assert isinstance(names["pipe"], DiffusionPipeline)
    assert not names["pipe"].unet.mid_block._forward_hooks
    told = capsys.readouterr().out
    assert "{'gender': ('a woman', 'a man')}" in told and told.count("a woman'") == 8


@pytest.fixture
def no_torch_adapter(monkeypatch):
    """Module search as it is, but for torch_adapter, which none has imported; left as before."""
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setitem(sys.modules, "torch_adapter", None)
    del sys.modules["torch_adapter"]


@pytest.mark.parametrize(
    ("model", "concepts"), [("sdxl", (WOMAN, MAN)), ("sdxl", (VIOLENCE,)), ("emoji", (WOMAN, MAN))]
)
def test_the_cards_snippet_runs_in_the_adapters_folder(
    tmp_path, monkeypatch, steps, no_torch_adapter, model, concepts, request
):
    name = "emoji-world" if model == "emoji" else str(request.getfixturevalue("sdxl_folder"))
    backbone = load_backbone(name, abstract=True)
    resolution = backbone.default_resolution
    shape = backbone.mid_block_shape(resolution)
    adapter = make_adapter(concepts=concepts, shape=shape, name=name, resolution=resolution)
    export_adapter(adapter, tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    (code,) = snippets((tmp_path / "README.md").read_text())
    names = {}
    exec(compile(code, "README.md", "exec"), names)
    assert len(names["images"]) == 4
    assert pathlib.Path(sys.modules["torch_adapter"].__file__) == tmp_path / "torch_adapter.py"


def test_the_card_under_the_newest_diffusers_and_the_latents_of_jax(
    sd_folder, sd_v_folder, tmp_path, monkeypatch, steps, no_torch_adapter, capsys
):
    """Both halves of launch/newest_torch.sh, under the diffusers that is installed here."""
    script = runpy.run_path(str(ROOT / "launch" / "newest_torch.py"))
    store, check = script["store"], script["check"]
    monkeypatch.setitem(check.__globals__, "NUM_STEPS", 2)
    monkeypatch.setitem(check.__globals__, "check_no_jax", lambda: None)
    monkeypatch.chdir(tmp_path)
    stored = tmp_path / "stored"
    store(str(sd_folder), stored)
    store(str(sd_folder), stored)  # all is there
    check(str(sd_folder), stored)
    assert "the card's example: 4 images of (16, 16)" in capsys.readouterr().out
    for half in (store, check):
        with pytest.raises(SystemExit, match="stored was stored for another model, /"):
            half(str(sd_v_folder), stored)
    monkeypatch.setitem(check.__globals__, "TOLERANCE", 0.0)
    with pytest.raises(SystemExit, match="expected at most 0"):
        check(str(sd_folder), stored)


def test_the_stored_latents_are_those_of_the_shipped_model(tmp_path):
    """What launch/newest_torch.sh compares with: JAX gives it still."""
    stored = ROOT / "tests" / "data" / "emoji_gender"
    shutil.copytree(stored / "adapter", tmp_path / "adapter")
    store = runpy.run_path(str(ROOT / "launch" / "newest_torch.py"))["store"]
    store(str(ROOT / "respodiff_jax" / "emoji" / "model"), tmp_path)
    ours, theirs = (load_file(path / "latents.safetensors") for path in (tmp_path, stored))
    np.testing.assert_allclose(ours["noise"], theirs["noise"], rtol=1e-5, atol=1e-6)
    difference = np.linalg.norm(ours["latents"] - theirs["latents"])
    assert difference <= 1e-3 * np.linalg.norm(theirs["latents"])
