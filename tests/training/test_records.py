"""The files of a working directory: what is wrong in them is named with file and field."""

import json
import pathlib
import shutil

import pytest

from respodiff_jax.errors import UserError
from respodiff_jax.training.config import load_config
from respodiff_jax.training.outcomes import read_outcomes, read_waves
from respodiff_jax.training.record import RunRecord, check_same_config

ROOT = pathlib.Path(__file__).parents[2]
RUN = ROOT / "tests" / "data" / "run_0_1_0"
OUTCOME = {"name": "a", "group": "g", "steps": 4, "diverged_at": None, "adapter": "adapter"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"config": 5}, "config is 5: expected a mapping, got a whole number"),
        ({"config": None}, "config is None: expected a mapping, got null"),
        ({"config": {}}, "config: content is {}: it lacks the field"),
        ({"concepts": 5}, "concepts is 5: expected a list, got a whole number"),
        ({"concepts": []}, r"concepts is \[\]: expected a list of length >= 1"),
        ({"concepts": [{"name": "a"}]}, r"concept 'a': missing fields \['group'"),
        ({"concepts": [4]}, r"concepts\[0\] is 4: expected a mapping"),
        ({"module": {}}, "module: content is {}: it lacks the field kind"),
        ({"module": {"kind": "x", "mid_block_shape": [1, 1, 1], "hidden_channels": None}}, "'x'"),
        ({"module": {"kind": "mlp", "mid_block_shape": [1], "hidden_channels": None}}, "length 3"),
        ({"backbone": {}}, "adapter backbone does not have the expected keys"),
        ({"colour": 1}, "has the unknown fields colour; expected config, concepts, module, back"),
    ],
)
def test_wrong_run_record_is_named_with_its_field(tmp_path, changes, message):
    shutil.copy(RUN / "run.json", tmp_path)
    assert RunRecord.read(tmp_path).adapter_module.kind == "mlp"
    content = json.loads((RUN / "run.json").read_text()) | changes
    (tmp_path / "run.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match=message) as error:
        RunRecord.read(tmp_path)
    assert str(error.value).startswith(f"run record {tmp_path}/run.json") or "colour" in changes
    assert len(str(error.value)) < 400 + len(str(tmp_path))


def test_directory_of_another_run_is_refused_in_a_few_lines(tmp_path):
    shutil.copy(RUN / "run.json", tmp_path)
    config = load_config(ROOT / "configs" / "emoji_gender.py")
    with pytest.raises(UserError, match=r"belongs to another run:\n  config\.") as error:
        check_same_config(config, tmp_path)
    message = str(error.value).replace(str(tmp_path), "")
    assert len(message.splitlines()) == 6 and "more\nuse another `workdir`" in message
    assert len(message) < 400


@pytest.mark.parametrize(
    ("waves", "message"),
    [
        ([], r"content is \[\]: expected a mapping, got a list"),
        ({"concepts": 2}, ".*it lacks the field size"),
        ({"size": "a", "concepts": 2}, "size is 'a': expected a whole number, got a text"),
        ({"size": -1, "concepts": 2}, "size is -1: expected a whole number >= 1"),
        ({"size": 0, "concepts": 2}, "size is 0: expected a whole number >= 1"),
    ],
)
def test_wrong_record_of_waves_is_named_with_its_field(tmp_path, waves, message):
    (tmp_path / "waves.json").write_text(json.dumps(waves))
    with pytest.raises(UserError, match=rf"^{tmp_path}/waves\.json: {message}"):
        read_waves(tmp_path)


@pytest.mark.parametrize(
    ("outcome", "message"),
    [
        ({"name": "a woman"}, "it lacks the field group"),
        (OUTCOME | {"steps": -1}, "steps is -1: expected a whole number >= 0"),
        (OUTCOME | {"adapter": 3}, r"adapter is 3: expected a text \| null, got a whole number"),
        ([1], r"content is \[1\]: expected a mapping, got a list"),
    ],
)
def test_wrong_outcome_is_named_with_its_line(tmp_path, outcome, message):
    lines = f"{json.dumps(OUTCOME)}\n{json.dumps(outcome)}\n"
    (tmp_path / "outcomes.jsonl").write_text(lines)
    with pytest.raises(UserError, match=rf"outcomes\.jsonl, line 2: .*{message}"):
        read_outcomes(tmp_path)
