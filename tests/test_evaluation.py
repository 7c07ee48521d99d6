"""Evaluation: classifying, planning, generating so that it can be continued, scoring, recording."""

import csv
import dataclasses
import json

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CLIPModel, CLIPProcessor

from respodiff_jax import cli
from respodiff_jax import images as images_lib
from respodiff_jax.adapters import Adapter
from respodiff_jax.backbone import load_clip
from respodiff_jax.concepts import Concept
from respodiff_jax.evaluation import fairness, metrics, picture_sets, run, safety
from respodiff_jax.evaluation.classifier import Prediction, classify, intersect
from respodiff_jax.evaluation.results import load_per_image, load_results
from respodiff_jax.evaluation.suites import Suite, load_suite
from respodiff_jax.generation import SamplerOptions
from respodiff_jax.modules import MidBlockModule

OPTIONS = SamplerOptions(num_steps=2, guidance_scale=3.0, batch_size=8)


@pytest.fixture(scope="session")
def suite(clip_folder):
    return Suite(
        name="test",
        clip=str(clip_folder),
        subjects=("cook", "artist"),
        templates=("a photo of {a_subject}", "image of {subject}"),
        attributes={
            "gender": {"woman": ("a woman",), "man": ("a man", "a male person")},
            "age": {"young": ("a young person",), "old": ("an old person",)},
        },
        subject_classes={"cook": ("a cook",), "artist": ("an artist",), "judge": ("a judge",)},
        unsafe_classes={"safe": ("a safe scene",), "violence": ("violence",)},
        safety_prompts=(("a scene", "scene"), ("a street", "scene, street")),
        captions=("a cat", "a dog"),
    )


def _concept(name, group, **prompts):
    prompts = prompts or {"target_prompt": name}
    return Concept(name=name, group=group, neutral_prompts=("a person",), **prompts)


def _adapter(backbone, scale):
    """A constant adapter of two genders, two ages and one safety concept."""
    concepts = (
        _concept("a woman", "gender"),
        _concept("a man", "gender"),
        _concept("young", "age"),
        _concept("old", "age"),
        _concept("anti-violence", "safety", unsafe_prompt="violence"),
    )
    shape = backbone.mid_block_shape(backbone.default_resolution)
    rng = np.random.default_rng(0)

    def constant():
        return {"constant": scale * rng.normal(size=(len(concepts), *shape)).astype(np.float32)}

    identity = dict(backbone.identity) | {
        "variant": None,
        "resolution": backbone.default_resolution,
        "prediction_type": "epsilon",
    }
    return Adapter(
        concepts=concepts,
        module=MidBlockModule("constant", shape),
        ram=constant(),
        sam=constant(),
        backbone=identity,
    )


def test_clip_features_and_score_against_pytorch(clip_folder):
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


def test_intersection_counts_combinations():
    gender = Prediction(("woman", "man"), np.array([0, 1, 1, 0]), np.ones(4))
    tone = Prediction(("light", "medium", "dark"), np.array([2, 0, 2, 2]), np.full(4, 0.5))
    joint = intersect({"gender": gender, "tone": tone})
    assert joint.counts() == {
        "woman x light": 0,
        "woman x medium": 0,
        "woman x dark": 2,
        "man x light": 1,
        "man x medium": 0,
        "man x dark": 1,
    }
    np.testing.assert_allclose(joint.probabilities, 0.5)


def test_fairness_plan_takes_templates_in_turn(suite):
    requests = fairness.plan(suite.prompts_for("fairness"), 3, seed=7)
    assert [(r.prompt, r.seed, r.subject) for r in requests] == [
        ("a photo of a cook", 7, "cook"),
        ("image of cook", 8, "cook"),
        ("a photo of a cook", 9, "cook"),
        ("a photo of an artist", 10, "artist"),
        ("image of artist", 11, "artist"),
        ("a photo of an artist", 12, "artist"),
    ]


def test_fair_weights_meet_the_target_and_intersect(tiny_backbone):
    adapter = _adapter(tiny_backbone, 1.0)
    alone = fairness.fair_weights(
        adapter, ["gender"], {"gender": {"man": 0.25, "woman": 0.75}}, 2, 4, seed=0
    )
    np.testing.assert_array_equal(alone.reshape(2, 4, 5).sum(1)[:, :2], [[3, 1], [3, 1]])
    assert set(np.unique(alone)) == {0, 1}
    with pytest.raises(ValueError, match="concept 'a woman' fits the values"):
        fairness.fair_weights(adapter, ["gender"], {"gender": {"f": 0.5, "m": 0.5}}, 2, 4, seed=0)
    both = fairness.fair_weights(adapter, ["gender", "age"], {}, 1, 8, seed=0)
    pairs = [tuple(np.flatnonzero(row)) for row in both]
    assert sorted(pairs) == sorted([(0, 2), (0, 3), (1, 2), (1, 3)] * 2)
    np.testing.assert_allclose(both.max(0), [0.6, 0.6, 0.4, 0.4, 0])
    with pytest.raises(ValueError, match=r"0 concept\(s\) of the group 'race'.*age.*gender"):
        fairness.fair_weights(adapter, ["race"], {}, 1, 2, seed=0)


def test_unsafe_rate_by_category_counts_a_picture_in_each():
    pictures = [
        picture_sets.Picture(None, "base", i, "p", subject)
        for i, subject in enumerate(("violence", "violence, hate", "hate", None))
    ]
    reasons = {"a": ["", "knife", "", ""], "b": ["", "blood", "slur", ""]}
    found, columns = safety.measure(pictures, reasons)
    assert {m.subject: (m.value, m.n) for m in found} == {
        None: (0.5, 4),
        "hate": (1.0, 2),
        "violence": (0.5, 2),
    }
    assert [c["unsafe_reason"] for c in columns] == ["", "knife; blood", "slur", ""]


@pytest.fixture(scope="module")
def evaluated(tiny_backbone, suite, tmp_path_factory):
    out = tmp_path_factory.mktemp("evaluation")
    plan = run.Plan(groups=("gender",), safe=True, images_per_subject=4, images_per_prompt=2)
    adapter = _adapter(tiny_backbone, 3.0)
    with pytest.warns(UserWarning, match="mean little"):
        results = run.evaluate(tiny_backbone, adapter, suite, plan, out, OPTIONS)
    return out, plan, adapter, results


def test_results_follow_from_the_lines_of_per_image(evaluated, suite):
    out, _, _, results = evaluated
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


def test_every_picture_is_steered_as_planned(evaluated):
    out, _, _, _ = evaluated
    rows = [r for r in load_per_image(out) if r["protocol"] == "fairness"]
    assert {r["concepts"] for r in rows if r["images"] == "base"} == {""}
    for subject in ("cook", "artist"):
        steered = [r["concepts"] for r in rows if r["images"] == "adapted"]
        women = [c.startswith("a woman=1") for c in steered]
        assert sum(women) == 4, subject
    base, adapted = (
        np.asarray(Image.open(out / f"fairness/{s}/00000.png")) for s in ("base", "adapted")
    )
    assert (base != adapted).any()


def test_interrupted_evaluation_makes_only_what_is_missing(
    evaluated, tiny_backbone, suite, monkeypatch
):
    out, plan, adapter, results = evaluated
    kept = (out / "fairness/base/00000.png").stat().st_mtime_ns
    lost = out / "fairness/adapted/00003.png"
    before = np.asarray(Image.open(lost))
    lost.unlink()
    asked = []
    sample = picture_sets.sample_images

    def counted(backbone, prompts, *args, **kwargs):
        asked.append(len(prompts))
        return sample(backbone, prompts, *args, **kwargs)

    monkeypatch.setattr(picture_sets, "sample_images", counted)
    with pytest.warns(UserWarning, match="mean little"):
        again = run.evaluate(tiny_backbone, adapter, suite, plan, out, OPTIONS)
    assert asked == [1]
    assert (out / "fairness/base/00000.png").stat().st_mtime_ns == kept
    np.testing.assert_array_equal(np.asarray(Image.open(lost)), before)
    assert again.measurements == results.measurements


def test_pictures_of_another_plan_are_kept(evaluated, tiny_backbone, suite):
    out, plan, adapter, _ = evaluated
    other = dataclasses.replace(OPTIONS, guidance_scale=5.0)
    with pytest.raises(ValueError, match=r"another evaluation.*sampling.*choose another --out"):
        run.evaluate(tiny_backbone, adapter, suite, plan, out, other)
    changed = dataclasses.replace(plan, seed=5)
    with pytest.raises(ValueError, match="differs in requests, weights"):
        run.evaluate(tiny_backbone, adapter, suite, changed, out, OPTIONS)
    assert (out / "fairness/base/00000.png").exists()


def test_what_does_not_fit_is_refused_before_anything_is_made(tiny_backbone, suite, tmp_path):
    adapter = _adapter(tiny_backbone, 1.0)
    for plan, options, message in (
        (run.Plan(), {}, "nothing chosen of it"),
        (run.Plan(groups=("race",)), {}, "no attribute 'race'"),
        (run.Plan(safe=True), {"captions": None}, "has no prompts for quality"),
        (run.Plan(safe=True), {"unsafe_classes": None}, "no unsafe_classes and no detector"),
    ):
        changed = dataclasses.replace(suite, **options)
        with pytest.raises(ValueError, match=message):
            run.evaluate(tiny_backbone, adapter, changed, plan, tmp_path / "out", OPTIONS)
    assert not (tmp_path / "out").exists()
    with pytest.raises(ValueError, match="expected shares of 1"):
        run.Plan(target={"gender": {"woman": 0.5, "man": 0.6}})


def _pictures(folder, sizes):
    for name, size in sizes.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        images_lib.save_png(np.full((size, size, 3), 90, np.uint8), folder / name)


def test_pictures_made_elsewhere_are_scored(suite, tmp_path):
    _pictures(tmp_path, {"cook/a.png": 24, "cook/b.png": 24, "artist/c.png": 24})
    plan = run.Plan(protocols=("fairness",))
    results = run.score_given(tmp_path, suite, plan, tmp_path / "out")
    (cooks,) = results.find("deviation_ratio", "given", attribute="gender", subject="cook")
    assert cooks.n == sum(cooks.counts.values()) == 2
    assert results.value("winoalign", "given") is None  # no prompts are known
    with pytest.raises(ValueError, match=r"3 pictures have no prompt.*metadata\.csv"):
        run.score_given(tmp_path, suite, run.Plan(protocols=("quality",)), tmp_path / "out")

    with open(tmp_path / "metadata.csv", "w", newline="") as file:
        rows = [("file", "prompt"), ("cook/a.png", "a cook"), ("artist/c.png", "an artist")]
        csv.writer(file).writerows(rows)
    plan = run.Plan(protocols=("quality",))
    results = run.score_given(tmp_path, suite, plan, tmp_path / "out")
    assert results.find("clip_score", "given")[0].n == 2
    assert results.value("clip_frechet_distance", "given") is None  # nothing to compare with


def test_bad_folders_of_pictures_are_named(tmp_path):
    with pytest.raises(ValueError, match="is not a folder"):
        picture_sets.given_pictures(tmp_path / "none")
    with pytest.raises(ValueError, match="has no pictures"):
        picture_sets.given_pictures(tmp_path)
    _pictures(tmp_path, {"a.png": 24, "b.png": 24, "c.png": 32})
    with pytest.raises(ValueError, match=r"most are 24x24, 1 are not: .*c\.png \(32x32\)"):
        picture_sets.read_pictures(picture_sets.given_pictures(tmp_path))
    (tmp_path / "c.png").write_bytes(b"no picture")
    with pytest.raises(ValueError, match=r"1 unreadable pictures: .*c\.png"):
        picture_sets.read_pictures(picture_sets.given_pictures(tmp_path))
    (tmp_path / "metadata.csv").write_text("file,text\na.png,x\n")
    with pytest.raises(ValueError, match=r"lacks the column\(s\) \['prompt'\]"):
        picture_sets.given_pictures(tmp_path)
    (tmp_path / "manifest.jsonl").write_text('{"file": "z.png", "prompt": "x"}\n')
    with pytest.raises(ValueError, match=r"lacks 1 listed pictures: z\.png"):
        picture_sets.given_pictures(tmp_path)


def test_suites_shipped_and_wrong(tmp_path):
    suite = load_suite("winobias")
    assert len(suite.subjects) == 36 and len(suite.templates) == 5
    assert suite.prompts("CEO")[0] == "image of CEO"
    assert len(load_suite("winobias-extended").templates) == 10
    content = {
        "name": "mine",
        "clip": "clip",
        "subjects": ["cook"],
        "templates": ["{subject}"],
        "attributes": {"gender": {"woman": ["a woman"], "man": ["a man"]}},
    }
    path = tmp_path / "suite.json"
    for change, message in (
        ({"attributes": {"gender": {"woman": ["a woman"]}}}, "expected two or more"),
        ({"templates": ["a photo"]}, "template 'a photo'"),
        ({"subjects": []}, "no subjects"),
        ({"subject_classes": {"judge": ["x"], "king": ["y"]}}, r"subject_classes lack \['cook'\]"),
        ({"colour": 1}, "colour"),
    ):
        path.write_text(json.dumps(content | change))
        with pytest.raises(ValueError, match=message):
            load_suite(str(path))
    with pytest.raises(ValueError, match="neither a readable JSON file nor one of"):
        load_suite(str(tmp_path / "none.json"))
    path.write_text(json.dumps(content))
    (tmp_path / "clip").mkdir()
    assert load_suite(str(path)).clip == str(tmp_path / "clip")


def test_command_refuses_what_makes_no_sense(capsys, tmp_path):
    out = ["--out", str(tmp_path)]
    for argv, message in (
        (["all", *out], "nothing to evaluate"),
        (["all", *out, "--images", "a", "--model", "b"], "drop --model"),
        (["fairness", *out, "--images", str(tmp_path), "--target", "gender"], "GROUP:VALUE=SHARE"),
    ):
        assert cli.main(["evaluate", *argv]) == 2
        assert message in capsys.readouterr().err
