"""Concepts files: JSON lines, CSV, data sets, and messages about mistakes."""

import pathlib

import pytest
import tensorflow_datasets as tfds

from respodiff_jax import cli
from respodiff_jax.data.concept_files import read_concepts
from respodiff_jax.data.concept_prompts import concept_prompts_dataset_builder
from respodiff_jax.data.winobias_prompts import winobias_prompts_dataset_builder
from respodiff_jax.errors import UserError
from respodiff_jax.method.concepts import Concept
from respodiff_jax.training.config import concepts_from, load_config

CONFIGS = pathlib.Path(__file__).parents[2] / "configs"
SMOKE = str(CONFIGS / "smoke.py")
EMOJI_CONCEPTS = str(CONFIGS / "emoji_concepts.jsonl")

CSV = """\
name,group,kind,neutral_prompts,target_prompt,unsafe_prompt,lr_ram
a woman,gender,fairness,a person,a woman,,0.03
anti-violence,safety,safety,a scene|a street,,violence,
a man,gender,,a person,a man,,
"""
JSON_LINES = """\
{"name": "a woman", "group": "gender", "kind": "fairness", "neutral_prompts": "a person", \
"target_prompt": "a woman", "lr_ram": 0.03}

{"name": "anti-violence", "group": "safety", "kind": "safety", "unsafe_prompt": "violence", \
"neutral_prompts": ["a scene", "a street"]}
{"name": "a man", "group": "gender", "neutral_prompts": ["a person"], "target_prompt": "a man"}
"""
CONCEPTS = (
    Concept("a woman", "gender", ("a person",), target_prompt="a woman", lr_ram=0.03, lr_sam=0.5),
    Concept("anti-violence", "safety", ("a scene", "a street"), None, "violence", lr_sam=0.5),
    Concept("a man", "gender", ("a person",), target_prompt="a man", lr_sam=0.5),
)


def test_json_lines_csv_and_data_sets_give_the_same_concepts(tmp_path):
    (tmp_path / "c.csv").write_text(CSV)
    (tmp_path / "c.jsonl").write_text(JSON_LINES)
    defaults = {"lr_sam": 0.5}
    assert read_concepts(tmp_path / "c.csv", defaults) == CONCEPTS
    assert read_concepts(tmp_path / "c.jsonl", defaults) == CONCEPTS
    for name in ("c.csv", "c.jsonl"):
        builder = concept_prompts_dataset_builder.Builder(
            file=tmp_path / name, data_dir=tmp_path / "data" / name, file_format="array_record"
        )
        builder.download_and_prepare()
        assert builder.info.metadata["file"] == name
        assert builder.info.splits["train"].num_examples == 3
        assert read_concepts(builder.data_path, defaults) == CONCEPTS


def test_other_data_sets_are_refused_by_name(tmp_path):
    builder = winobias_prompts_dataset_builder.Builder(
        config="winobias", data_dir=tmp_path, file_format="array_record"
    )
    builder.download_and_prepare()
    with pytest.raises(UserError, match="not a prepared data set concept_prompts: it is winobias"):
        read_concepts(builder.data_path)


def test_json_texts_may_hold_unicode_line_ends(tmp_path):
    """`str.splitlines` also splits at U+2028, which JSON texts may hold."""
    (tmp_path / "c.jsonl").write_text(JSON_LINES.replace("a scene", "a\u2028scene"), "utf-8")
    assert read_concepts(tmp_path / "c.jsonl")[1].neutral_prompts[0] == "a\u2028scene"


def test_shipped_file_has_sixty_four_concepts_of_both_kinds():
    concepts = read_concepts(EMOJI_CONCEPTS)
    assert len(concepts) == 64
    assert {concept.is_safety for concept in concepts} == {False, True}


def test_concepts_file_replaces_concepts_and_uses_defaults_of_the_config(tmp_path):
    (tmp_path / "c.jsonl").write_text(JSON_LINES)
    numbers = {"guidance_scale": 2.0, "lambda_sem": 3.0, "lr_ram": 0.25, "lr_sam": 0.5}
    overrides = [f"--config.concept_defaults.{name}={value}" for name, value in numbers.items()]
    config = load_config(SMOKE, overrides, str(tmp_path / "c.jsonl"))
    woman, safety, man = concepts_from(config)
    assert (woman.name, safety.name, man.name) == ("a woman", "anti-violence", "a man")
    for concept in (woman, safety, man):
        found = {name: getattr(concept, name) for name in numbers}
        assert found == numbers | ({"lr_ram": 0.03} if concept is woman else {})


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("c.jsonl", "\n{", "line 2 is not JSON: column 2: "),
        (
            "c.jsonl",
            "{}",
            r"line 1: .* missing fields \['name', 'group', 'neutral_prompts'\]",
        ),
        ("c.jsonl", "[]", r"line 1: \[\], expected an object"),
        ("c.jsonl", '{"nam": 1}', r"line 1: .* unknown fields \['nam'\], expected name, group"),
        ("c.jsonl", "\n", "has no concepts"),
        ("c.jsonl", b"\xff", "cannot be read as UTF-8"),
        ("c.jsonl", JSON_LINES.replace("0.03", '"x"'), "line 1: .* lr_ram is 'x', expected zero"),
        ("c.jsonl", JSON_LINES.replace("0.03", "-1"), "'a woman': lr_ram is -1, expected zero"),
        (
            "c.jsonl",
            JSON_LINES.replace('"violence"', "7"),
            "unsafe_prompt is 7, expected a non-empty",
        ),
        ("c.jsonl", JSON_LINES.replace('"a person"', "1", 1), "neutral_prompts is 1, expected a"),
        (
            "c.jsonl",
            JSON_LINES.replace('"fairness"', "[]"),
            r"line 1: .* kind is \[\] with target_p",
        ),
        ("c.jsonl", JSON_LINES.replace("a man", "a woman"), "'a woman' are duplicates"),
        ("c.jsonl", JSON_LINES.replace("fairness", "safety"), "is 'safety' with target_prompt"),
        ("c.csv", CSV.replace("lr_ram", "lr"), r"unknown columns \['lr'\]"),
        ("c.csv", CSV.replace("0.03", "high"), "line 2: lr_ram is 'high', expected a number"),
        ("c.csv", CSV.replace("group", "attribute"), r"lacks the column\(s\) \['group'\]"),
        ("c.txt", CSV, r"files end in \.jsonl or \.csv"),
        ("folder/c.csv", CSV, "a folder, but not a prepared data set"),
    ],
)
def test_wrong_concepts_files_are_explained(tmp_path, name, content, message):
    file = tmp_path / name
    file.parent.mkdir(exist_ok=True)
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    source = file.parent if name.startswith("folder") else file
    with pytest.raises(UserError, match=message) as error:
        read_concepts(source)
    assert str(source) in str(error.value)


def test_train_names_a_missing_concepts_file(tmp_path, capsys):
    command = ("train", "--config", SMOKE, "--concepts", str(tmp_path / "none.csv"))
    assert cli.main([*command, "--workdir", str(tmp_path / "run")]) == 2
    assert "there is no concepts file" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_builder_needs_a_file_and_checks_it(tmp_path):
    options = {"data_dir": tmp_path / "data", "file_format": "array_record"}
    with pytest.raises(UserError, match=r"made from a concepts file.*Builder\(file="):
        concept_prompts_dataset_builder.Builder(**options).download_and_prepare()
    (tmp_path / "c.csv").write_text(CSV.replace("a man", "a woman"))
    builder = concept_prompts_dataset_builder.Builder(file=tmp_path / "c.csv", **options)
    assert isinstance(builder, tfds.core.GeneratorBasedBuilder)
    with pytest.raises(UserError, match="duplicates"):
        builder.download_and_prepare()
