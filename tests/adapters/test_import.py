"""Import of checkpoints of the authors' code and of SDisc, and of hostile files."""

import json
import os
import pickle
import zipfile

import numpy as np
import pytest
import torch
from test_adapters import Explosive

from respodiff_jax import cli
from respodiff_jax.adapters import load_adapter
from respodiff_jax.torch_adapter import RespoDiffAdapter

RAM, SAM = "controlnet.fc1.weight", "controlnet_residual.fc2.weight"
MAN_ID = {"a man": 1}
CHW = (64, 4, 4)  # of random/tiny at 16 pixels
AUTHORS_IDS = {
    "a woman": 0,
    "a man": 1,
    "young": 2,
    "old": 3,
    "white-race": 3,
    "black-race": 4,
    "Asian-race": 5,
    "sexual": 6,
    "violence": 7,
}


def state_dict(num_ids=8, *keys):
    generator = torch.Generator().manual_seed(0)
    return {
        key: torch.randn(int(np.prod(CHW)), num_ids, generator=generator)
        for key in keys or (RAM, SAM)
    }


@pytest.fixture
def run(tmp_path, capsys):
    """Runs `respodiff import` on a state dict; returns exit status and output."""

    def run(state=None, ids=MAN_ID, *options, save=torch.save):
        file, table = tmp_path / "unet.pth", tmp_path / "ids.json"
        save(state_dict() if state is None else state, file)
        table.write_text(ids if isinstance(ids, str) else json.dumps(ids))
        argv = ["import", file, "--concepts", table, "--out", tmp_path / "out"]
        status = cli.main([*map(str, argv), "--model", "random/tiny", *options])
        output = capsys.readouterr()
        assert (status == 0) == (tmp_path / "out").exists()
        return status, output.out + output.err

    return run


def test_columns_become_concepts_in_flax_and_in_torch(run, tmp_path):
    state = state_dict() | {"conv_in.weight": torch.zeros(3)}  # ignored
    options = [x for name in ("a man", "violence", "white-race") for x in ("--only", name)]
    assert run(state, AUTHORS_IDS, *options) == (
        0,
        f"{tmp_path / 'out'}: adapter of a man, anti-violence, a white-race person\n",
    )
    adapter = load_adapter(tmp_path / "out")
    assert adapter.backbone["name"] == "random/tiny" and adapter.backbone["resolution"] == 16
    assert adapter.concepts[1].unsafe_prompt == "violence" and adapter.concepts[0].lr_ram == 1e-2
    for n, number in enumerate((1, 7, 3)):
        for key, params in ((RAM, adapter.ram), (SAM, adapter.sam)):
            column = state[key][:, number].reshape(CHW).permute(1, 2, 0)
            np.testing.assert_array_equal(params["constant"][n], column)
    torch_side = RespoDiffAdapter.from_pretrained(tmp_path / "out")
    torch_side.set_concepts({"a man": 1.0})
    expected = (state[RAM] + state[SAM])[:, 1].reshape(1, *CHW)
    torch.testing.assert_close(torch_side.delta(torch.zeros(1, *CHW)), expected)


def test_sdisc_has_no_sam(run, tmp_path):
    parameters = {key: torch.nn.Parameter(value) for key, value in state_dict(2, RAM).items()}
    assert run(parameters, MAN_ID)[0] == 0
    adapter = load_adapter(tmp_path / "out")
    assert not adapter.sam["constant"].any() and adapter.ram["constant"].any()


def test_other_concepts_are_described_in_the_file(run, tmp_path):
    wizard = {"group": "job", "neutral_prompts": ["a person"], "target_prompt": "a wizard"}
    assert run(None, {"a wizard": {"id": 2} | wizard})[0] == 0
    concept = load_adapter(tmp_path / "out").concepts[0]
    assert (concept.name, concept.group) == ("a wizard", "job")


@pytest.mark.parametrize(
    ("state", "ids", "message"),
    [
        (None, {"white-race": 3, "Asian-race": 3}, "'white-race' and 'Asian-race' both have id 3"),
        (None, {"a wizard": 3}, "'a wizard' is not one of the paper's concepts ("),
        (None, {"a wizard": {"id": 3, "colour": 1}}, "unknown fields ['colour']"),
        (None, {"a man": "one"}, "'a man' has id 'one'"),
        (None, {"a man": True}, "'a man' has id True"),
        (None, {"a man": -1}, "'a man' has id -1"),
        (None, '{"a man": 0, "a man": 1}', "the keys ['a man'] more than once"),
        (None, {"a man": 8}, "has id 8, but the checkpoint holds ids 0 .. 7"),
        (None, [], 'expected JSON like {"a woman": 0'),
        ({"weight": torch.zeros(1)}, {"a man": 0}, f"has no {RAM}"),
        ([1], {"a man": 0}, f"has no {RAM}"),
        ({RAM: "text"}, {"a man": 0}, f"{RAM} is not a tensor of floats"),
        ({RAM: torch.zeros(1024, 2).to_sparse()}, MAN_ID, f"{RAM} is a sparse, nested or meta"),
        ({RAM: torch.zeros(1024, 2, device="meta")}, MAN_ID, f"{RAM} is a sparse, nested or meta"),
        ({RAM: torch.zeros(1).expand(1024, 10**9)}, MAN_ID, "but the file holds fewer values"),
        (
            {RAM: torch.zeros(7, 2)},
            {"a man": 0},
            "has shape (7, 2), expected (1024, number of ids)",
        ),
        (state_dict() | {SAM: torch.zeros(1024, 2)}, {"a man": 0}, "8 ids for RAM but 2 for SAM"),
        ({RAM: torch.full((1024, 2), np.nan)}, {"a man": 0}, "ram.constant holds NaN"),
    ],
)
def test_wrong_files_are_refused_and_nothing_written(run, state, ids, message):
    status, output = run(state, ids)
    assert status == 2 and message in output and "Traceback" not in output


@pytest.mark.parametrize(
    ("only", "message"),
    [
        (("a wizard",), "has no ['a wizard']"),
        (("a man", "a boat"), "has no ['a boat']"),
        (("a man", "a man"), "--only names ['a man'] more than once"),
    ],
)
def test_only_takes_existing_names_once_each(run, only, message):
    status, output = run(None, AUTHORS_IDS, *(x for name in only for x in ("--only", name)))
    assert status == 2 and message in output


def pickled(state, file):
    file.write_bytes(pickle.dumps({RAM: Explosive()}, protocol=2))


def pickled_by_torch(state, file):
    torch.save({RAM: Explosive()}, file)


def truncated(state, file):
    torch.save(state, file)
    file.write_bytes(file.read_bytes()[:-100])


def empty(state, file):
    file.write_bytes(b"")


class SystemCall:
    def __reduce__(self):
        return os.system, ("touch hacked",)


def system_call(state, file, protocol=2):
    torch.save({"controlnet.fc1.weight": SystemCall()}, file, pickle_protocol=protocol)


def system_call_4(state, file):
    system_call(state, file, protocol=4)


def zipped(state, file):
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("../../data.pkl", b"x")


def text(state, file):
    file.write_text("<html>not found</html>")


@pytest.mark.parametrize(
    ("save", "message"),
    [
        (pickled, "which is not a tensor and could run code when loaded; nothing was run"),
        (system_call, "holds posix.system, which is not a tensor and could run code when loaded"),
        (system_call_4, "holds the pickle instruction 149, which is not a tensor and could run"),
        (pickled_by_torch, "unet.pth holds _pytest."),
        (truncated, "is damaged, or torch.save did not write it: get it again"),
        (empty, "is damaged"),
        (zipped, "is damaged"),
        (text, "is damaged"),
    ],
)
def test_hostile_files_are_not_run(run, save, message):
    status, output = run(save=save)
    assert status == 2 and message in output and "Traceback" not in output


def test_one_concept_under_two_names_is_refused(run):
    status, output = run(None, {"white-race": 3, "a white-race person": 4})
    assert status == 2 and "are duplicates" in output
