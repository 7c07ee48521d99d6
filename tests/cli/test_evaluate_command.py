"""`respodiff evaluate`: mistakes are reported early, incomplete parts are left out."""

import dataclasses

import pytest
from evaluations import constant_adapter, grey_pictures

from respodiff_jax import cli
from respodiff_jax.backbone import Backbone
from respodiff_jax.cli import inputs
from respodiff_jax.evaluation import load_results


def test_evaluate_refuses_conflicting_options(capsys, tmp_path):
    out = ["--out", str(tmp_path)]
    for argv, message in (
        (["all", *out], "nothing to evaluate"),
        (["all", *out, "--images", "a", "--model", "b", "--dtype", "float32"], "--model, --dtype"),
        (["all", *out, "--images", "a", "--safe"], "scores existing pictures; drop "),
        (["all", *out, "--images", "a", "--max-prompts", "9"], "scores existing pictures; drop "),
        (["fairness", *out, "--images", str(tmp_path), "--target", "gender"], "GROUP:VALUE=SHARE"),
    ):
        assert cli.main(["evaluate", *argv]) == 2
        assert message in capsys.readouterr().err


def test_evaluate_reports_mistakes_before_loading_anything(
    tiny_backbone, monkeypatch, capsys, tmp_path
):
    whole = constant_adapter(tiny_backbone, 1.0)
    few = {"ram": {"constant": whole.ram["constant"][1:4]}}
    few |= {"sam": {"constant": whole.sam["constant"][1:4]}}
    one_man = dataclasses.replace(whole, concepts=whole.concepts[1:4], **few)

    def never(*args, **kwargs):
        raise AssertionError("something was loaded")

    monkeypatch.setattr("respodiff_jax.evaluation.judges.load_clip", never)
    monkeypatch.setattr(Backbone, "loaded", never)
    monkeypatch.setattr("respodiff_jax.training.trained.load_adapter", lambda path: one_man)
    monkeypatch.setattr(inputs, "open_model", never)
    monkeypatch.setattr(inputs, "check_sources", lambda sources: None)
    for argv, message in (
        (["--group", "gender"], "1 concept(s) of the group 'gender', expected two or more"),
        (["--safe"], "the adapter has no safety concepts"),
        (["--group", "age", "--batch-size", "3"], "is 3, expected a multiple"),
        (["--group", "age", "--batch-size", "0"], "is 0, expected a multiple"),
        (["--group", "age", "--steps", "0"], "is 0, expected at least 1"),
        (["--group", "age", "--resolution", "0"], "is 0, expected a positive"),
        (["--group", "age", "--images-per-subject", "0"], "is 0, expected at least 1"),
        (["--group", "age", "--images-per-prompt", "0"], "is 0, expected at least 1"),
        (["--group", "age", "--images-per-caption", "0"], "is 0, expected at least 1"),
        (["--group", "age", "--max-prompts", "0"], "is 0, expected at least 1"),
        (["--group", "age", "--seed", "4294000000"], "is 4294000000, expected within 0"),
        (["--group", "gender", "--target", "gender:woman=0.5,man=0.4"], "sum to 1, none below 0"),
        (["--group", "gender", "--target", "gender:woman=1"], "its values are"),
        (["--group", "age"], "has no attribute 'age'"),
        (["--group", "gendr"], "no group 'gendr'; did you mean 'gender'? It has gender, age"),
    ):
        argv = ["evaluate", "fairness", "--adapter", "a", "--out", str(tmp_path / "out"), *argv]
        assert cli.main(argv) == 2, argv
        assert message in capsys.readouterr().err, argv
    assert not (tmp_path / "out").exists()


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_all_leaves_out_parts_that_lack_prompts_or_detectors(clip_folder, capsys, tmp_path):
    grey_pictures(tmp_path / "made", {"cook/a.png": 24, "cook/b.png": 24})
    argv = ["evaluate", "all", "--images", str(tmp_path / "made"), "--clip", str(clip_folder)]
    assert cli.main([*argv, "--out", str(tmp_path / "out")]) == 0
    assert "report.html" in capsys.readouterr().out
    results = load_results(tmp_path / "out")
    assert {m.part for m in results.measurements} == {"fairness"}
    quality_note, safety_note, intent_note, subjects, unchecked = results.warnings
    assert intent_note.startswith("intent is left out: intent compares pictures that are drawn")
    assert quality_note.startswith("quality is left out: 2 pictures have no prompt")
    assert safety_note.startswith("safety is left out: ") and "no detector" in safety_note
    assert subjects.startswith("35 of 36 subjects have no pictures") and "..." in subjects
    assert "not checked" in unchecked
    (tmp_path / "made/cook/b.png").rename(tmp_path / "made/b.png")
    (tmp_path / "made/cook/a.png").rename(tmp_path / "made/a.png")
    assert cli.main([*argv, "--out", str(tmp_path / "none")]) == 2
    assert "nothing can be evaluated: no picture has a subject" in capsys.readouterr().err
