"""Evaluation: classifying, planning, generating so that it can be continued, scoring, recording."""

import csv
import dataclasses
import json

import jax
import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CLIPModel, CLIPProcessor

from respodiff_jax import cli
from respodiff_jax import images as images_lib
from respodiff_jax.adapters import Adapter
from respodiff_jax.backbone import load_clip
from respodiff_jax.cli import inputs
from respodiff_jax.concepts import Concept
from respodiff_jax.evaluation import fairness, metrics, picture_sets, quality, run, safety
from respodiff_jax.evaluation.classifier import Prediction, classify, intersect
from respodiff_jax.evaluation.findings import Findings
from respodiff_jax.evaluation.plan import check_plan, missing
from respodiff_jax.evaluation.results import load_per_image, load_results, save_per_image
from respodiff_jax.evaluation.suites import Prompt, PromptSet, Suite, load_suite
from respodiff_jax.generation import ImagePair, SamplerOptions
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
    adapter = dataclasses.replace(
        _adapter(tiny_backbone, 1.0), default_scales=(1.0, 0.5, 1.0, 1.0, 1.0)
    )
    prompts = [Prompt("a cook", "cook"), Prompt("a judge", "judge")]
    requests = fairness.plan(prompts, 4, seed=0)
    alone = fairness.fair_weights(
        adapter, ["gender"], {"gender": {"man": 0.25, "woman": 0.75}}, requests, 4, seed=0
    )
    # One man of four, at the concept's own scale.
    np.testing.assert_array_equal(alone.reshape(2, 4, 5).sum(1)[:, :2], [[3, 0.5], [3, 0.5]])
    with pytest.raises(ValueError, match="concept 'a woman' fits the values"):
        target = {"gender": {"f": 0.5, "m": 0.5}}
        fairness.fair_weights(adapter, ["gender"], target, requests, 4, seed=0)
    adapter = _adapter(tiny_backbone, 1.0)
    both = fairness.fair_weights(adapter, ["gender", "age"], {}, requests, 8, seed=0)
    pairs = [tuple(np.flatnonzero(row)) for row in both]
    assert sorted(pairs) == sorted([(0, 2), (0, 3), (1, 2), (1, 3)] * 2)
    np.testing.assert_allclose(both.max(0), [0.6, 0.6, 0.4, 0.4, 0])
    with pytest.raises(ValueError, match=r"0 concept\(s\) of the group 'race'.*age.*gender"):
        fairness.fair_weights(adapter, ["race"], {}, requests, 4, seed=0)


@pytest.mark.parametrize(
    ("concepts", "images", "each"),
    [(2, 150, {15}), (3, 150, {10}), (2, 15, {1, 2}), (3, 10, {0, 1})],
)
def test_concepts_are_shared_out_under_every_template(tiny_backbone, concepts, images, each):
    adapter = dataclasses.replace(
        _adapter(tiny_backbone, 1.0),
        concepts=tuple(_concept(f"c{i}", "g" if i < concepts else "h") for i in range(5)),
    )
    requests = fairness.plan(load_suite("winobias").prompts_for("fairness")[:20], images, seed=0)
    weights = fairness.fair_weights(adapter, ["g"], {}, requests, images, seed=0)
    counts = {}
    for request, row in zip(requests, weights, strict=True):
        counts[request.prompt] = counts.get(request.prompt, 0) + row[:concepts]
    assert len(counts) == 20 and {int(n) for row in counts.values() for n in row} == each
    # Not one concept after the other: a report shows the first pictures.
    first = weights.reshape(4, images, -1)[:, :30, :concepts].sum(1)
    assert (first > 0).all()


def test_unsafe_rate_by_category_counts_a_picture_in_each():
    pictures = [
        picture_sets.Picture(None, "base", i, "p", subject)
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
    with pytest.raises(ValueError, match="differs in requests; choose"):
        run.evaluate(tiny_backbone, adapter, suite, changed, out, OPTIONS)
    config = dict(tiny_backbone.scheduler_config) | {"steps_offset": 7}
    vae = jax.tree.map(lambda leaf: leaf + 1, tiny_backbone.params["vae"])
    for change in ({"scheduler_config": config}, {"params": {**tiny_backbone.params, "vae": vae}}):
        other = dataclasses.replace(tiny_backbone, **change)
        with pytest.raises(ValueError, match="differs in model"):
            run.evaluate(other, adapter, suite, plan, out, OPTIONS)
    assert (out / "fairness/base/00000.png").exists()
    less = dataclasses.replace(plan, protocols=("quality",))
    with pytest.raises(ValueError, match="results of fairness, safety, which would be lost"):
        run.evaluate(tiny_backbone, adapter, suite, less, out, OPTIONS)


def test_a_failure_costs_only_what_is_not_drawn(tiny_backbone, tmp_path, monkeypatch):
    asked, saved = [], []

    def sample(backbone, prompts, seeds, *args, **kwargs):
        asked.append(len(seeds))
        for seed in seeds:
            if seed > 99:
                raise ValueError("no such seed")
            yield ImagePair(np.full((8, 8, 3), seed, np.uint8), None)

    def save(image, path, metadata):
        saved.append(path.name)
        if len(saved) == 2:
            path.write_bytes(b"half a pict")
            raise OSError("no space left")
        whole(image, path, metadata)

    whole = images_lib.save_png
    monkeypatch.setattr(picture_sets, "sample_images", sample)
    monkeypatch.setattr(picture_sets.images_lib, "save_png", save)

    def make(seed, **settings):
        requests = picture_sets.repeated([Prompt("a")], 3, seed)
        folder = tmp_path / "fairness"
        return picture_sets.generate_pictures(
            tiny_backbone, requests, folder, OPTIONS, settings=settings
        )

    with pytest.raises(ValueError, match="no such seed"):
        make(100)
    # No picture was made of that plan, so that it may be corrected.
    with pytest.raises(OSError, match="no space"):
        make(5)
    pictures = make(5)
    assert asked == [3, 3, 2]
    assert [np.asarray(Image.open(p.path))[0, 0, 0] for p in pictures] == [5, 6, 7]
    with pytest.raises(ValueError, match="differs in requests"):
        make(6)


def test_a_classifier_that_cannot_tell_one_value_is_told_of():
    seven, six = 7 / 8, 6 / 8
    assert run.accuracy_notes({"gender": {"woman": 1.0, "man": seven}}) == []
    (note,) = run.accuracy_notes(
        {"gender": {"woman": seven, "man": seven}, "skin_tone": {"a": 1.0, "b": six, "c": 1.0}}
    )
    assert "only 75% " in note and "(skin tone b): its counts of skin tone mean little" in note


def test_what_does_not_fit_is_refused_before_anything_is_made(tiny_backbone, suite, tmp_path):
    adapter = _adapter(tiny_backbone, 1.0)
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
        with pytest.raises(ValueError, match=message):
            run.evaluate(tiny_backbone, adapter, changed, plan, tmp_path / "out", OPTIONS)
    assert not (tmp_path / "out").exists()
    for woman, man in ((0.5, 0.6), (-0.5, 1.5), (float("nan"), 0.5)):
        with pytest.raises(ValueError, match="expected shares of 1, none"):
            run.Plan(target={"gender": {"woman": woman, "man": man}})
    for change, message in (
        ({"seed": 2**32 - 1}, "seed is 4294967295, expected within 0"),
        ({"groups": ("age", "age")}, "expected each once"),
        ({"protocols": ()}, "expected some of"),
    ):
        with pytest.raises(ValueError, match=message):
            run.Plan(**change)
    with pytest.raises(ValueError, match="no adapter is given"):
        check_plan(suite, run.Plan(safe=True))


def test_what_a_suite_lacks_is_left_out(suite):
    assert missing(suite, {}) == {}
    lacks = missing(load_suite("winobias"), {})
    assert list(lacks) == ["quality", "safety"]
    assert "no prompts for quality" in lacks["quality"] and "no detector" in lacks["safety"]
    captions = PromptSet((Prompt("a cat"),), {})
    (lack,) = missing(load_suite("winobias"), {"quality": captions}, ["nudenet"]).values()
    assert "no prompts for safety" in lack


def test_targets_and_intersections_by_hand(suite, monkeypatch):
    suite = dataclasses.replace(
        suite,
        attributes={"gender": dict.fromkeys("wm", ("x",)), "tone": dict.fromkeys("ldn", ("x",))},
        subject_classes=None,
    )
    seen = {"gender": [0, 0, 0, 1, 1, 1], "tone": [0, 0, 1, 0, 0, 2]}

    def see(clip, features, classes):
        name = "gender" if len(classes) == 2 else "tone"
        return Prediction(tuple(classes), np.array(seen[name]), np.ones(6))

    monkeypatch.setattr(fairness, "classify", see)
    pictures = [picture_sets.Picture(None, "given", i, None, "cook") for i in range(6)]
    target = {"tone": {"n": 0.2, "d": 0.3, "l": 0.5}}
    measured, _ = fairness.measure(pictures, None, suite, None, target, [("gender", "tone")])
    found = {m.attribute: m for m, _ in measured if m.subject == "cook"}
    assert found["gender"].value == 0 and found["gender"].interval[1] > 0.5
    # Light 4/6 of 0.5, dark 1/6 of 0.3, none 1/6 of 0.2; at most 1 - 0.2.
    assert found["tone"].value == pytest.approx((4 / 6 - 0.5) / 0.8)
    joint = found["gender x tone"]
    assert list(joint.counts.values()) == [2, 1, 0, 2, 0, 1]
    assert joint.target == pytest.approx((0.25, 0.15, 0.1, 0.25, 0.15, 0.1))
    # m x d: 0 of 0.15.
    assert joint.value == pytest.approx(0.15 / 0.9)
    (overall,) = [m for m, _ in measured if m.attribute == "tone" and m.subject is None]
    assert overall.value == found["tone"].value and overall.interval is None  # of one profession


def _pictures(folder, sizes):
    for name, size in sizes.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        images_lib.save_png(np.full((size, size, 3), 90, np.uint8), folder / name)


@pytest.mark.filterwarnings("ignore:the classifier was not checked:UserWarning")
def test_pictures_made_elsewhere_are_scored(suite, tmp_path):
    _pictures(tmp_path, {"cook/a.png": 24, "cook/b.png": 24, "artist/c.png": 24})
    plan = run.Plan(protocols=("fairness",))
    results = run.score_given(tmp_path, suite, plan, tmp_path / "out")
    (note,) = results.warnings
    assert "not checked" in note
    (cooks,) = results.find("deviation_ratio", "given", attribute="gender", subject="cook")
    assert cooks.n == sum(cooks.counts.values()) == 2
    assert results.value("winoalign", "given") is None  # no prompts are known
    with pytest.raises(ValueError, match=r"3 pictures have no prompt.*metadata\.csv"):
        run.score_given(tmp_path, suite, run.Plan(protocols=("quality",)), tmp_path / "no")

    with open(tmp_path / "metadata.csv", "w", newline="") as file:
        rows = [("file", "prompt"), ("cook/a.png", "a cook"), ("artist/c.png", "an artist")]
        csv.writer(file).writerows(rows)
    plan = run.Plan(protocols=("quality",))
    results = run.score_given(tmp_path, suite, plan, tmp_path / "quality")
    assert results.find("clip_score", "given")[0].n == 2
    assert results.value("clip_frechet_distance", "given") is None  # nothing to compare with


@pytest.mark.filterwarnings("ignore:the classifier was not checked:UserWarning")
def test_what_was_scored_is_kept_and_found_again(suite, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    _pictures(tmp_path / "made", {"cook/a.png": 24, "artist/c.png": 24})

    def broken(paths):
        raise OSError("the detector broke")

    broken.identity = {}
    plan = run.Plan(protocols=("fairness", "safety"))
    with pytest.raises(OSError, match="broke"):
        run.score_given("made", suite, plan, "results/out", detectors={"broken": broken})
    assert {m.protocol for m in load_results("results/out").measurements} == {"fairness"}
    files = [row["file"] for row in load_per_image("results/out")]
    assert files == ["../../made/artist/c.png", "../../made/cook/a.png"]
    assert all((tmp_path / "results/out" / file).is_file() for file in files)


@pytest.mark.filterwarnings("ignore:the classifier was not checked:UserWarning")
def test_subjects_without_pictures_and_unknown_ones_are_named(suite, tmp_path):
    _pictures(tmp_path, {"cook/a.png": 24, "artiste/c.png": 24})
    plan = run.Plan(protocols=("fairness",))
    with (
        pytest.warns(UserWarning, match="1 of 2 subjects have no pictures.*: artist$"),
        pytest.warns(UserWarning, match="1 subjects are not the suite's.*: artiste$"),
    ):
        results = run.score_given(tmp_path, suite, plan, tmp_path / "out")
    assert len(results.warnings) == 3
    (tmp_path / "cook/a.png").rename(tmp_path / "a.png")
    (tmp_path / "artiste/c.png").unlink()
    with pytest.raises(ValueError, match=r"no picture has a subject.*folder for each profession"):
        run.score_given(tmp_path, suite, plan, tmp_path / "none")


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
        sets[name] = [picture_sets.Picture(p, name, i, "a", None) for i, p in enumerate(paths)]
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


def test_bad_folders_of_pictures_are_named(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="is not a folder"):
        picture_sets.given_pictures(tmp_path / "none")
    with pytest.raises(ValueError, match="has no pictures"):
        picture_sets.given_pictures(tmp_path)
    _pictures(tmp_path, {"a.png": 24, "b.png": 24, "c.png": 32})
    with pytest.raises(ValueError, match=r"most are 24x24, 1 are not: .*c\.png \(32x32\)"):
        picture_sets.check_pictures(picture_sets.given_pictures(tmp_path))
    with monkeypatch.context() as limited:
        limited.setattr(Image, "MAX_IMAGE_PIXELS", 100)
        with pytest.raises(ValueError, match=r"3 unreadable pictures: .*decompression bomb"):
            picture_sets.check_pictures(picture_sets.given_pictures(tmp_path))
        with pytest.raises(ValueError, match=r"not a readable picture.*decompression bomb"):
            picture_sets.Pixels([tmp_path / "a.png"])[0]
    (tmp_path / "c.png").write_bytes(b"no picture")
    (tmp_path / "b.png").write_bytes((tmp_path / "b.png").read_bytes()[:-30])  # cut short
    with pytest.raises(ValueError, match=r"2 unreadable pictures: .*b\.png.*c\.png"):
        picture_sets.check_pictures(picture_sets.given_pictures(tmp_path))
    (tmp_path / "metadata.csv").write_text("file,text\na.png,x\n")
    with pytest.raises(ValueError, match=r"lacks the column\(s\) \['prompt'\]"):
        picture_sets.given_pictures(tmp_path)
    (tmp_path / "manifest.jsonl").write_text('{"file": "z.png", "prompt": "x"}\n')
    with pytest.raises(ValueError, match=r"lacks 1 listed pictures: z\.png"):
        picture_sets.given_pictures(tmp_path)
    for line in ('{"prompt": "x"}', '{"file": "a.pn', "[1]", '{"file": 3}'):
        (tmp_path / "manifest.jsonl").write_text('{"file": "a.png", "prompt": "x"}\n\n' + line)
        with pytest.raises(ValueError, match=r"manifest\.jsonl, line 3 is .*expected an object"):
            picture_sets.given_pictures(tmp_path)


def test_a_table_is_written_whole_and_a_half_one_is_refused(tmp_path):
    save_per_image([{"file": "a.png", "prompt": "x\ny"}, {"file": "b.png"}], tmp_path)
    rows = load_per_image(tmp_path)
    assert rows == [{"file": "a.png", "prompt": "x\ny"}, {"file": "b.png", "prompt": ""}]
    with pytest.raises(UnicodeEncodeError):
        save_per_image([{"file": "\udc80"}], tmp_path)
    assert load_per_image(tmp_path) == rows
    (tmp_path / "per_image.csv").write_text("file,prompt\r\na.png,x\r\nb.p")
    with pytest.raises(ValueError, match=r"per_image\.csv is damaged: picture 2"):
        load_per_image(tmp_path)


def test_suites_shipped_and_wrong(tmp_path):
    suite = load_suite("winobias")
    assert len(suite.subjects) == 36 and len(suite.templates) == 5
    assert suite.prompts("CEO")[0] == "image of CEO"
    assert suite.attributes["gender"] == {"woman": ("a woman",), "man": ("a man",)}
    successful = load_suite("winobias-successful")
    assert successful.subjects == suite.subjects and len(successful.templates) == 5
    assert successful.prompts("CEO")[-1] == "portrait of a successful CEO"
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
        ({"subjects": "cook"}, "subjects are 'cook', expected a list of texts"),
        ({"templates": "{subject}"}, "templates are '{subject}', expected a list"),
        ({"captions": "a cat"}, "captions are 'a cat', expected a list"),
        ({"captions": [1]}, "captions are .1,., expected a list of texts"),
        ({"safety_prompts": ["ab"]}, r"safety_prompts have 'ab', expected \[prompt, category\]"),
        ({"attributes": {"gender": {"a": "a woman", "b": ["b"]}}}, "'a woman', expected a list"),
        ({"attributes": {"gender": ["a", "b"]}}, "gender is .'a', 'b'., expected its values"),
        ({"attributes": []}, "attributes are "),
        ({"guidance_scale": "7.5"}, "guidance_scale is '7.5', expected a number"),
        ({"clip": None}, "clip is None"),
    ):
        path.write_text(json.dumps(content | change))
        with pytest.raises(ValueError, match=message):
            load_suite(str(path))
    with pytest.raises(ValueError, match="neither a readable JSON file nor one of"):
        load_suite(str(tmp_path / "none.json"))
    path.write_text("[]")
    with pytest.raises(ValueError, match="it holds list, expected an object"):
        load_suite(str(path))
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


def test_mistakes_are_known_before_anything_is_loaded(tiny_backbone, monkeypatch, capsys, tmp_path):
    whole = _adapter(tiny_backbone, 1.0)
    few = {"ram": {"constant": whole.ram["constant"][1:4]}}
    few |= {"sam": {"constant": whole.sam["constant"][1:4]}}
    one_man = dataclasses.replace(whole, concepts=whole.concepts[1:4], default_scales=None, **few)

    def never(*args, **kwargs):
        raise AssertionError("something was loaded")

    monkeypatch.setattr("respodiff_jax.backbone.load_clip", never)
    monkeypatch.setattr("respodiff_jax.backbone.load_backbone", never)
    monkeypatch.setattr(inputs, "open_adapter", lambda path: one_man)
    for argv, message in (
        (["--group", "gender"], "1 concept(s) of the group 'gender', expected two or more"),
        (["--safe"], "the adapter has no safety concepts"),
        (["--group", "age", "--batch-size", "3"], "batch size is 3, expected a multiple"),
        (["--group", "age", "--batch-size", "0"], "batch size is 0"),
        (["--group", "age", "--steps", "0"], "number of sampling steps is 0"),
        (["--group", "age", "--resolution", "0"], "resolution is 0"),
        (["--group", "age", "--images-per-subject", "0"], "images_per_subject is 0"),
        (["--group", "age", "--images-per-prompt", "0"], "images_per_prompt is 0"),
        (["--group", "age", "--images-per-caption", "0"], "images_per_caption is 0"),
        (["--group", "age", "--max-prompts", "0"], "--max-prompts is 0"),
        (["--group", "age", "--seed", "4294000000"], "seed is 4294000000"),
        (
            ["--group", "gender", "--target", "gender:woman=0.5,man=0.4"],
            "expected shares of 1, none",
        ),
        (["--group", "gender", "--target", "gender:woman=1"], "its values are"),
        (["--group", "age"], "has no attribute 'age'"),
    ):
        argv = ["evaluate", "fairness", "--adapter", "a", "--out", str(tmp_path / "out"), *argv]
        assert cli.main(argv) == 2
        assert message in capsys.readouterr().err, argv
    assert not (tmp_path / "out").exists()


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_all_that_can_be_measured_is(clip_folder, capsys, tmp_path):
    _pictures(tmp_path / "made", {"cook/a.png": 24, "cook/b.png": 24})
    argv = ["evaluate", "all", "--images", str(tmp_path / "made"), "--clip", str(clip_folder)]
    assert cli.main([*argv, "--out", str(tmp_path / "out")]) == 0
    results = load_results(tmp_path / "out")
    assert {m.protocol for m in results.measurements} == {"fairness"}
    quality_note, safety_note, subjects, unchecked = results.warnings
    assert quality_note.startswith("quality is left out: 2 pictures have no prompt")
    assert safety_note.startswith("safety is left out: ") and "no detector" in safety_note
    assert subjects.startswith("35 of 36 subjects have no pictures") and "..." in subjects
    assert "not checked" in unchecked
    (tmp_path / "made/cook/b.png").rename(tmp_path / "made/b.png")
    (tmp_path / "made/cook/a.png").rename(tmp_path / "made/a.png")
    assert cli.main([*argv, "--out", str(tmp_path / "none")]) == 2
    assert "nothing can be evaluated: no picture has a subject" in capsys.readouterr().err
