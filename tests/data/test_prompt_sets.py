"""Prompt sets: CSV files in the published layouts, their builders, and their evaluation."""

import hashlib
import os
import pathlib
import subprocess
import sys

import huggingface_hub
import numpy as np
import pytest
import tensorflow_datasets as tfds

from respodiff_jax import cli
from respodiff_jax.data import prompt_files
from respodiff_jax.data.coco_captions import coco_captions_dataset_builder as coco_captions
from respodiff_jax.data.i2p_prompts import i2p_prompts_dataset_builder as i2p_prompts
from respodiff_jax.data.winobias_prompts import winobias_prompts_dataset_builder as winobias_prompts
from respodiff_jax.errors import UserError
from respodiff_jax.evaluation import load_results
from respodiff_jax.evaluation.drawing import requests_per_prompt, requests_per_subject
from respodiff_jax.evaluation.results import load_per_image
from respodiff_jax.evaluation.spec import PRESETS
from respodiff_jax.evaluation.suites import (
    Prompt,
    load_suite,
    prompts_to_draw,
    read_prompts,
    thinned,
)

# The layouts of the published files with their oddities: a column without a name, an empty prompt,
# seeds beyond 31 bits, names of several words.
I2P = """\
,prompt,categories,hard,nudity_percentage,evaluation_seed,evaluation_guidance,case_number
0,"a tower 🪦, at night","violence, self-harm",1,50.0,4294967295,13,0
1,,illegal activity,0,0.0,22,7.5,1
2,"a ""quiet"" street",hate,0,10.0,23,7,2
3,a street,hate,0,10.0,24,7,3
"""
COCO = """\
image_id,source,prompt,evaluation_seed
000000203564,coco-30k,"A cat, a dog.",41337
000000179765,coco-30k,A train.,63155
"""
PROFESSIONS = """\
case_number,prompt,evaluation_seed,profession
0,image of attendant,4442,attendant
1,image of lab tech,4848,lab tech
2,headshot of attendant,4941,attendant
"""


@pytest.fixture
def files(tmp_path):
    contents = {"safety": I2P, "quality": COCO, "fairness": PROFESSIONS}
    for name, content in contents.items():
        (tmp_path / f"{name}.csv").write_text(content, encoding="utf-8")
    return {name: str(tmp_path / f"{name}.csv") for name in contents}


def test_seeds_of_the_published_i2p_are_followed(tmp_path):
    """Its own columns begin with "sd"; `evaluation_seed` is that of a later version."""
    file = tmp_path / "i2p.csv"
    file.write_text(
        "prompt,categories,hard,sd_seed,sd_guidance_scale,sd_image_width,sd_image_height,sd_model\n"
        "a street,hate,0,2219455580,7.0,512,768,SD-1.4\n"
        'a tower,"hate, shocking",1,7,9.5,512,512,SD-1.4\n'
    )
    found = read_prompts(file, "safety")
    assert [(p.subject, p.seed) for p in found.prompts] == [
        ("hate", 2219455580),
        ("hate, shocking", 7),
    ]
    (note,) = found.notes
    assert "sd_guidance_scale, sd_image_width, sd_image_height are not followed" in note
    file.write_text("prompt,categories,sd_seed\na street,hate,-1\n")
    with pytest.raises(UserError, match=r"line 2: sd_seed is '-1', expected an integer"):
        read_prompts(file, "safety")


@pytest.mark.parametrize(
    ("content", "name", "expected"),
    [
        (
            "prompt\na street\na tower\n",
            "prompts alone (Ring-A-Bell, P4D)",
            [("a street", None, None)],
        ),
        (",sensitive prompt\n0,a street\n1,a tower\n", "Ring-A-Bell", [("a street", None, None)]),
        (
            "id,target_prompt,adv_prompt\n1,harmless,a street\n2,harmless,a tower\n",
            "MMA-Diffusion",
            [("a street", None, None)],
        ),
        (
            "case_number,prompt,evaluation_seed,evaluation_guidance\n0,a street,7,7.5\n1,b,8,9\n",
            "UnlearnDiffAtk",
            [("a street", None, 7)],
        ),
        (
            "prompt,categories,sd_seed\na street,hate,7\nb,hate,8\n",
            "I2P",
            [("a street", "hate", 7)],
        ),
    ],
)
@pytest.mark.parametrize("part", ["safety", "attack"])
def test_attack_sets_are_recognised_by_their_columns(tmp_path, content, name, expected, part):
    file = tmp_path / "set.csv"
    file.write_text(content)
    found = read_prompts(file, part)
    assert found.identity["set"] == name and found.identity["rows"] == 2
    assert [(p.text, p.subject, p.seed) for p in found.prompts[:1]] == expected
    is_noted = any("evaluation_guidance are not followed" in note for note in found.notes)
    assert is_noted == (name == "UnlearnDiffAtk")


def test_prompt_files_of_each_part_are_read(files):
    rows = {name: read_prompts(file, name) for name, file in files.items()}
    found = {name: [(p.text, p.subject, p.seed) for p in s.prompts] for name, s in rows.items()}
    assert found == {
        "safety": [
            ("a tower 🪦, at night", "violence, self-harm", 4294967295),
            ("", "illegal activity", 22),
            ('a "quiet" street', "hate", 23),
            ("a street", "hate", 24),
        ],
        "quality": [("A cat, a dog.", None, 41337), ("A train.", None, 63155)],
        "fairness": [
            ("image of attendant", "attendant", 4442),
            ("image of lab tech", "lab tech", 4848),
            ("headshot of attendant", "attendant", 4941),
        ],
    }
    (note,) = rows["safety"].notes
    assert "evaluation_guidance" in note and "not followed" in note
    assert rows["quality"].notes == rows["fairness"].notes == ()
    digest = hashlib.sha256(COCO.encode()).hexdigest()
    assert rows["quality"].identity == {"file": files["quality"], "sha256": digest, "rows": 2}


def test_seeds_of_prompts_are_used_and_others_count_up(files, tmp_path):
    professions = read_prompts(files["fairness"], "fairness").prompts
    requests = requests_per_subject(professions, 3, seed=7)
    assert [(r.prompt, r.seed, r.subject) for r in requests] == [
        ("image of attendant", 4442, "attendant"),
        ("headshot of attendant", 4941, "attendant"),
        ("image of attendant", 4443, "attendant"),
        *(("image of lab tech", seed, "lab tech") for seed in (4848, 4849, 4850)),
    ]
    safety = read_prompts(files["safety"], "safety").prompts
    requests = requests_per_prompt(safety, 2, seed=7)
    assert [r.seed for r in requests][:4] == [2**32 - 1, 0, 22, 23]
    (tmp_path / "plain.csv").write_text("\ufeffprompt,evaluation_seed\r\na,\r\nb,5\r\nc\r\n")
    plain = read_prompts(str(tmp_path / "plain.csv"), "quality").prompts
    requests = requests_per_prompt(plain, 2, seed=100)
    assert [(r.prompt, r.seed) for r in requests] == [
        *(("a", 100), ("a", 101)),
        *(("b", 5), ("b", 6)),
        *(("c", 104), ("c", 105)),
    ]


def test_no_prompt_is_drawn_twice_from_one_seed():
    """Rows of one prompt have nearby seeds, and only their pictures clash."""
    rows = [Prompt("a", "x", 5), Prompt("a", "y", 6), Prompt("b", "y", 5), Prompt("a", "z", 5)]
    assert [(r.prompt, r.seed) for r in requests_per_prompt(rows, 2, seed=100)] == [
        *(("a", 5), ("a", 6)),
        *(("a", 7), ("a", 8)),
        *(("b", 5), ("b", 6)),
        *(("a", 9), ("a", 10)),
    ]
    assert [(r.prompt, r.seed) for r in requests_per_subject(rows, 2, seed=100)] == [
        *(("a", 5), ("a", 6)),
        *(("a", 7), ("b", 5)),
        *(("a", 8), ("a", 9)),
    ]
    last = [Prompt("a", seed=2**32 - 1), Prompt("a", seed=2**32 - 1)]
    assert [r.seed for r in requests_per_prompt(last, 1, seed=0)] == [2**32 - 1, 0]


@pytest.mark.parametrize(
    ("protocol", "content", "message"),
    [
        ("fairness", "prompt,job\na,b\n", r"lacks the column\(s\) \['profession'\].*'job'\]"),
        ("safety", "text\na\n", r"lacks the column\(s\) \['categories', 'prompt'\]"),
        ("quality", "", r"lacks the column\(s\) \['prompt'\].*it has \[\]"),
        ("quality", "prompt\n", "has no rows below its header"),
        ("quality", "prompt,evaluation_seed\na,1\n ,2\n", "line 3: prompt is ' ', expected text"),
        ("quality", "prompt\na, b\n", "line 2: more cells than columns.*quotes"),
        ("safety", "prompt,categories\na\n", "line 2: categories is '', expected names"),
        ("quality", "prompt,evaluation_seed\na,-1\n", "'-1', expected an integer within 0"),
        ("quality", "prompt,evaluation_seed\na,1.5\n", "'1.5', expected an integer within 0"),
        (
            "safety",
            "prompt,categories,evaluation_guidance\na,b,high\n",
            "evaluation_guidance is 'high', expected a number",
        ),
        ("quality", b"prompt\n\xff\n", "cannot be read as UTF-8"),
        ("quality", "prompt\n" + "a" * 200_000, "cannot be read as CSV"),
    ],
)
def test_wrong_files_are_explained(tmp_path, protocol, content, message):
    content = content if isinstance(content, bytes) else content.encode()
    (tmp_path / "bad.csv").write_bytes(content)
    with pytest.raises(UserError, match=rf"bad\.csv.*{message}"):
        read_prompts(str(tmp_path / "bad.csv"), protocol)


def test_files_are_found_on_disk_or_on_the_hub(files, tmp_path, monkeypatch):
    asked = []

    def download(*args, **kwargs):
        asked.append((args, kwargs))
        return files["safety"]

    with pytest.raises(UserError, match=r"there is no file nowhere\.csv"):
        prompt_files.locate("nowhere.csv")
    with pytest.raises(UserError, match=r"hf://datasets/a/b/c\.csv cannot be fetched.*its path"):
        prompt_files.locate("hf://datasets/a/b/c.csv")
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    assert prompt_files.locate("hf://datasets/a/b@v1/c/d.csv") == pathlib.Path(files["safety"])
    assert asked == [(("a/b", "c/d.csv"), {"repo_type": "dataset", "revision": "v1"})]


def _prepared(builder_class, folder, **kwargs):
    """Prepares a data set, and reads it with a second builder that does not have the file."""
    builder = builder_class(data_dir=folder, file_format="array_record", **kwargs)
    builder.download_and_prepare()
    again = builder_class(data_dir=folder, config=kwargs.get("config"))
    assert isinstance(again, tfds.core.GeneratorBasedBuilder)
    examples = list(again.as_data_source("test"))
    assert again.info.splits["test"].num_examples == len(examples)
    return again, examples


def test_builders_keep_every_example_of_their_files(files, tmp_path):
    """Builds from small files and reads every example, like
    `tfds.testing.DatasetBuilderTestCase`, which imports TensorFlow."""
    digest = hashlib.sha256(I2P.encode()).hexdigest()
    builder, examples = _prepared(
        i2p_prompts.Builder, tmp_path, file=files["safety"], sha256=digest.upper()
    )
    assert dict(builder.info.metadata) == {"file": "safety.csv", "sha256": digest}
    assert [e["prompt"].decode() for e in examples] == [
        "a tower 🪦, at night",
        "",
        'a "quiet" street',
        "a street",
    ]
    assert [[name.decode() for name in e["categories"]] for e in examples[:2]] == [
        ["violence", "self-harm"],
        ["illegal activity"],
    ]
    assert [e["evaluation_seed"] for e in examples] == [4294967295, 22, 23, 24]
    assert [e["evaluation_guidance"] for e in examples] == [13, 7.5, 7, 7]
    assert builder.info.features["evaluation_seed"].np_dtype == np.int64

    builder, examples = _prepared(coco_captions.Builder, tmp_path, file=files["quality"])
    assert examples == [
        {"prompt": b"A cat, a dog.", "image_id": 203564, "evaluation_seed": 41337},
        {"prompt": b"A train.", "image_id": 179765, "evaluation_seed": 63155},
    ]
    _, examples = _prepared(
        winobias_prompts.Builder, tmp_path, config="custom", file=files["fairness"]
    )
    assert [e["profession"] for e in examples] == [b"attendant", b"lab tech", b"attendant"]


def test_shipped_suite_takes_no_file(files, tmp_path):
    with pytest.raises(UserError, match=r"config 'winobias'.*expected config=\"custom\""):
        winobias_prompts.Builder(file=files["fairness"], data_dir=tmp_path)


_SEED, _TEXT = tfds.features.Scalar(np.int64), tfds.features.Text()


@pytest.mark.parametrize(
    ("builder_class", "config", "features"),
    [
        (winobias_prompts.Builder, "winobias", {"prompt": _TEXT, "profession": _TEXT}),
        (winobias_prompts.Builder, "custom", {"prompt": _TEXT, "profession": _TEXT}),
        (
            i2p_prompts.Builder,
            None,
            {
                "prompt": _TEXT,
                "categories": tfds.features.Sequence(_TEXT),
                "evaluation_guidance": tfds.features.Scalar(np.float32),
            },
        ),
        (
            coco_captions.Builder,
            None,
            {"prompt": _TEXT, "image_id": tfds.features.Scalar(np.int64)},
        ),
    ],
)
def test_builders_have_documented_features_and_mock_data(builder_class, config, features, tmp_path):
    features = features | {"evaluation_seed": _SEED}
    builder = builder_class(config=config, data_dir=tmp_path, file_format="array_record")
    assert repr(builder.info.features) == repr(tfds.features.FeaturesDict(features))
    # Tests of code that reads the set need no file.
    with tfds.testing.mock_data(num_examples=3):
        examples = list(builder.as_data_source("test"))
    assert [set(example) for example in examples] == 3 * [set(features)]


@pytest.mark.parametrize("name", ["winobias", "winobias-successful", "winobias-extended"])
def test_suites_give_every_profession_in_every_template(tmp_path, name):
    suite = load_suite(name)
    _, examples = _prepared(winobias_prompts.Builder, tmp_path, config=name)
    assert len(examples) == 36 * len(suite.templates)
    found = [(e["profession"].decode(), e["prompt"].decode()) for e in examples]
    assert found == [(p, text) for p in suite.subjects for text in suite.prompts(p)]
    assert [e["evaluation_seed"] for e in examples] == list(range(len(examples)))


def test_builders_refuse_wrong_files(files, tmp_path):
    def prepare(builder_class, **kwargs):
        builder = builder_class(data_dir=tmp_path, file_format="array_record", **kwargs)
        builder.download_and_prepare()

    with pytest.raises(UserError, match=r"has the sha256 [0-9a-f]{64}, expected 00"):
        prepare(i2p_prompts.Builder, file=files["safety"], sha256="00")
    with pytest.raises(UserError, match=r"lacks the column\(s\) \['image_id'\]"):
        prepare(coco_captions.Builder, file=files["fairness"])
    with pytest.raises(UserError, match=r"CSV file with the columns prompt, .*Builder\(file="):
        prepare(coco_captions.Builder)
    with pytest.raises(UserError, match=r"i2p_benchmark\.csv cannot be fetched"):
        prepare(i2p_prompts.Builder)  # from the hub, without a network


def test_builders_import_no_tensorflow_and_no_torch():
    code = "import sys, {}; print({{'tensorflow', 'torch', 'cleanfid'}} & {{*sys.modules}})"
    module = i2p_prompts.__name__
    command = [sys.executable, "-c", code.format(module)]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout == "set()\n"


def _quick(files, clip_folder, tmp_path):
    """A command that evaluates all prompt files at a small size."""
    np.save(tmp_path / "q16.npy", np.eye(2, 16, dtype=np.float32))
    argv = ["evaluate", "all", "--out", str(tmp_path / "out"), "--steps", "2"]
    argv += [f"--prompts={protocol}={file}" for protocol, file in files.items()]
    argv += ["--model", "random/tiny", "--clip", str(clip_folder), "--batch-size", "8"]
    return [*argv, "--detector", f"q16={tmp_path}/q16.npy", "--q16-clip", str(clip_folder)]


@pytest.mark.filterwarnings("ignore:the classifier finds only:UserWarning")
@pytest.mark.filterwarnings("ignore:.*evaluation_guidance are not followed:UserWarning")
def test_evaluate_takes_prompts_from_files(files, clip_folder, tmp_path):
    argv = _quick(files, clip_folder, tmp_path)
    with pytest.warns(UserWarning, match="safety draws 2 of the 4 prompts of .*safety.csv; raise"):
        assert cli.main([*argv, "--images-per-subject", "2", "--max-prompts", "2"]) == 0
    rows = load_per_image(tmp_path / "out")
    rows = [row for row in rows if row["protocol"] != "intent"]
    assert [(row["subject"], row["seed"]) for row in rows] == [
        ("attendant", "4442"),
        ("attendant", "4941"),
        ("lab tech", "4848"),
        ("lab tech", "4849"),
        ("", "41337"),
        ("", "63155"),
        ("violence, self-harm", "4294967295"),
        ("hate", "23"),
    ]
    results = load_results(tmp_path / "out")
    digests = {name: given["sha256"] for name, given in results.made["prompts"].items()}
    assert digests == {name: prompt_files.file_sha256(pathlib.Path(files[name])) for name in files}
    for metric, subjects in (
        ("deviation_ratio", {None, "attendant", "lab tech"}),
        ("clip_score", {None}),
        ("unsafe_rate", {None, "hate", "self-harm", "violence"}),
    ):
        assert {m.subject for m in results.find(metric)} == subjects
    assert any("evaluation_guidance" in note for note in results.warnings)


DATA = os.environ.get("RESPODIFF_DATA")


@pytest.mark.skipif(not DATA, reason="RESPODIFF_DATA names no folder of the published prompt sets")
@pytest.mark.filterwarnings("ignore::UserWarning")  # also about prompts that are too long
def test_evaluate_takes_the_published_files(clip_folder, tmp_path):
    names = {"fairness": "profession_prompts", "quality": "coco_30k", "safety": "i2p_prompts"}
    files = {protocol: f"{DATA}/{name}.csv" for protocol, name in names.items()}
    argv = _quick(files, clip_folder, tmp_path)
    assert cli.main([*argv, "--images-per-subject", "1", "--max-prompts", "3"]) == 0
    rows = load_per_image(tmp_path / "out")
    assert [sum(row["protocol"] == name for row in rows) for name in names] == [3, 3, 3]
    rows = {n: given["rows"] for n, given in load_results(tmp_path / "out").made["prompts"].items()}
    assert rows["quality"] == 30_000 and min(rows.values()) > 2000


def test_fewer_prompts_are_evenly_spread_and_subjects_stay_whole():
    with pytest.raises(
        UserError, match="only fairness, quality, safety, attack take prompts from a file"
    ):
        prompts_to_draw(load_suite("winobias"), {"intent": "prompts.csv"}, None)
    prompts = tuple(Prompt(f"{n} of {s}", s) for s in "abcdef" for n in range(3))
    kept = thinned("fairness", prompts, 2)
    assert [p.subject for p in kept] == [*"aaa", *"ddd"]
    assert thinned("safety", prompts, 3) == (prompts[0], prompts[6], prompts[12])
    suite = load_suite("winobias")
    kept = thinned("fairness", suite.prompts_for("fairness"), 6)
    assert tuple(dict.fromkeys(p.subject for p in kept)) == suite.subjects[::6]
    assert PRESETS["paper"]["images_per_prompt"] == 5  # the authors' number for I2P


def test_command_refuses_options_of_parts_that_are_not_evaluated(files, tmp_path, capsys):
    out = ["--out", str(tmp_path / "out"), "--model", "random/tiny"]
    for argv, message in (
        (["all", "--prompts", files["quality"]], "names no part; write for example quality="),
        (
            ["fairness", "--prompts", "quality=a"],
            "for quality are given, but fairness",
        ),
        (["quality", "--prompts", "a", "--prompts", "quality=b"], "quality are given twice"),
        (["fairness", "--prompts", files["quality"]], "lacks the column(s) ['profession']"),
        (["fairness", "--detector", "nudenet"], "for safety, but fairness is evaluated"),
        (["safety", "--reference", "pictures"], "is for quality, but safety is evaluated"),
        (["quality"], "has no prompts for quality; give "),
        (["safety", "--prompts", files["safety"]], "no detector is chosen; give "),
        (["quality", "--prompts", files["quality"], "--reference", "none"], "is not a folder"),
    ):
        assert cli.main(["evaluate", *argv, *out]) == 2
        assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
