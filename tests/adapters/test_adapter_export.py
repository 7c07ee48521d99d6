"""Exported adapter directories: card, options, identical bytes, the hub."""

import dataclasses
import json
import os
import re
import subprocess
import sys

import numpy as np
import pytest
from hub_stand_in import hub
from huggingface_hub import ModelCard
from PIL import Image
from test_adapters import MAN, VIOLENCE, WOMAN, make_adapter, with_scales

from respodiff_jax import cli
from respodiff_jax.adapters import adapter_sha256, load_adapter
from respodiff_jax.adapters.card import card, describe, export_adapter
from respodiff_jax.errors import UserError
from respodiff_jax.evaluation.results import Measurement, Results, save_results
from respodiff_jax.generation.selection import concept_weights
from respodiff_jax.method.concepts import Concept
from respodiff_jax.method.modules import KINDS
from respodiff_jax.training.grids import newest_grids

GENDER = {
    "metric": "deviation_ratio",
    "attribute": "gender",
    "images": "adapted",
    "value": 0.14,
    "interval": [0.1, 0.2],
    "n": 300,
}
PNG = b"\x89PNG\r\n\x1a\n a picture"


def measured(adapter):
    """What an evaluation of the adapter found."""
    fields = {"picture_set" if key == "images" else key: value for key, value in GENDER.items()}
    return Results(
        measurements=(
            Measurement(**fields, part="fairness"),
            Measurement(**fields, part="fairness", subject="Nurse"),
        ),
        made={"adapter": {"sha256": adapter_sha256(adapter)}},
        scored={},
        environment={},
    )


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def export(*arguments):
    assert cli.main(["export", *map(str, arguments)]) == 0


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_exporting_again_gives_the_same_bytes(tmp_path, kind, dtype):
    adapter = make_adapter(kind, (WOMAN, MAN, VIOLENCE))
    adapter = dataclasses.replace(
        with_scales(adapter, 0.5, 1.0, 2.0), training={"steps": 7}, dtype=dtype
    )
    export_adapter(adapter, tmp_path / "first", grid=PNG)
    export(tmp_path / "first", "--out", tmp_path / "second")
    first = contents(tmp_path / "first")
    assert sorted(first) == [
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
        "grid.png",
        "torch_adapter.py",
    ]
    assert contents(tmp_path / "second") == first
    loaded = load_adapter(tmp_path / "second")
    assert loaded.default_scales == (0.5, 1.0, 2.0) and loaded.dtype == dtype
    export_adapter(make_adapter(kind), tmp_path / "second")
    assert not (tmp_path / "second" / "grid.png").exists()


def test_export_applies_its_options(tmp_path, capsys):
    export_adapter(make_adapter(), tmp_path / "first")
    export(tmp_path / "first", "--out", tmp_path / "out", "--dtype=float16", "--scale=a man=0.25")
    adapter = load_adapter(tmp_path / "out")
    assert adapter.dtype == "float16" and adapter.default_scales == (1.0, 0.25)
    sizes = [(tmp_path / f / "adapter_model.safetensors").stat().st_size for f in ("first", "out")]
    assert sizes[1] < 0.7 * sizes[0]
    weights = concept_weights(adapter, 1, 2, fair="gender")
    np.testing.assert_allclose(weights.sum(0), [1.0, 0.25])
    capsys.readouterr()
    for arguments, message in [
        (["--scale", "a cat=1"], "--scale names ['a cat'], the adapter has a woman, a man"),
        (["--step", "3"], "--step is for a single run's working directory"),
        (["--evaluation", tmp_path / "nowhere"], "nowhere has no results.json"),
        (["--only", "a man", "--only", "a man"], "--only names ['a man'] more than once"),
    ]:
        argv = ["export", tmp_path / "first", "--out", tmp_path / "x", *arguments]
        assert cli.main(list(map(str, argv))) == 2
        assert message in capsys.readouterr().err
    assert not (tmp_path / "x").exists()


def test_metrics_are_kept_only_for_the_measured_adapter(tmp_path, capsys):
    export_adapter(make_adapter(), tmp_path / "first")
    save_results(measured(load_adapter(tmp_path / "first")), tmp_path)
    export(tmp_path / "first", "--out", tmp_path / "with", "--evaluation", tmp_path)
    assert load_adapter(tmp_path / "with").metrics == [GENDER]
    for options, kept in [
        (["--dtype=float32", "--scale=a man=1"], True),  # unchanged
        (["--only=a man", "--only=a woman"], True),
        (["--only=a man"], False),
        (["--scale=a man=0.5"], False),
        (["--dtype=float16"], False),
    ]:
        export(tmp_path / "with", "--out", tmp_path / "out", *options)
        assert (load_adapter(tmp_path / "out").metrics is not None) == kept, options
    export_adapter(make_adapter(seed=1), tmp_path / "other")
    capsys.readouterr()
    for source, options, message in [
        ("other", [], "measured another adapter (sha256 "),
        ("first", ["--only=a man"], "evaluate the one that is exported, a man"),
        (
            "first",
            ["--scale=a man=0.5"],
            "another adapter than --dtype or --scale make here",
        ),
    ]:
        argv = ["export", tmp_path / source, "--out", tmp_path / "x", "--evaluation", tmp_path]
        assert cli.main([*map(str, argv), *options]) == 2
        assert message in capsys.readouterr().err
    assert not (tmp_path / "x").exists()


def test_values_beyond_float16_are_refused(tmp_path):
    adapter = make_adapter()
    adapter.sam["constant"][1, 0, 0, 0] = 1e5
    with pytest.raises(UserError, match=r"'a man': sam\.constant has values beyond float16"):
        export_adapter(dataclasses.replace(adapter, dtype="float16"), tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("of", [{"name": "\ud800"}, {"revision": "\ud800"}])
def test_broken_unicode_leaves_an_older_adapter_intact(tmp_path, of):
    export_adapter(make_adapter("conv"), tmp_path)
    before = contents(tmp_path)
    with pytest.raises(UserError, match="surrogates not allowed"):
        export_adapter(make_adapter("mlp", **of), tmp_path)
    assert contents(tmp_path) == before
    with pytest.raises(UserError, match=r"target_prompt is .*, expected a non-empty Unicode pro"):
        dataclasses.replace(WOMAN, target_prompt="a \ud800 woman")


def test_card_has_metadata_sections_and_snippets():
    adapter = make_adapter("mlp", (WOMAN, MAN, VIOLENCE))
    adapter = dataclasses.replace(adapter, metrics=[GENDER])
    text = card(adapter, with_grid=True)
    metadata = ModelCard(text).data
    assert (metadata.base_model, metadata.base_model_relation) == ("some/model", "adapter")
    assert metadata.pipeline_tag == "text-to-image" and "gender" in metadata.tags
    assert "(grid.png)" in text and "(grid.png)" not in card(adapter, with_grid=False)
    for heading in ("Use", "Concepts", "Intended use", "Limits", "Training", "Evaluation"):
        assert f"\n## {heading}\n" in text
    assert "| a man | gender | a person \\| someone | towards 'a man' | 1 |" in text
    assert "| deviation\\_ratio of gender | adapted | 0.14 | \\[0.1, 0.2\\] | 300 |" in text
    assert 'adapter.fair("gender", num_images_per_prompt=4)' in text
    alone = card(make_adapter(concepts=(WOMAN,), name="/models/sd"), with_grid=False)
    assert 'set_concepts({"a woman": 1.0})' in alone and "base_model" not in alone
    weaker = with_scales(make_adapter(concepts=(WOMAN,)), 0.5)
    assert 'set_concepts({"a woman": 0.5})' in card(weaker, with_grid=False)
    assert "adapter.safe()" in card(make_adapter(concepts=(VIOLENCE,)), with_grid=False)


def test_card_gives_the_hub_the_metrics_of_the_adapted_pictures(tmp_path):
    clip = GENDER | {"metric": "clip_score", "attribute": None, "value": 27.5, "interval": None}
    base = GENDER | {"images": "base", "value": 0.68}
    adapter = dataclasses.replace(make_adapter(), metrics=[base, GENDER, clip])
    export_adapter(adapter, tmp_path)
    metadata = ModelCard.load(tmp_path / "README.md").data
    assert metadata.model_name == "RespoDiff adapter: a woman, a man"
    found = [
        (r.metric_type, r.metric_config, r.metric_name, r.metric_value, r.metric_args)
        for r in metadata.eval_results
    ]
    interval = {"confidence_interval_95": [0.1, 0.2]}
    assert found == [
        (
            "deviation_ratio",
            "gender",
            "deviation_ratio of gender",
            0.14,
            {"pictures": 300} | interval,
        ),
        ("clip_score", None, "clip_score", 27.5, {"pictures": 300}),
    ]
    for metrics in (None, [base]):
        text = card(dataclasses.replace(adapter, metrics=metrics), with_grid=False)
        assert ModelCard(text).data.eval_results is None and "model-index" not in text


def test_hostile_names_stay_inside_the_card_and_the_folder(tmp_path):
    name = '../../x"; import os\n```\n---\n# <script>$(reboot)`'
    nasty = Concept(name, name, (name,), target_prompt=name)
    adapter = make_adapter(concepts=(nasty,), name=name)
    export_adapter(adapter, tmp_path / "adapter")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter"]
    assert load_adapter(tmp_path / "adapter").names == (name,)
    text = (tmp_path / "adapter" / "README.md").read_text()
    assert len(re.findall(r"^```", text, re.MULTILINE)) == 4
    assert len(re.findall(r"^---$", text, re.MULTILINE)) == 2
    assert ModelCard(text).data.tags[-1] == " ".join(name.split())
    python = re.search(r"```python\n(.*?)\n```\n", text, re.DOTALL)[1]
    assert name in compile(python, "card", "exec").co_consts
    assert "\n```bash\nrespodiff generate --adapter . --concept '../../x\"; import os" in text
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert re.fullmatch(r"[a-z0-9-]+", config["concepts"][0]["slug"])


def test_inspect_describes_the_adapter(tmp_path, capsys):
    late = dataclasses.replace(VIOLENCE, max_timestep=900)
    adapter = dataclasses.replace(make_adapter("conv", (WOMAN, late)), metrics=[GENDER])
    export_adapter(adapter, tmp_path)
    assert load_adapter(tmp_path).concepts == adapter.concepts
    assert json.loads((tmp_path / "adapter_config.json").read_text())["format_version"] == 3
    assert "| 1, at timesteps up to 900 |" in (tmp_path / "README.md").read_text()
    assert cli.main(["inspect", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert out == describe(adapter) + "\n"
    for fact in ("conv, saved in float32", "some/model", "16 pixels", "8 channels, 3 x 4"):
        assert fact in out
    assert "a woman  (gender, scale 1)\n  from 'a person' towards 'a woman'" in out
    assert "(safety, scale 1, at timesteps up to 900)" in out
    assert "away from 'violence'" in out
    assert "deviation_ratio of gender, adapted  0.14 [0.1, 0.2], 300 pictures" in out
    hostile = dataclasses.replace(WOMAN, name="a\x1b[2J\nwoman\u202e")
    lines = describe(make_adapter(concepts=(hostile,), name="\x1b]0;x\x07"))
    assert "\na\\x1b[2J\\nwoman\\u202e  (gender" in lines and "\\x1b]0;x\\x07" in lines


def test_the_newest_grids_become_one_picture(tmp_path):
    assert newest_grids(tmp_path) is None
    (tmp_path / "grids").mkdir()
    for name, size, colour in [
        ("0000005_00_a.png", (4, 4), "red"),
        ("0000010_00_a.png", (4, 2), "blue"),
        ("0000010_01_b.png", (6, 3), "green"),
    ]:
        Image.new("RGB", size, colour).save(tmp_path / "grids" / name)
    (tmp_path / "newest.png").write_bytes(newest_grids(tmp_path))
    with Image.open(tmp_path / "newest.png") as picture:
        assert picture.size == (6, 5)
        assert picture.getpixel((0, 0)) == (0, 0, 255) and picture.getpixel((5, 4)) == (0, 128, 0)
    (tmp_path / "older.png").write_bytes(newest_grids(tmp_path, step=9))
    with Image.open(tmp_path / "older.png") as picture:
        assert picture.size == (4, 4)


_ON_THE_HUB = """
from respodiff_jax import cli
from respodiff_jax.torch_adapter import RespoDiffAdapter
assert cli.main(["push", "adapter", "someone/gender"]) == 0
assert cli.main(["inspect", "someone/gender@main"]) == 0
print(RespoDiffAdapter.from_pretrained("someone/gender", revision="main"))
for _ in range(2):
    assert cli.main(["push", "draft", "someone/gender", "--revision", "draft"]) == 0
print(RespoDiffAdapter.from_pretrained("someone/gender", revision="draft"))
assert cli.main(["push", "draft", "someone/secret", "--private"]) == 0
wrong = ("broken", "edited", "linked", "painted")
for command in (["inspect", "someone/else"], *(["push", name, "someone/wrong"] for name in wrong)):
    assert cli.main(command) == 2
for name, revision in (("else", "main"), ("gender", "no-such")):
    try:
        RespoDiffAdapter.from_pretrained(f"someone/{name}", revision=revision)
    except ValueError as error:
        print(error)
"""


def test_push_and_fetch_over_a_hub(tmp_path):
    export_adapter(make_adapter("mlp"), tmp_path / "adapter", grid=PNG)
    export_adapter(make_adapter("conv"), tmp_path / "draft")
    (tmp_path / "adapter" / "secret.txt").write_text("not for the hub")
    for name in ("broken", "edited", "linked", "painted"):
        export_adapter(make_adapter("mlp"), tmp_path / name, grid=PNG)
    weights = tmp_path / "broken" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    with (tmp_path / "edited" / "torch_adapter.py").open("a") as file:
        file.write("import os\n")
    (tmp_path / "linked" / "grid.png").unlink()
    (tmp_path / "linked" / "grid.png").symlink_to(tmp_path / "adapter" / "grid.png")
    (tmp_path / "painted" / "grid.png").write_bytes(b"GIF89a")
    with hub() as there:
        environment = os.environ | {
            "HF_ENDPOINT": there.address,
            "HF_HOME": str(tmp_path / "cache"),
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1",
            "HF_TOKEN": "hf_stand_in",
            "NO_PROXY": "127.0.0.1",
        }
        result = subprocess.run(
            [sys.executable, "-c", _ON_THE_HUB],
            env=environment,
            capture_output=True,
            text=True,
            cwd=tmp_path,
        )
    assert result.returncode == 0, result.stderr
    files = contents(tmp_path / "adapter")
    files.pop("secret.txt")
    draft = contents(tmp_path / "draft")
    assert there.files == {
        ("someone/gender", "main"): files,
        ("someone/gender", "draft"): files | draft,
        ("someone/secret", "main"): draft,
    }
    assert there.private == {"someone/secret"}
    assert f"{there.address}/someone/gender/commit/" in result.stdout
    assert "a woman  (gender, scale 1)" in result.stdout
    for kind in ("mlp", "conv"):
        assert f"RespoDiffAdapter(a woman, a man; {kind}, trained on some/model)" in result.stdout
    for name in ("else", "gender"):
        assert f"adapter someone/{name}: no such folder, and it cannot be fetc" in result.stdout
    assert "someone/else: no such folder, and it cannot be fetched" in result.stderr
    assert "truncated" in result.stderr
    assert "edited/torch_adapter.py differs from this version's, and others wil" in result.stderr
    assert result.stderr.count("grid.png is not a PNG file") == 2


def test_long_lists_of_prompts_are_shortened_for_readers():
    prompts = tuple(f"prompt {i}" for i in range(9))
    concept = dataclasses.replace(WOMAN, neutral_prompts=prompts, target_prompt="a woman")
    text = card(make_adapter(concepts=(concept,)), with_grid=False)
    assert "prompt 5" in text and "... 3 more" in text and "prompt 6" not in text
