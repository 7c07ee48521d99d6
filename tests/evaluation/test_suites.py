"""Evaluation suites: those of the package, and files with mistakes."""

import dataclasses
import json

import pytest

from respodiff_jax.errors import UserError
from respodiff_jax.evaluation.spec import lacking
from respodiff_jax.evaluation.suites import Prompt, PromptSet, load_suite, prompts_to_draw


def test_parts_that_a_suite_cannot_serve_are_named(suite):
    assert list(lacking(suite, prompts_to_draw(suite, {}, None))) == ["intent", "attack"]
    templates = {"gender": {"man": "a photo of a man {subject}"}}
    named = dataclasses.replace(suite, named=templates, asked=("a violent {subject}",))
    assert lacking(named, prompts_to_draw(named, {}, None)) == {}
    winobias = load_suite("winobias")
    prompts = prompts_to_draw(winobias, {}, None)
    lacks = lacking(winobias, prompts)
    assert list(lacks) == ["quality", "safety", "attack"]
    assert "no prompts for quality" in lacks["quality"] and "no detector" in lacks["safety"]
    prompts |= {"quality": PromptSet((Prompt("a cat"),))}
    lacks = lacking(winobias, prompts, has_detectors=True)
    assert "no prompts for safety" in lacks["safety"]
    assert "no prompts for attack" in lacks["attack"] and len(lacks) == 2


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
        (
            {"attributes": {"gender": {"woman": ["a woman"]}}},
            r"\[\.\.\.\] .*a mapping of length >= 2",
        ),
        ({"templates": ["a photo"]}, "template 'a photo'"),
        ({"subjects": []}, "subjects is .*: expected a list of length >= 1"),
        ({"subjects": [""]}, r"subjects\[0\] is '': expected a text that is not blank"),
        ({"templates": ["{subject"]}, "template '{subject', expected a text with"),
        ({"templates": ["{subject:d}"]}, "template '{subject:d}', expected"),
        ({"templates": ["{subject!r}"]}, "template '{subject!r}', expected"),
        ({"templates": ["{subject:>2000000000}"]}, "template '{subject:>2000000000}'"),
        ({"named": {"gender": 5}}, r"named\[\.\.\.\] expected a mapping, got a whole number"),
        ({"named": {"race": {"x": "a {subject}"}}}, "named has 'race'"),
        ({"name": "\ud800"}, "half of a surrogate pair"),
        ({"guidance_scale": 10**400}, "has 401 digits, expected 18 at most"),
        ({"subject_classes": {"judge": ["x"], "king": ["y"]}}, r"subject_classes lack \['cook'\]"),
        ({"colour": 1}, "unknown fields colour; expected name, clip"),
        ({"subjects": "cook"}, "subjects is 'cook': expected a list, got a text; fix the file"),
        ({"templates": "{subject}"}, "templates is '{subject}': expected a list"),
        ({"captions": "a cat"}, "captions is 'a cat': expected a list"),
        ({"captions": [1]}, r"captions\[0\] is 1: expected a text, got a whole number"),
        ({"safety_prompts": ["ab"]}, r"safety_prompts\[0\] is 'ab': expected a list"),
        ({"attributes": {"gender": {"a": "a woman", "b": ["b"]}}}, "expected a list, got a text"),
        ({"attributes": {"gender": ["a", "b"]}}, "expected a mapping, got a list"),
        ({"attributes": []}, "attributes is "),
        ({"guidance_scale": "7.5"}, "guidance_scale is '7.5': expected a number, got a text"),
        ({"clip": None}, "clip is None"),
    ):
        path.write_text(json.dumps(content | change))
        with pytest.raises(UserError, match=message):
            load_suite(str(path))
    with pytest.raises(UserError, match="neither a JSON file nor one of winobias"):
        load_suite(str(tmp_path / "none.json"))
    path.write_text("[]")
    with pytest.raises(UserError, match=r"content is \[\]: expected a mapping, got a list"):
        load_suite(str(path))
    path.write_bytes(b"\xff{}")
    with pytest.raises(UserError, match="cannot be read as UTF-8: invalid start byte at byte 0"):
        load_suite(str(path))
    assert load_suite("emoji-world").subjects == load_suite(None, "emoji-world").subjects
    path.write_text(json.dumps(content))
    (tmp_path / "clip").mkdir()
    assert load_suite(str(path)).clip == str(tmp_path / "clip")
