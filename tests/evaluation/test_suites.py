"""Evaluation suites: those of the package, and files with mistakes."""

import dataclasses
import json

import pytest

from respodiff_jax.errors import UserError
from respodiff_jax.evaluation.spec import lacking
from respodiff_jax.evaluation.suites import Prompt, PromptSet, load_suite, prompts_to_draw


def test_parts_that_a_suite_cannot_serve_are_named(suite):
    assert list(lacking(suite, prompts_to_draw(suite, {}, None))) == ["intent"]
    named = dataclasses.replace(suite, named={"gender": {"man": "a photo of a man {subject}"}})
    assert lacking(named, prompts_to_draw(named, {}, None)) == {}
    winobias = load_suite("winobias")
    prompts = prompts_to_draw(winobias, {}, None)
    lacks = lacking(winobias, prompts)
    assert list(lacks) == ["quality", "safety"]
    assert "no prompts for quality" in lacks["quality"] and "no detector" in lacks["safety"]
    prompts |= {"quality": PromptSet((Prompt("a cat"),))}
    (lack,) = lacking(winobias, prompts, has_detectors=True).values()
    assert "no prompts for safety" in lack


def test_shipped_suites_open_and_mistakes_are_explained(tmp_path):
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
        ({"colour": 1}, r"unknown fields .'colour'."),
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
        with pytest.raises(UserError, match=message):
            load_suite(str(path))
    with pytest.raises(UserError, match="neither a readable JSON file nor one of"):
        load_suite(str(tmp_path / "none.json"))
    path.write_text("[]")
    with pytest.raises(UserError, match=r"suite\.json is not a JSON object of fields"):
        load_suite(str(path))
    path.write_text(json.dumps(content))
    (tmp_path / "clip").mkdir()
    assert load_suite(str(path)).clip == str(tmp_path / "clip")
