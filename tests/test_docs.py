"""The documentation: its code runs, its commands exist, and the site builds."""

import json
import os
import pathlib
import re
import runpy
import shlex
import shutil
import subprocess
import sys

import numpy as np
import pytest
from diffusers import DiffusionPipeline
from safetensors.numpy import load_file
from test_adapters import MAN, VIOLENCE, WOMAN, make_adapter

import respodiff_jax as rd
from respodiff_jax import cli
from respodiff_jax.adapters.card import export_adapter
from respodiff_jax.backbone import load_backbone

ROOT = pathlib.Path(__file__).parents[1]
PAGE = ROOT / "docs" / "pytorch.md"
SETS = "base", "adapted"


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


def commands(text):
    """The `respodiff` commands of a page's indented or fenced blocks."""
    whole = re.sub(r" *\\\n\s+", " ", text)
    return re.findall(r"^ *(respodiff [a-z].*?)(?: *#.*)?$", whole, re.MULTILINE)


PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.stem)
def test_commands_on_pages_have_options_that_exist(page):
    for command in commands(page.read_text(encoding="utf-8")):
        words = shlex.split(command)[1:]
        _, rest = cli._parser().parse_known_args(words)
        assert all(word.startswith("--config.") for word in rest), command


def test_the_tours_snippets_run_in_order(tmp_path, monkeypatch):
    """With one step and two pictures."""
    monkeypatch.chdir(tmp_path)
    blocks = snippets((ROOT / "docs" / "index.md").read_text(encoding="utf-8"))
    code = "".join(blocks).replace("num_steps=20", "num_steps=1")
    names = {}
    exec(re.sub(r"images_per_prompt=\d", "images_per_prompt=2", code), names)
    assert len(blocks) == 3 and len(names["before"]) == len(names["after"]) == 2
    assert (tmp_path / "farmer.png").is_file()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:no image is steered for gender")  # as the notebook says
def test_the_notebook_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    content = json.loads((ROOT / "docs" / "tour.ipynb").read_text(encoding="utf-8"))
    names = {}
    for cell in content["cells"]:
        if cell["cell_type"] == "code":
            assert cell["outputs"] == [] and cell["execution_count"] is None
            exec("".join(cell["source"]), names)
    assert all(
        a.tobytes() == b.tobytes() for a, b in zip(names["cats"], names["same"], strict=True)
    )
    ratios = [names["results"].value("deviation_ratio", s, attribute="gender") for s in SETS]
    assert ratios[1] < 0.3 < ratios[0]


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The site, built as a reader of the README would build it: links and anchors are checked."""
    out = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "-d", str(out)]
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return out


def test_the_site_builds_and_loads_nothing_from_outside(site):
    pages = {path: path.read_text(encoding="utf-8") for path in site.rglob("*.html")}
    assert len(pages) >= 18
    for path, text in pages.items():
        loaded = re.findall(r"<(?:script|img|iframe)[^>]*src=\"?(https?:[^\" >]+)", text)
        loaded += re.findall(
            r"<link[^>]*(?:stylesheet|preconnect|icon)[^>]*(https?:[^\" >]+)", text
        )
        assert loaded == [], path
    styles = "".join(path.read_text(encoding="utf-8") for path in site.rglob("*.css"))
    assert not re.findall(r"url\([\"']?https?:|@import", styles)


def test_the_reference_is_made_from_the_code(site):
    page = (site / "cli" / "index.html").read_text(encoding="utf-8")
    for verb in cli._VERBS:
        assert f"respodiff {verb}</h2>" in re.sub(r"<a [^>]*>.*?</a>", "", page)
    assert "--steer-always" in page and "%(default)s" not in page
    deviations = (site / "deviations" / "index.html").read_text(encoding="utf-8")
    sources = [p.read_text(encoding="utf-8") for p in (ROOT / "respodiff_jax").rglob("*.py")]
    assert deviations.count("<code>respodiff_jax.") == sum(s.count("Deviation: ") for s in sources)
    api = (site / "api" / "index.html").read_text(encoding="utf-8")
    for name in (n for n in rd.__all__ if n not in ("method",)):
        assert re.search(rf'id="respodiff_jax\.[\w.]*\.?{name}"', api), name
