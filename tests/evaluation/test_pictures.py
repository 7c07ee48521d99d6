"""Pictures that are drawn for an evaluation, and pictures of other tools."""

import csv
import dataclasses
import json

import numpy as np
import pytest
from evaluations import grey_pictures
from PIL import Image

from respodiff_jax import images as images_lib
from respodiff_jax.errors import UserError
from respodiff_jax.evaluation import drawing, evaluate, load_results
from respodiff_jax.evaluation import pictures as pictures_lib
from respodiff_jax.evaluation.results import load_per_image, save_results
from respodiff_jax.evaluation.suites import Prompt
from respodiff_jax.generation.sampling import ImagePair, SamplerOptions

OPTIONS = SamplerOptions(num_steps=2, guidance_scale=3.0, batch_size=8)


def test_failure_while_drawing_loses_no_finished_picture(tiny_backbone, tmp_path, monkeypatch):
    asked, saved = [], []

    def sample(backbone, prompts, seeds, *args, only, **kwargs):
        asked.append(len(only))
        for seed in (seeds[i] for i in only):
            if seed > 99:
                raise ValueError("no such seed")
            yield ImagePair(np.full((8, 8, 3), seed, np.uint8), None)

    def save(image, path, metadata):
        saved.append(path.name)
        if len(saved) == 2:
            path.with_name(path.name + ".partial").write_bytes(b"half a pict")
            raise OSError("no space left")
        whole(image, path, metadata)

    whole = images_lib.save_png
    monkeypatch.setattr(drawing, "sample_images", sample)
    monkeypatch.setattr(drawing.images_lib, "save_png", save)

    def make(seed, **settings):
        requests = drawing.requests_per_prompt([Prompt("a")], 3, seed)
        folder = tmp_path / "fairness"
        return drawing.draw_pictures(tiny_backbone, requests, folder, OPTIONS, settings=settings)

    with pytest.raises(ValueError, match="no such seed"):
        make(100)
    # No picture of seed 100 exists, so another seed may take the folder.
    with pytest.raises(OSError, match="no space"):
        make(5)
    pictures = make(5)
    assert asked == [3, 3, 2]
    assert [np.asarray(Image.open(p.path))[0, 0, 0] for p in pictures] == [5, 6, 7]
    with pytest.raises(UserError, match="differs in requests"):
        make(6)


@pytest.mark.parametrize("old", ["ddim", "dpm++", "euler", "ddim-diffusers"])
def test_folder_is_continued_with_its_own_sampler_only(tmp_path, old):
    def settings(sampler):
        own = {} if sampler == "ddim" else {"sampler": sampler}  # as `evaluate` records it
        return {"sampling": {"num_steps": 2, **own}}

    requests = drawing.requests_per_prompt([Prompt("a")], 1, seed=0)
    (tmp_path / "base").mkdir()
    (tmp_path / "base/00000.png").touch()
    (tmp_path / "plan.json").write_text(json.dumps(drawing._record(requests, None, settings(old))))
    drawing.check_folder(tmp_path, requests, settings=settings(old))
    for new in {"ddim", "dpm++"} - {old}:
        with pytest.raises(UserError, match="differs in sampling"):
            drawing.check_folder(tmp_path, requests, settings=settings(new))


@pytest.mark.filterwarnings("ignore:the classifier was not checked:UserWarning")
def test_pictures_of_another_tool_are_scored(suite, tmp_path):
    grey_pictures(tmp_path, {"cook/a.png": 24, "cook/b.png": 24, "artist/c.png": 24})

    def score(part, out):
        return evaluate(images=tmp_path, suite=suite, part=part, out=out)

    results = score("fairness", tmp_path / "out")
    (note,) = results.warnings
    assert "not checked" in note
    (cooks,) = results.find("deviation_ratio", "given", attribute="gender", subject="cook")
    assert cooks.n == sum(cooks.counts.values()) == 2
    assert results.value("winoalign", "given") is None  # no prompts are known
    with pytest.raises(UserError, match=r"3 pictures have no prompt.*metadata\.csv"):
        score("quality", tmp_path / "no")
    with pytest.raises(UserError, match="output folder gs://b/out is on Google"):
        score("fairness", "gs://b/out")

    with open(tmp_path / "metadata.csv", "w", newline="") as file:
        rows = [("file", "prompt"), ("cook/a.png", "a cook"), ("artist/c.png", "an artist")]
        csv.writer(file).writerows(rows)
    results = score("quality", tmp_path / "quality")
    assert results.find("clip_score", "given")[0].n == 2
    assert results.value("clip_frechet_distance", "given") is None  # nothing to compare with


def test_results_of_other_pictures_are_kept(tiny_backbone, suite, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("a", "b"):
        grey_pictures(tmp_path / name, {"x.png": 24})

    def detect(paths):
        return ["" for _ in paths]

    detect.name, detect.identity = "none", {}
    own = dataclasses.replace(suite, unsafe_classes=None)
    common = {"part": "safety", "suite": own, "detectors": [detect], "out": "out"}
    results = evaluate(images="a", **common)
    assert evaluate(images=tmp_path / "a", **common).measurements == results.measurements
    drawing = {"model": tiny_backbone, "num_steps": 2}
    for other, what in (({"images": "b"}, "images"), (drawing, "images, model")):
        with pytest.raises(UserError, match=rf"out has results of other .* in {what}; choose"):
            evaluate(**other, **common)
    assert load_results("out").made["images"] == str(tmp_path / "a")
    made = {"model": tiny_backbone.identity | {"parts_sha256": "1"}, "adapter": {"sha256": "2"}}
    save_results(dataclasses.replace(results, made=made), "out")
    with pytest.raises(UserError, match="differ in images, model, adapter; choose"):
        evaluate(images="a", **common)
    with pytest.raises(UserError, match="differ in adapter; choose"):
        evaluate(**drawing, **common)


@pytest.mark.filterwarnings("ignore:the classifier was not checked:UserWarning")
def test_scores_are_saved_after_each_part(suite, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    grey_pictures(tmp_path / "made", {"cook/a.png": 24, "artist/c.png": 24})

    def broken(paths):
        raise OSError("the detector broke")

    broken.name, broken.identity = "broken", {}
    parts = ["safety", "fairness"]
    with pytest.raises(OSError, match="broke"):
        evaluate(images="made", suite=suite, part=parts, out="results/out", detectors=[broken])
    assert {m.part for m in load_results("results/out").measurements} == {"fairness"}
    files = [row["file"] for row in load_per_image("results/out")]
    assert files == ["../../made/artist/c.png", "../../made/cook/a.png"]
    assert all((tmp_path / "results/out" / file).is_file() for file in files)


@pytest.mark.filterwarnings("ignore:the classifier was not checked:UserWarning")
def test_missing_and_unknown_subjects_are_named(suite, tmp_path):
    grey_pictures(tmp_path, {"cook/a.png": 24, "artiste/c.png": 24})
    arguments = {"images": tmp_path, "suite": suite, "part": "fairness"}
    with (
        pytest.warns(UserWarning, match="1 of 2 subjects have no pictures.*: artist$"),
        pytest.warns(UserWarning, match="1 subjects are not the suite's.*: artiste$"),
    ):
        results = evaluate(**arguments, out=tmp_path / "out")
    assert len(results.warnings) == 3
    (tmp_path / "cook/a.png").rename(tmp_path / "a.png")
    (tmp_path / "artiste/c.png").unlink()
    with pytest.raises(UserError, match=r"no picture has a subject.*folder for each profession"):
        evaluate(**arguments, out=tmp_path / "none")


def test_bad_picture_folders_are_explained(tmp_path, monkeypatch):
    with pytest.raises(UserError, match="is not a folder"):
        pictures_lib.find_pictures(tmp_path / "none")
    with pytest.raises(UserError, match="has no pictures"):
        pictures_lib.find_pictures(tmp_path)
    grey_pictures(tmp_path, {"a.png": 24, "b.png": 24, "c.png": 32})
    with pytest.raises(UserError, match=r"most are 24x24, 1 are not: .*c\.png \(32x32\)"):
        pictures_lib.check_pictures(pictures_lib.find_pictures(tmp_path))
    with monkeypatch.context() as limited:
        limited.setattr(Image, "MAX_IMAGE_PIXELS", 100)
        with pytest.raises(UserError, match=r"3 unreadable pictures: .*decompression bomb"):
            pictures_lib.check_pictures(pictures_lib.find_pictures(tmp_path))
        with pytest.raises(UserError, match=r"not a readable picture.*decompression bomb"):
            pictures_lib.Pixels([tmp_path / "a.png"])[0]
    (tmp_path / "c.png").write_bytes(b"no picture")
    (tmp_path / "b.png").write_bytes((tmp_path / "b.png").read_bytes()[:-30])  # cut short
    with pytest.raises(UserError, match=r"2 unreadable pictures: .*b\.png.*c\.png"):
        pictures_lib.check_pictures(pictures_lib.find_pictures(tmp_path))
    (tmp_path / "metadata.csv").write_text("file,text\na.png,x\n")
    with pytest.raises(UserError, match=r"lacks the column\(s\) \['prompt'\]"):
        pictures_lib.find_pictures(tmp_path)
    (tmp_path / "metadata.csv").unlink()
    (tmp_path / "manifest.jsonl").write_text('{"file": "z.png", "prompt": "x"}\n')
    with pytest.raises(UserError, match=r"lacks 1 listed pictures: z\.png"):
        pictures_lib.find_pictures(tmp_path)
    concepts = '{"file": "a.png", "concepts": ["a woman"]}'
    for line in ('{"prompt": "x"}', '{"file": "a.pn', "[1]", '{"file": 3}', concepts):
        (tmp_path / "manifest.jsonl").write_text('{"file": "a.png", "prompt": "x"}\n\n' + line)
        with pytest.raises(UserError, match=r"manifest\.jsonl, line 3"):
            pictures_lib.find_pictures(tmp_path)


def test_metadata_adds_the_subjects_that_a_manifest_lacks(tmp_path):
    grey_pictures(tmp_path, {"a.png": 24})
    (tmp_path / "manifest.jsonl").write_text('{"file": "a.png", "prompt": "a cook"}\n')
    assert pictures_lib.find_pictures(tmp_path)[0].subject is None
    (tmp_path / "metadata.csv").write_text("file,prompt,subject\na.png,a cook,cook\n")
    assert pictures_lib.find_pictures(tmp_path)[0].subject == "cook"
