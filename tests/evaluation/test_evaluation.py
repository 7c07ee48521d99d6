"""Evaluation: scores against PyTorch, runs that can be continued, what is recorded."""

import dataclasses

import jax
import numpy as np
import pytest
import torch
from evaluations import constant_adapter
from PIL import Image
from transformers import CLIPModel, CLIPProcessor

from respodiff_jax import images as images_lib
from respodiff_jax.backbone import load_clip
from respodiff_jax.errors import UserError
from respodiff_jax.evaluation import metrics, picture_sets, quality, run, safety
from respodiff_jax.evaluation import pictures as pictures_lib
from respodiff_jax.evaluation.classifier import classify
from respodiff_jax.evaluation.findings import Findings
from respodiff_jax.evaluation.plan import check_plan
from respodiff_jax.evaluation.results import load_per_image, load_results, save_per_image
from respodiff_jax.generation.sampling import SamplerOptions

OPTIONS = SamplerOptions(num_steps=2, guidance_scale=3.0, batch_size=8)


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


def test_unsafe_rate_by_category_counts_a_picture_in_each():
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
    out = tmp_path_factory.mktemp("evaluation")
    plan = run.Plan(groups=("gender",), safe=True, images_per_subject=4, images_per_prompt=2)
    adapter = constant_adapter(tiny_backbone, 3.0)
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
    assert results.made["pictures"]["fairness"]["count"] == 8
    assert results.scored["target"] == {}
    assert results.environment["versions"]["pillow"]
    # What a concept changed is measured from picture to picture.
    ours = {r["index"]: float(r["clip_score"]) for r in rows if r["images"] == "adapted" and _q(r)}
    base = {r["index"]: float(r["clip_score"]) for r in rows if r["images"] == "base" and _q(r)}
    change = metrics.mean_interval(np.array([ours[i] - base[i] for i in base]))
    (found,) = results.find("clip_score", "adapted")
    assert found.change == pytest.approx(change, abs=1e-3)
    assert results.find("clip_score", "base")[0].change is None
    # The classifier is checked before there is much for it to count.
    plans = [(out / name / "plan.json").stat().st_mtime_ns for name in ("check", "fairness")]
    assert plans == sorted(plans)
    accuracy = results.scored["accuracy_on_plain_prompts"]
    assert {k: list(v) for k, v in accuracy.items()} == {
        "gender": ["woman", "man"],
        "age": ["young", "old"],
    }


def _q(row):
    return row["protocol"] == "quality"


def test_every_picture_is_steered_as_planned(evaluated):
    out, _, _, _ = evaluated
    rows = [r for r in load_per_image(out) if r["protocol"] == "fairness"]
    assert {r["concepts"] for r in rows if r["images"] == "base"} == {""}
    for subject in ("cook", "artist"):
        mine = [r for r in rows if r["images"] == "adapted" and r["subject"] == subject]
        assert sum(r["concepts"].startswith("a woman=1") for r in mine) == 2, subject
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
    with pytest.raises(UserError, match=r"another evaluation.*sampling.*choose another --out"):
        run.evaluate(tiny_backbone, adapter, suite, plan, out, other)
    changed = dataclasses.replace(plan, seed=5)
    with pytest.raises(UserError, match="differs in requests; choose"):
        run.evaluate(tiny_backbone, adapter, suite, changed, out, OPTIONS)
    config = dict(tiny_backbone.scheduler_config) | {"steps_offset": 7}
    vae = jax.tree.map(lambda leaf: leaf + 1, tiny_backbone.params["vae"])
    for change in ({"scheduler_config": config}, {"params": {**tiny_backbone.params, "vae": vae}}):
        other = dataclasses.replace(tiny_backbone, **change)
        with pytest.raises(UserError, match="differs in model"):
            run.evaluate(other, adapter, suite, plan, out, OPTIONS)
    assert (out / "fairness/base/00000.png").exists()
    later = dataclasses.replace(plan, images_per_caption=2)
    with pytest.raises(UserError, match="quality holds pictures of another evaluation"):
        run.evaluate(tiny_backbone, adapter, suite, later, out, OPTIONS)
    assert {m.protocol for m in load_results(out).measurements} == set(plan.protocols)
    less = dataclasses.replace(plan, protocols=("quality",))
    with pytest.raises(UserError, match="results of fairness, safety, which would be lost"):
        run.evaluate(tiny_backbone, adapter, suite, less, out, OPTIONS)


def test_a_classifier_that_cannot_tell_one_value_is_told_of():
    six, four = 6 / 8, 4 / 8  # six may be chance where nine of ten are found
    assert run.accuracy_notes({"gender": {"woman": 1.0, "man": six}}) == []
    (note,) = run.accuracy_notes(
        {"gender": {"woman": six, "man": six}, "skin_tone": {"a": 1.0, "b": four, "c": 1.0}}
    )
    assert "only 50% " in note and "(skin tone b): its counts of skin tone mean little" in note


def test_what_does_not_fit_is_refused_before_anything_is_made(tiny_backbone, suite, tmp_path):
    adapter = constant_adapter(tiny_backbone, 1.0)
    for plan, options, message in (
        (run.Plan(), {}, "nothing chosen of it"),
        (run.Plan(groups=("race",)), {}, "no attribute 'race'"),
        (run.Plan(safe=True), {"captions": None}, "has no prompts for quality"),
        (run.Plan(safe=True), {"unsafe_classes": None}, "no unsafe_classes and no detector"),
        (run.Plan(safe=True), {"captions": ("one",)}, "quality of one picture"),
        (run.Plan(safe=True, target={"race": {"a": 1.0}}), {}, "no attribute 'race'"),
        (
            run.Plan(safe=True, target={"gender": {"woman": 1.0}}),
            {},
            r"target of gender names \['woman'\], its values are \['woman', 'man'\]",
        ),
    ):
        changed = dataclasses.replace(suite, **options)
        with pytest.raises(UserError, match=message):
            run.evaluate(tiny_backbone, adapter, changed, plan, tmp_path / "out", OPTIONS)
    assert not (tmp_path / "out").exists()
    for woman, man in ((0.5, 0.6), (-0.5, 1.5), (float("nan"), 0.5)):
        with pytest.raises(UserError, match="expected shares of 1, none"):
            run.Plan(target={"gender": {"woman": woman, "man": man}})
    for change, message in (
        ({"seed": 2**32 - 1}, "seed is 4294967295, expected within 0"),
        ({"groups": ("age", "age")}, "expected each once"),
        ({"protocols": ()}, "expected some of"),
    ):
        with pytest.raises(UserError, match=message):
            run.Plan(**change)
    with pytest.raises(UserError, match="no adapter is given"):
        check_plan(suite, run.Plan(safe=True))


def test_quality_is_compared_with_the_base_models_pictures(suite, tmp_path, monkeypatch):
    def colours(paths):
        return np.array([np.asarray(Image.open(path)).mean((0, 1)) for path in paths])

    colours.identity = {"package": "colours"}
    sets = {}
    monkeypatch.setattr(quality, "open_inception", lambda: (colours, ""))
    rng = np.random.default_rng(0)
    for name in ("base", "adapted"):
        paths = [tmp_path / f"{name}{i}.png" for i in range(3)]
        for path in paths:
            images_lib.save_png(rng.integers(0, 256, (24, 24, 3), np.uint8), path)
        sets[name] = [pictures_lib.Picture(p, name, i, "a", None) for i, p in enumerate(paths)]
    plan = run.Plan(protocols=("quality",))
    findings = Findings(tmp_path, load_clip(suite.clip), suite, plan, {}, None, None)
    run._score_quality(findings, sets)
    results = findings.save()
    pair = [colours([p.path for p in sets[name]]) for name in ("adapted", "base")]
    assert results.value("fid", "adapted") == pytest.approx(metrics.frechet_distance(*pair))
    (kid,) = results.find("kid")
    expected = metrics.kernel_parts(*pair, paired=True).mean()
    assert kid.images == "adapted" and kid.value == pytest.approx(expected)
    assert kid.interval[0] <= kid.value <= kid.interval[1]
    assert results.scored["inception"] == {"package": "colours"}


def test_a_table_is_written_whole_and_a_half_one_is_refused(tmp_path):
    save_per_image([{"file": "a.png", "prompt": "x\ny"}, {"file": "b.png"}], tmp_path)
    rows = load_per_image(tmp_path)
    assert rows == [{"file": "a.png", "prompt": "x\ny"}, {"file": "b.png", "prompt": ""}]
    with pytest.raises(UnicodeEncodeError):
        save_per_image([{"file": "\udc80"}], tmp_path)
    assert load_per_image(tmp_path) == rows
    (tmp_path / "per_image.csv").write_text("file,prompt\r\na.png,x\r\nb.p")
    with pytest.raises(UserError, match=r"per_image\.csv is damaged: picture 2"):
        load_per_image(tmp_path)
