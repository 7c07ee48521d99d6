"""`respodiff evaluate`: mistakes that it knows of, and what it leaves out."""

import dataclasses

import pytest
from evaluations import constant_adapter, grey_pictures

from respodiff_jax import cli
from respodiff_jax.cli import inputs
from respodiff_jax.evaluation.results import load_results


def test_command_refuses_what_makes_no_sense(capsys, tmp_path):
    out = ["--out", str(tmp_path)]
    for argv, message in (
        (["all", *out], "nothing to evaluate"),
        (["all", *out, "--images", "a", "--model", "b", "--safe"], "drop --model, --safe"),
        (["all", *out, "--images", "a", "--max-prompts", "9"], "drop --max-prompts"),
        (["fairness", *out, "--images", str(tmp_path), "--target", "gender"], "GROUP:VALUE=SHARE"),
    ):
        assert cli.main(["evaluate", *argv]) == 2
        assert message in capsys.readouterr().err


def test_mistakes_are_known_before_anything_is_loaded(tiny_backbone, monkeypatch, capsys, tmp_path):
    whole = constant_adapter(tiny_backbone, 1.0)
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
    grey_pictures(tmp_path / "made", {"cook/a.png": 24, "cook/b.png": 24})
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
