"""Sets of pictures: drawn by a plan, or made elsewhere and scored."""

import csv

import numpy as np
import pytest
from evaluations import grey_pictures
from PIL import Image

from respodiff_jax import images as images_lib
from respodiff_jax.errors import UserError
from respodiff_jax.evaluation import picture_sets, run
from respodiff_jax.evaluation import pictures as pictures_lib
from respodiff_jax.evaluation.results import load_per_image, load_results
from respodiff_jax.evaluation.suites import Prompt
from respodiff_jax.generation.sampling import ImagePair, SamplerOptions

OPTIONS = SamplerOptions(num_steps=2, guidance_scale=3.0, batch_size=8)


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

    with pytest.raises(UserError, match="no such seed"):
        make(100)
    # No picture was made of that plan, so that it may be corrected.
    with pytest.raises(OSError, match="no space"):
        make(5)
    pictures = make(5)
    assert asked == [3, 3, 2]
    assert [np.asarray(Image.open(p.path))[0, 0, 0] for p in pictures] == [5, 6, 7]
    with pytest.raises(UserError, match="differs in requests"):
        make(6)


@pytest.mark.filterwarnings("ignore:the classifier was not checked:UserWarning")
def test_pictures_made_elsewhere_are_scored(suite, tmp_path):
    grey_pictures(tmp_path, {"cook/a.png": 24, "cook/b.png": 24, "artist/c.png": 24})
    plan = run.Plan(protocols=("fairness",))
    results = run.score_given(tmp_path, suite, plan, tmp_path / "out")
    (note,) = results.warnings
    assert "not checked" in note
    (cooks,) = results.find("deviation_ratio", "given", attribute="gender", subject="cook")
    assert cooks.n == sum(cooks.counts.values()) == 2
    assert results.value("winoalign", "given") is None  # no prompts are known
    with pytest.raises(UserError, match=r"3 pictures have no prompt.*metadata\.csv"):
        run.score_given(tmp_path, suite, run.Plan(protocols=("quality",)), tmp_path / "no")
    with pytest.raises(UserError, match="output folder gs://b/out is on Google"):
        run.score_given(tmp_path, suite, plan, "gs://b/out")

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
    grey_pictures(tmp_path / "made", {"cook/a.png": 24, "artist/c.png": 24})

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
    grey_pictures(tmp_path, {"cook/a.png": 24, "artiste/c.png": 24})
    plan = run.Plan(protocols=("fairness",))
    with (
        pytest.warns(UserWarning, match="1 of 2 subjects have no pictures.*: artist$"),
        pytest.warns(UserWarning, match="1 subjects are not the suite's.*: artiste$"),
    ):
        results = run.score_given(tmp_path, suite, plan, tmp_path / "out")
    assert len(results.warnings) == 3
    (tmp_path / "cook/a.png").rename(tmp_path / "a.png")
    (tmp_path / "artiste/c.png").unlink()
    with pytest.raises(UserError, match=r"no picture has a subject.*folder for each profession"):
        run.score_given(tmp_path, suite, plan, tmp_path / "none")


def test_bad_folders_of_pictures_are_named(tmp_path, monkeypatch):
    with pytest.raises(UserError, match="is not a folder"):
        pictures_lib.given_pictures(tmp_path / "none")
    with pytest.raises(UserError, match="has no pictures"):
        pictures_lib.given_pictures(tmp_path)
    grey_pictures(tmp_path, {"a.png": 24, "b.png": 24, "c.png": 32})
    with pytest.raises(UserError, match=r"most are 24x24, 1 are not: .*c\.png \(32x32\)"):
        pictures_lib.check_pictures(pictures_lib.given_pictures(tmp_path))
    with monkeypatch.context() as limited:
        limited.setattr(Image, "MAX_IMAGE_PIXELS", 100)
        with pytest.raises(UserError, match=r"3 unreadable pictures: .*decompression bomb"):
            pictures_lib.check_pictures(pictures_lib.given_pictures(tmp_path))
        with pytest.raises(UserError, match=r"not a readable picture.*decompression bomb"):
            pictures_lib.Pixels([tmp_path / "a.png"])[0]
    (tmp_path / "c.png").write_bytes(b"no picture")
    (tmp_path / "b.png").write_bytes((tmp_path / "b.png").read_bytes()[:-30])  # cut short
    with pytest.raises(UserError, match=r"2 unreadable pictures: .*b\.png.*c\.png"):
        pictures_lib.check_pictures(pictures_lib.given_pictures(tmp_path))
    (tmp_path / "metadata.csv").write_text("file,text\na.png,x\n")
    with pytest.raises(UserError, match=r"lacks the column\(s\) \['prompt'\]"):
        pictures_lib.given_pictures(tmp_path)
    (tmp_path / "metadata.csv").unlink()
    (tmp_path / "manifest.jsonl").write_text('{"file": "z.png", "prompt": "x"}\n')
    with pytest.raises(UserError, match=r"lacks 1 listed pictures: z\.png"):
        pictures_lib.given_pictures(tmp_path)
    concepts = '{"file": "a.png", "concepts": ["a woman"]}'
    for line in ('{"prompt": "x"}', '{"file": "a.pn', "[1]", '{"file": 3}', concepts):
        (tmp_path / "manifest.jsonl").write_text('{"file": "a.png", "prompt": "x"}\n\n' + line)
        with pytest.raises(UserError, match=r"manifest\.jsonl, line 3 is .*expected an object"):
            pictures_lib.given_pictures(tmp_path)


def test_a_table_tells_the_subjects_that_a_manifest_does_not_know(tmp_path):
    grey_pictures(tmp_path, {"a.png": 24})
    (tmp_path / "manifest.jsonl").write_text('{"file": "a.png", "prompt": "a cook"}\n')
    assert pictures_lib.given_pictures(tmp_path)[0].subject is None
    (tmp_path / "metadata.csv").write_text("file,prompt,subject\na.png,a cook,cook\n")
    assert pictures_lib.given_pictures(tmp_path)[0].subject == "cook"
