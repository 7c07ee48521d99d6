"""Damaged and hostile files: each is read, or refused with a short message; nothing else happens.

By default some hundred files of each kind; `pytest -m slow tests/test_fuzz.py` reads 10,000
(1,000 models).
"""

import copy
import json
import pathlib
import shutil
import warnings

import numpy as np
import pytest
from evaluations import evaluation_folder
from test_adapters import make_adapter

from respodiff_jax.adapters import load_adapter, save_adapter
from respodiff_jax.backbone import load_backbone
from respodiff_jax.cli import inputs
from respodiff_jax.data.concept_files import read_concepts
from respodiff_jax.errors import UserError
from respodiff_jax.evaluation import compare
from respodiff_jax.evaluation.report import write_report
from respodiff_jax.evaluation.results import load_results
from respodiff_jax.evaluation.suites import load_suite, prompts_to_draw, read_prompts
from respodiff_jax.method.concepts import HYPER_PARAMETERS
from respodiff_jax.training.outcomes import has_waves, read_outcomes, read_waves
from respodiff_jax.training.record import RunRecord, is_workdir

DATA = pathlib.Path(__file__).parent / "data"
ROOT = DATA.parents[1]
CASES = [pytest.param(100, id="some"), pytest.param(10_000, id="many", marks=pytest.mark.slow)]

VALUES = (
    *(None, True, False, 0, 1, -1, 3.5, 2**31, -(2**63), 10**400, 1e308, float("nan")),
    *("", " ", "a", "a woman", "x" * 100_000, "\ud800", "\0", "{subject", "{subject:>2000000000}"),
    *("../../etc/passwd", "/dev/zero", "-1", "1e999", [], {}, [[]], [1], [None], {"": {}}),
)
INSERTED = (b"\xff", b"\0", b'"', b"\n", b",", b"9" * 5000, b"\xef\xbb")


def places(value, found=None):
    """All (container, key) of a JSON value."""
    found = [] if found is None else found
    if isinstance(value, dict | list):
        for key in value if isinstance(value, dict) else range(len(value)):
            found.append((value, key))
            places(value[key], found)
    return found


def changed_json(value, rng):
    """The text of a value of which a few parts are replaced, removed, added or nested deeply."""
    value = copy.deepcopy(value)
    for _ in range(rng.integers(1, 4)):
        known = places(value)
        if not known:
            break
        container, key = known[rng.integers(len(known))]
        other, other_key = known[rng.integers(len(known))]
        kind = rng.integers(6)
        if kind == 0:
            del container[key]
        elif kind == 1 and isinstance(container, dict):
            container[str(rng.choice(["colour", "", "images", "__class__"]))] = 1
        elif kind == 2:
            container[key] = copy.deepcopy(other[other_key])
        else:
            container[key] = copy.deepcopy(VALUES[rng.integers(len(VALUES))])
    text = json.dumps(value)
    if rng.integers(50) == 0:
        text = text.replace(":", ":" + "[" * 100_000, 1)
    return text


def changed_bytes(content, rng):
    """Content of which bytes are flipped, cut off, repeated or inserted."""
    content = bytearray(content)
    for _ in range(rng.integers(1, 4)):
        at = int(rng.integers(len(content) + 1))
        kind = rng.integers(4)
        if kind == 0 and at < len(content):
            content[at] ^= 1 << rng.integers(8)
        elif kind == 1:
            del content[at:]
        elif kind == 2:
            content[at:at] = content[at : at + 30]
        else:
            content[at:at] = INSERTED[rng.integers(len(INSERTED))]
    return bytes(content)


def changed(path, rng):
    """Replaces a file by a changed one: half of the JSON files stay JSON."""
    content = path.read_bytes()
    lines = path.suffix == ".jsonl"
    if path.suffix in (".json", ".jsonl") and rng.integers(2):
        texts = content.decode().splitlines() if lines else [content.decode()]
        at = rng.integers(len(texts))
        texts[at] = changed_json(json.loads(texts[at]), rng)
        path.write_text("\n".join(texts) + "\n" * lines)
    else:
        path.write_bytes(changed_bytes(content, rng))


def fuzz(files, read, count, folder):
    """Changes one of the files `count` times; returns how often the change was refused."""
    refused = 0
    for seed in range(count):
        rng = np.random.default_rng(seed)
        file = files[seed % len(files)]
        kept = file.read_bytes()
        changed(file, rng)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                read()
        except UserError as error:
            refused += 1
            message = str(error).replace(str(folder), "")
            assert len(message) <= 400, f"seed {seed}: {message}"
            assert "Traceback" not in message and "\0" not in message
        except Exception as error:
            raise AssertionError(f"seed {seed}, {file.name}: {kept[:0]!r}{error!r}") from error
        finally:
            file.write_bytes(kept)
    read()  # unchanged
    return refused


@pytest.mark.parametrize("count", CASES)
def test_adapters(tmp_path, count):
    save_adapter(make_adapter("mlp"), tmp_path)
    files = [tmp_path / "adapter_config.json", tmp_path / "adapter_model.safetensors"]

    def read():
        save_adapter(load_adapter(tmp_path), tmp_path / "again")

    assert fuzz(files, read, count, tmp_path) > count / 4


@pytest.mark.parametrize("count", CASES)
def test_run_directories(tmp_path, count):
    shutil.copy(DATA / "run_0_1_0" / "run.json", tmp_path)
    outcome = {"name": "a", "group": "g", "steps": 4, "diverged_at": None, "adapter": "adapter"}
    (tmp_path / "outcomes.jsonl").write_text(f"{json.dumps(outcome)}\n" * 3)
    (tmp_path / "waves.json").write_text(json.dumps({"size": 2, "concepts": 3}))

    def read():
        assert is_workdir(tmp_path) and not has_waves(tmp_path)
        record = RunRecord.read(tmp_path)
        assert record.summary(3)["steps"] == 3 and record.adapter_concepts and record.adapter_module
        waves = read_waves(tmp_path)
        assert waves["size"] > 0 and waves["concepts"] > 0
        assert all(o["steps"] >= 0 for o in read_outcomes(tmp_path))

    files = [tmp_path / name for name in ("run.json", "outcomes.jsonl", "waves.json")]
    assert fuzz(files, read, count, tmp_path) > count / 4


@pytest.mark.parametrize("count", CASES)
def test_results(tmp_path, count):
    evaluation_folder(tmp_path / "a", professions=("doctor",), pictures=2, drawn=1)
    shutil.copytree(tmp_path / "a", tmp_path / "b")

    def read():
        load_results(tmp_path / "a")
        write_report(tmp_path / "a")
        compare([tmp_path / "a", tmp_path / "b"], tmp_path / "page.html")

    files = [tmp_path / "a" / name for name in ("results.json", "per_image.csv")]
    assert fuzz(files, read, count, tmp_path) > count / 4


def test_unknown_sets_of_pictures_are_refused(tmp_path):
    folder = tmp_path / "a"
    evaluation_folder(folder, professions=("doctor",), pictures=2, drawn=1)
    for name, before, after in (
        ("results.json", '"images": "base"', '"images": "bass"'),
        ("per_image.csv", ",base,", ",bass,"),
    ):
        text = (folder / name).read_text()
        assert before in text
        (folder / name).write_text(text.replace(before, after))
        with pytest.raises(UserError, match=f"{name}.*images.*'bass', expected one of base, adap"):
            write_report(folder)
        (folder / name).write_text(text)


@pytest.mark.parametrize("count", CASES)
def test_suites(tmp_path, count):
    package = ROOT / "respodiff_jax"
    whole = json.loads((package / "emoji" / "model" / "suite.json").read_text())
    small = {k: v[:3] if isinstance(v, list) else v for k, v in whole.items()}
    small["subject_classes"] = {s: whole["subject_classes"][s] for s in small["subjects"]}
    (tmp_path / "suite.json").write_text(json.dumps(small))

    def read():
        prompts_to_draw(load_suite(str(tmp_path / "suite.json")), {}, 2)

    assert fuzz([tmp_path / "suite.json"], read, count, tmp_path) > count / 4


@pytest.mark.parametrize("count", CASES)
def test_concepts(tmp_path, count):
    lines = (ROOT / "configs" / "emoji_concepts.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "a.jsonl").write_text("".join(lines[:3]))
    (tmp_path / "a.csv").write_text(
        "name,group,neutral_prompts,target_prompt,lr_ram\n"
        'a woman,gender,a person|someone,"a woman",0.1\na man,gender,a person,a man,\n'
    )

    def read():
        for name in ("a.jsonl", "a.csv"):
            read_concepts(tmp_path / name, HYPER_PARAMETERS)

    files = [tmp_path / name for name in ("a.jsonl", "a.csv")]
    assert fuzz(files, read, count, tmp_path) > count / 4


@pytest.mark.parametrize("count", CASES)
def test_prompts(tmp_path, count):
    (tmp_path / "a.txt").write_text("a nurse\n\na cook\n")
    (tmp_path / "a.csv").write_text(
        'prompt,profession,categories,evaluation_seed,sd_guidance_scale\n"a, b",nurse,x,7,7.5\n'
    )

    def read():
        for name in ("a.txt", "a.csv"):
            inputs.read_prompts([], str(tmp_path / name))
        for part in ("fairness", "quality", "safety"):
            read_prompts(tmp_path / "a.csv", part)

    assert fuzz([tmp_path / "a.txt", tmp_path / "a.csv"], read, count, tmp_path) > count / 10


@pytest.mark.parametrize("count", CASES)
def test_model_configs(sd_folder, tmp_path, count):
    model = shutil.copytree(sd_folder, tmp_path / "model")

    def read():
        load_backbone(str(model), abstract=True)

    files = [*sorted(model.glob("**/*config.json")), model / "model_index.json"]
    assert fuzz(files, read, count, tmp_path) > count / 4
