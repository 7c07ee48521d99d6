"""`respodiff demo` on the packaged model, shortened."""

import dataclasses

import numpy as np
import pytest

from respodiff_jax import cli
from respodiff_jax.adapters import adapter_sha256, load_adapter
from respodiff_jax.backbone import load_backbone
from respodiff_jax.emoji import demo
from respodiff_jax.emoji.shipped import warning_of_unknown_words
from respodiff_jax.evaluation import load_results
from respodiff_jax.evaluation.suites import load_suite


@pytest.mark.filterwarnings("ignore:the classifier finds")  # pictures of four steps are poor
def test_demo_trains_measures_and_reports(tmp_path, monkeypatch, capsys):
    def short():
        config = whole()
        config.train.steps, config.train.batch_size = 2, 4
        config.optimizer.warmup_steps = 0
        config.rollout.num_steps = 4
        config.log.grid_every = 0
        for kind in ("people", "things"):
            config.reading[kind] = config.reading[kind][::4]
        return config

    def few(name, model):
        suite = load_suite(name, model)
        return dataclasses.replace(
            suite, subjects=("doctor", "teacher"), nobody=("a photo of a cat",)
        )

    whole = demo.config
    monkeypatch.setattr(demo, "config", short)
    monkeypatch.setattr(demo, "load_suite", few)
    monkeypatch.setattr(demo, "IMAGES_PER_SUBJECT", 4)
    monkeypatch.setattr(demo, "NUM_STEPS", 2)
    assert cli.main(["demo", "--out", str(tmp_path)]) == 0

    adapter = load_adapter(tmp_path / "run" / "adapter")
    assert adapter.names == ("a man", "a woman")
    assert np.abs(adapter.ram["out"]["kernel"]).max() > 0
    results = load_results(tmp_path / "evaluation")
    assert results.made["adapter"]["sha256"] == adapter_sha256(adapter)
    assert results.made["model"]["name"] == "emoji-world"
    printed = capsys.readouterr().out
    [before] = results.find("deviation_ratio", "base", attribute="gender", subject=None)
    assert "{:.3f} [{:.3f}, {:.3f}]".format(before.value, *before.interval) in printed
    [unchanged] = [line for line in printed.splitlines() if line.startswith("pictures of things")]
    assert unchanged.split()[:5] == ["pictures", "of", "things", "unchanged", "100.0%"]
    assert results.value("steered", "adapted", attribute="named") == 0
    assert adapter.reading_accuracy["gender"]["value"] > 0.95
    report = (tmp_path / "evaluation" / "report.html").read_text(encoding="utf-8")
    assert "doctor" in report and report.count("data:image/") >= 16
    # The training uses no profession.
    shown = " ".join(prompt for concept in adapter.concepts for prompt in concept.prompts)
    assert not any(word in shown for word in load_suite(None, "emoji-world").subjects)


def test_words_that_the_model_has_never_seen_are_named(tiny_backbone, tmp_path, monkeypatch):
    model = load_backbone("emoji-world", abstract=True)
    prompts = [
        "A photo of a dark-skinned firefighter, 20",
        "a Doctor on Mars",
        "mars",
        "Zauberer 🐱",
    ]
    found = warning_of_unknown_words(model, prompts)
    assert found.startswith("emoji-world does not know: mars, zauberer, 🐱. It may draw anything")
    assert not warning_of_unknown_words(model, prompts[:1])
    assert not warning_of_unknown_words(tiny_backbone, prompts)
    monkeypatch.setattr("respodiff_jax.generate_folder", lambda model, *args, **options: model())
    with pytest.warns(UserWarning, match="does not know: mars"), pytest.raises(TypeError):
        cli.main(["generate", "--model", "emoji-world", "--prompt", "Mars", "--out", str(tmp_path)])


def test_package_contains_the_model():
    backbone = load_backbone("emoji-world", abstract=True)
    assert backbone.default_resolution == 64
    assert backbone.scheduler_config["prediction_type"] == "epsilon"
