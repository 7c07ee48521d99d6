"""`evaluate`: scores against PyTorch, interrupted evaluations, recorded results, mistakes."""

import dataclasses
import json

import jax
import numpy as np
import pytest
import torch
from evaluations import constant_adapter
from PIL import Image
from transformers import CLIPModel, CLIPProcessor

from respodiff_jax import images as images_lib
from respodiff_jax.backbone import load_backbone, load_clip
from respodiff_jax.errors import UserError
from respodiff_jax.evaluation import (
    drawing,
    evaluate,
    load_results,
    metrics,
    quality,
    safety,
    scoring,
)
from respodiff_jax.evaluation import judges as judges_lib
from respodiff_jax.evaluation import pictures as pictures_lib
from respodiff_jax.evaluation.classifier import classify
from respodiff_jax.evaluation.results import load_per_image, save_per_image
from respodiff_jax.evaluation.spec import EvaluationSpec, choose_concepts

SAMPLING = {"num_steps": 2, "guidance_scale": 3.0, "batch_size": 8}


def test_clip_features_and_scores_equal_pytorch(clip_folder):
    rng = np.random.default_rng(0)
    pictures = [rng.integers(0, 256, (48, 40, 3), np.uint8) for _ in range(3)]
    texts = ["a photo of a cook", "", "an artist"]
    model, processor = CLIPModel.from_pretrained(clip_folder), None
    processor = CLIPProcessor.from_pretrained(clip_folder, use_fast=False)
    inputs = processor(text=texts, images=pictures, return_tensors="pt", padding=True)
    with torch.no_grad():
        theirs = model(**inputs)
    clip = load_clip(clip_folder)
    images, captions = clip.image_features(pictures), clip.text_features(texts)
    np.testing.assert_allclose(images, theirs.image_embeds.numpy(), atol=1e-5)
    np.testing.assert_allclose(captions, theirs.text_embeds.numpy(), atol=1e-5)
    expected = 100 * np.maximum((theirs.image_embeds * theirs.text_embeds).sum(1).numpy(), 0)
    np.testing.assert_allclose(metrics.clip_score(images, captions), expected, atol=1e-3)
    # The label under CLIP's own temperature is PyTorch's.
    probabilities = theirs.logits_per_image.softmax(1).numpy()
    found = classify(clip, images, {text: (text,) for text in texts})
    np.testing.assert_array_equal(found.labels, probabilities.argmax(1))
    np.testing.assert_allclose(found.probabilities, probabilities.max(1), atol=1e-4)


def test_unsafe_rate_counts_a_picture_in_each_of_its_categories():
    pictures = [
        pictures_lib.Picture(None, "base", i, "p", subject)
        for i, subject in enumerate(("violence", "violence, hate", "hate", None))
    ]
    reasons = {"a": ["", "knife", "", ""], "b": ["", "blood", "slur", ""]}
    found, columns = safety.measure(pictures, reasons)
    assert {m.subject: (m.value, m.n) for m, _ in found} == {
        None: (0.5, 4),
        "hate": (1.0, 2),
        "violence": (0.5, 2),
    }
    (low, high), *_ = [m.interval for m, _ in found if m.value == 1.0]
    assert low < 0.5 and high == 1.0  # two pictures are no proof
    assert [c["unsafe_reason"] for c in columns] == ["", "knife; blood", "slur", ""]


@pytest.fixture(scope="module")
def evaluated(tiny_backbone, suite, tmp_path_factory):
    """Folder, arguments and results of an evaluation of three parts."""
    out, workdir = tmp_path_factory.mktemp("evaluation"), tmp_path_factory.mktemp("run")
    losses = {"step": 5, "concepts": {"a woman": {"loss_resp": 0.5, "loss_sem": 0.25}}}
    (workdir / "metrics.jsonl").write_text(json.dumps(losses) + "\n")
    arguments = SAMPLING | {
        "model": tiny_backbone,
        "adapter": constant_adapter(tiny_backbone, 3.0),
        "out": out,
        "suite": suite,
        "part": ("fairness", "quality", "safety"),
        "groups": ["gender"],
        "safe": True,
        "images_per_subject": 4,
        "images_per_prompt": 2,
        "adapter_sources": [str(workdir)],
    }
    with pytest.warns(UserWarning, match="mean little"):
        results = evaluate(**arguments)
    return out, arguments, results


def test_results_follow_from_the_lines_of_per_image(evaluated, suite):
    out, _, results = evaluated
    assert load_results(out).measurements == results.measurements
    rows = load_per_image(out)
    for images in ("base", "adapted"):
        mine = [r for r in rows if r["images"] == images and r["protocol"] == "fairness"]
        assert len(mine) == 8
        ratios = []
        for subject in suite.subjects:
            values = [r["gender"] for r in mine if r["subject"] == subject]
            ratios.append(abs(values.count("woman") / 4 - 0.5) / 0.5)
        found = results.value("deviation_ratio", images, attribute="gender")
        assert found == pytest.approx(np.mean(ratios))
        scores = [float(r["clip_score"]) for r in mine]
        assert results.value("winoalign", images) == pytest.approx(np.mean(scores), abs=1e-3)
        right = [r["recognised_as"] == r["subject"] for r in mine]
        assert results.value("subject_recognised", images) == pytest.approx(np.mean(right))
        unsafe = [int(r["unsafe"]) for r in rows if r["images"] == images and r["unsafe"]]
        assert results.value("unsafe_rate", images) == pytest.approx(np.mean(unsafe))
    assert all((out / row["file"]).is_file() for row in rows)
    # Quality is compared with the base model's own pictures.
    assert results.value("clip_frechet_distance", "base") is None
    assert results.value("clip_frechet_distance", "adapted") > 0
    assert results.made["adapter"]["safe"] and results.scored["clip"]["sha256"]
    assert results.made["pictures"]["fairness"]["count"] == 8
    assert results.scored["target"] == {}
    assert results.environment["versions"]["pillow"]
    # A concept's change is measured from picture to picture.
    ours = {r["index"]: float(r["clip_score"]) for r in rows if r["images"] == "adapted" and _q(r)}
    base = {r["index"]: float(r["clip_score"]) for r in rows if r["images"] == "base" and _q(r)}
    change = metrics.mean_interval(np.array([ours[i] - base[i] for i in base]))
    (found,) = results.find("clip_score", "adapted")
    assert found.change == pytest.approx(change, abs=1e-3)
    assert results.find("clip_score", "base")[0].change is None
    # The classifier is checked before there are many pictures for it to count.
    plans = [(out / name / "plan.json").stat().st_mtime_ns for name in ("check", "fairness")]
    assert plans == sorted(plans)
    accuracy = results.scored["accuracy_on_plain_prompts"]
    assert {k: list(v) for k, v in accuracy.items()} == {
        "gender": ["woman", "man"],
        "age": ["young", "old"],
    }


def _q(row):
    return row["protocol"] == "quality"


def test_report_has_the_loss_curves_of_a_training_workdir(evaluated):
    assert "Responsibility loss (RAM)" in (evaluated[0] / "report.html").read_text("utf-8")


def test_every_picture_is_steered_by_its_concepts(evaluated):
    out, _, _ = evaluated
    rows = [r for r in load_per_image(out) if r["protocol"] == "fairness"]
    assert {r["concepts"] for r in rows if r["images"] == "base"} == {""}
    for subject in ("cook", "artist"):
        mine = [r for r in rows if r["images"] == "adapted" and r["subject"] == subject]
        assert sum(r["concepts"].startswith("a woman=1") for r in mine) == 2, subject
    base, adapted = (
        np.asarray(Image.open(out / f"fairness/{s}/00000.png")) for s in ("base", "adapted")
    )
    assert (base != adapted).any()


def test_interrupted_evaluation_draws_only_missing_pictures(evaluated, monkeypatch):
    out, arguments, results = evaluated
    kept = (out / "fairness/base/00000.png").stat().st_mtime_ns
    lost = out / "fairness/adapted/00003.png"
    before = np.asarray(Image.open(lost))
    lost.unlink()
    asked = []
    sample = drawing.sample_images

    def counted(*args, only, **kwargs):
        asked.append(len(only))
        return sample(*args, only=only, **kwargs)

    monkeypatch.setattr(drawing, "sample_images", counted)
    # Weights that are read late are the same weights.
    model = load_backbone("random/tiny", dtype="float32", abstract=True)
    with pytest.warns(UserWarning, match="mean little"):
        again = evaluate(**arguments | {"model": model})
    assert asked == [1]
    assert (out / "fairness/base/00000.png").stat().st_mtime_ns == kept
    np.testing.assert_array_equal(np.asarray(Image.open(lost)), before)
    assert again.measurements == results.measurements


def _never():
    raise AssertionError("weights are loaded")


def test_pictures_and_results_of_another_evaluation_are_kept(evaluated, tiny_backbone):
    out, arguments, results = evaluated
    unloaded = dataclasses.replace(tiny_backbone, load=_never)
    config = dict(tiny_backbone.scheduler_config) | {"steps_offset": 7}
    vae = jax.tree.map(lambda leaf: leaf + 1, tiny_backbone.params["vae"])
    params = {**tiny_backbone.params, "vae": vae}
    for change, message in (
        ({"guidance_scale": 5.0}, r"another evaluation.*sampling.*choose another"),
        ({"seed": 5}, "differs in requests; choose"),
        (
            {"model": dataclasses.replace(tiny_backbone, scheduler_config=config)},
            "differs in model",
        ),
        ({"model": dataclasses.replace(tiny_backbone, params=params)}, "differs in model"),
        ({"images_per_caption": 2}, "quality has pictures of another evaluation"),
        ({"part": "quality"}, "results of fairness, safety, which would be lost"),
    ):
        with pytest.raises(UserError, match=message):
            evaluate(**arguments | {"model": unloaded} | change)
    assert (out / "fairness/base/00000.png").exists()
    assert load_results(out).measurements == results.measurements


def test_unreliable_classifier_is_reported():
    six, four = 6 / 8, 4 / 8  # a classifier with 90 % accuracy may find six by chance
    assert scoring.accuracy_notes({"gender": {"woman": 1.0, "man": six}}) == []
    (note,) = scoring.accuracy_notes(
        {"gender": {"woman": six, "man": six}, "skin_tone": {"a": 1.0, "b": four, "c": 1.0}}
    )
    assert "only 50% " in note and "(skin tone b): its counts of skin tone mean little" in note


def test_mistakes_are_found_before_weights_are_loaded(tiny_backbone, suite, tmp_path):
    arguments = SAMPLING | {
        "model": dataclasses.replace(tiny_backbone, load=_never),
        "adapter": constant_adapter(tiny_backbone, 1.0),
        "out": tmp_path / "out",
        "part": ("fairness", "quality", "safety"),
        "safe": True,
    }
    half = {"woman": 0.5, "man": 0.5}
    for changes, suite_changes, message in (
        ({"safe": False, "groups": ()}, {}, "none of its concepts is chosen"),
        ({"safe": None, "groups": None}, {}, "has the groups .'gender', 'age'.; choose with"),
        ({"groups": ["race"]}, {}, "the adapter has no group 'race'. It has gender, age, safety"),
        ({"groups": ["age", "age"]}, {}, "expected each once"),
        ({}, {"captions": None}, "has no prompts for quality"),
        ({}, {"unsafe_classes": None}, "no unsafe_classes and no detector"),
        ({}, {"captions": ("one",)}, "quality of one picture"),
        ({"targets": {"race": half}}, {}, "no attribute 'race'"),
        (
            {"targets": {"gender": {"woman": 1.0}}},
            {},
            r"of gender name \['woman'\], its values are \['woman', 'man'\]",
        ),
        ({"targets": {"gender": {"woman": 0.5, "man": 0.6}}}, {}, "expected shares that sum to 1"),
        ({"targets": {"gender": {"woman": -0.5, "man": 1.5}}}, {}, "none below 0"),
        ({"targets": {"gender": {"woman": float("nan"), "man": 0.5}}}, {}, "together nan"),
        ({"seed": 2**32 - 1}, {}, "`seed` is 4294967295, expected within 0"),
        ({"part": ()}, {}, r"`part` is \(\), expected all, or some of fairness"),
        ({"part": "race"}, {}, "`part` is 'race', expected all, or some of fairness"),
        ({"preset": "slow"}, {}, "`preset` is 'slow', expected one of quick, paper"),
        ({"max_prompts": 0}, {}, "`max_prompts` is 0, expected at least 1"),
        ({"images_per_subject": 10**8}, {}, "200,000,000 images in one call, expected at most"),
        ({"images_per_prompt": 10**8}, {}, "200,000,000 images in one call, expected at most"),
        ({"batch_size": 8 * 10**10}, {}, "`batch_size` 80000000000 needs .* of memory at least"),
        ({"resolution": 18}, {}, "the nearest is"),
        ({"adapter": None}, {}, "no `adapter` is given"),
        ({"model": None}, {}, "nothing to evaluate; give `model` or `adapter`, or `images`"),
        ({"images": tmp_path}, {}, "drop `model`, `adapter`, `safe`, `num_steps`, `guidance"),
    ):
        changed = dataclasses.replace(suite, **suite_changes)
        with pytest.raises(UserError, match=message):
            evaluate(**arguments | {"suite": changed} | changes)
    assert not (tmp_path / "out").exists()


def test_concepts_are_chosen_by_the_adapter_if_none_are_named(tiny_backbone, suite):
    adapter = constant_adapter(tiny_backbone, 1.0)
    one_group = dataclasses.replace(suite, attributes={"gender": suite.attributes["gender"]})
    for groups, safe, expected in (
        (None, None, (("gender",), True)),
        (["age"], None, (("age",), False)),
        (["age"], True, (("age",), True)),
        (None, True, ((), True)),
        (None, False, (("gender",), False)),
        ((), None, ((), True)),
    ):
        assert choose_concepts(adapter, one_group, groups, safe) == expected
    assert choose_concepts(None, one_group, None, None) == ((), False)


def test_quality_is_compared_with_the_base_models_pictures(suite, tmp_path, monkeypatch):
    def colours(paths):
        return np.array([np.asarray(Image.open(path)).mean((0, 1)) for path in paths])

    colours.identity = {"package": "colours"}
    monkeypatch.setattr(quality, "open_inception", lambda: (colours, ""))
    rng = np.random.default_rng(0)
    pictures = []
    for name in ("base", "adapted"):
        for i in range(3):
            path = tmp_path / f"{name}{i}.png"
            images_lib.save_png(rng.integers(0, 256, (24, 24, 3), np.uint8), path)
            pictures.append(pictures_lib.Picture(path, name, i, "a", None))
    judges = judges_lib.Judges(load_clip(suite.clip))
    scorer = scoring.Scorer(tmp_path, EvaluationSpec(suite, ("quality",)), judges, {})
    results = scorer.score("quality", {"quality": pictures})
    base, adapted = (colours([p.path for p in chosen]) for chosen in (pictures[:3], pictures[3:]))
    expected = metrics.frechet_contributions(adapted, base).mean()
    assert results.value("fid", "adapted") == pytest.approx(expected)
    (kid,) = results.find("kid")
    expected = metrics.kernel_contributions(adapted, base, paired=True).mean()
    assert kid.picture_set == "adapted" and kid.value == pytest.approx(expected)
    assert kid.interval[0] <= kid.value <= kid.interval[1]
    assert results.scored["inception"] == {"package": "colours"}


def test_results_file_keeps_its_keys_and_is_checked(evaluated, tmp_path):
    out, _, results = evaluated
    content = json.loads((out / "results.json").read_text())
    assert list(content["measurements"][0]) == [
        *("metric", "images", "value", "n", "protocol", "interval", "change", "attribute"),
        *("subject", "counts", "target", "version"),
    ]
    path = tmp_path / "results.json"
    for change, message in (
        ({"schema_version": 3}, "schema_version 3, this respodiff_jax reads up to 2"),
        ({"schema_version": None}, "has no schema_version"),
        ({"colour": 1}, "unknown fields colour; expected measurements"),
        ({"measurements": [{"metric": "fid"}]}, "measurement 1: content .* lacks the field"),
        (
            {"measurements": ["fid"]},
            "content is 'fid': expected a mapping, got a text",
        ),
    ):
        path.write_text(json.dumps(content | change))
        with pytest.raises(UserError, match=message):
            load_results(tmp_path)
    first = content["measurements"][0]
    for field, value, message in (
        ("attribute", 4, "measurement 1: attribute is 4: expected a text | null, got a whole"),
        ("value", None, "measurement 1: value is None: expected a number, got null"),
        ("metric", {}, "measurement 1: metric is {}: expected a text, got a mapping"),
        ("n", 2.5, "measurement 1: n is 2.5: expected a whole number, got a number"),
        ("interval", [1], r"interval is \[1\]: expected a list of length 2"),
        ("colour", 1, "measurement 1 has the unknown fields colour; expected metric"),
    ):
        path.write_text(json.dumps(content | {"measurements": [first | {field: value}]}))
        with pytest.raises(UserError, match=message):
            load_results(tmp_path)
    for change, message in (
        ({"warnings": [[1]]}, r"warnings\[0\] is \[1\]: expected a text, got a list"),
        ({"made": 5}, "made: content is 5: expected a mapping"),
        ({"made": {"adapter": {"groups": 3}}}, "made: adapter.groups is 3: expected a list"),
        ({"measurements": {}}, "measurements is {}: expected a list, got a mapping"),
        ({"environment": None}, "environment is None: expected a mapping, got null"),
    ):
        path.write_text(json.dumps(content | change))
        with pytest.raises(UserError, match=message):
            load_results(tmp_path)
    path.write_text("{")
    with pytest.raises(UserError, match=r"results\.json is not JSON"):
        load_results(tmp_path)
    # Version 1 had no `change`.
    old = [{k: v for k, v in m.items() if k != "change"} for m in content["measurements"]]
    path.write_text(json.dumps(content | {"schema_version": 1, "measurements": old}))
    found = load_results(tmp_path).measurements
    assert found == tuple(dataclasses.replace(m, change=None) for m in results.measurements)


def test_table_is_written_whole_and_a_cut_one_is_refused(tmp_path):
    save_per_image([{"file": "a.png", "prompt": "x\ny"}, {"file": "b.png"}], tmp_path)
    rows = load_per_image(tmp_path)
    assert rows == [{"file": "a.png", "prompt": "x\ny"}, {"file": "b.png", "prompt": ""}]
    with pytest.raises(UnicodeEncodeError):
        save_per_image([{"file": "\udc80"}], tmp_path)
    assert load_per_image(tmp_path) == rows
    (tmp_path / "per_image.csv").write_text("file,prompt\r\na.png,x\r\nb.p")
    with pytest.raises(UserError, match=r"per_image\.csv is damaged: picture 2"):
        load_per_image(tmp_path)
