"""Whole trainings: on several processes, of an earlier version, with every option; refusals."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict
from PIL import Image
from test_launch import program
from test_training import ROOT, SMOKE, assert_same_state, final_state, make_config, sigterm_at

from respodiff_jax import cli
from respodiff_jax.adapters import load_adapter
from respodiff_jax.backbone import load_backbone
from respodiff_jax.errors import UserError
from respodiff_jax.training import spec, trained, waves
from respodiff_jax.training.checkpoint import Checkpoints
from respodiff_jax.training.config import load_config
from respodiff_jax.training.waves import train


def test_working_directory_of_version_0_1_0_opens_and_continues(tmp_path):
    """Options that it lacks have their defaults; options that are gone are ignored."""
    workdir = tmp_path / "run"
    shutil.copytree(ROOT / "tests" / "data" / "run_0_1_0", workdir)
    record = json.loads((workdir / "run.json").read_text())
    assert record["config"]["parallel"].pop("strategy") == "pmap"
    assert record["config"]["optimizer"].pop("ema_decay", "absent") is None
    assert record["config"]["concepts"]["man"].pop("lambda_sem") == 0.5
    assert "fsdp" in record["config"]["parallel"]
    (workdir / "run.json").write_text(json.dumps(record))

    exported, held = load_adapter(workdir / "adapter"), trained.load_adapter(workdir)
    jax.tree.map(np.testing.assert_array_equal, exported.ram, held.ram)
    changes = {
        "train": {"steps": 3, "batch_size": 1},
        "module": {"kind": "mlp", "hidden_channels": 4, "init": "uniform"},
        "log": {"grid_every": 0},
    }
    config = load_config(SMOKE, **changes)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax, "device_count", lambda: 1)
        local = jax.local_devices
        patch.setattr(jax, "local_devices", lambda *a, **k: local(*a, **k)[:1])
        adapter = train(config, workdir)
    assert adapter.training["steps"] == 3 and adapter.names == exported.names
    assert not np.array_equal(adapter.ram["out"]["kernel"], exported.ram["out"]["kernel"])


def test_run_fails_when_all_concepts_diverge(tmp_path):
    wild = {"concepts.man.lr_ram": 1e38, "concepts.woman.lr_ram": 1e38, "log.every": 2}
    with pytest.raises(UserError, match=r"'a man' at step \d, 'a woman' at step \d"):
        train(make_config(**wild), str(tmp_path))
    with Checkpoints(tmp_path) as checkpoints:
        saved = [checkpoints.restore_host(step)[1] for step in checkpoints.steps]
    assert all(np.isfinite(leaf).all() for state in saved for leaf in jax.tree.leaves(state))
    assert not (tmp_path / "adapter").exists()


def test_truncated_prompt_is_reported_before_the_weights_are_read(tmp_path, monkeypatch):
    opened = []

    def recording_load(*args, abstract=False, **options):
        opened.append("abstract" if abstract else "weights")
        return load_backbone(*args, abstract=abstract, **options)

    monkeypatch.setattr(spec, "load_backbone", recording_load)
    changes = {"concepts.man.target_prompt": "a man " * 20}
    with pytest.raises(UserWarning, match=r"'a man a man .* not read: "):  # an error in tests
        train(make_config(**changes), str(tmp_path))
    assert opened == ["abstract"]


def test_workdir_that_cannot_be_made_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"`workdir` .*file.* cannot be written to"):
        train(make_config(), str(tmp_path / "file" / "run"))


def test_training_reads_every_option(tmp_path, monkeypatch):
    """The added option `train.idle` shows that the test notices an option that is not read."""
    changes = {"log.grid_every": 2, "log.grid_images": 2, "log.grid_steps": 2}
    config = make_config(**changes | {"train.steps": 2})
    with config.unlocked():
        config.train.idle = 0
    paths = {id(config): ""}
    options = set()

    def walk(node, path):
        for key in node:
            if isinstance(node[key], ConfigDict):
                paths[id(node[key])] = f"{path}{key}."
                walk(node[key], f"{path}{key}.")
            else:
                options.add(f"{path}{key}")

    walk(config, "")
    read = set()
    get = ConfigDict.__getitem__

    def recording_get(self, key):
        read.add(f"{paths.get(id(self))}{key}")
        return get(self, key)

    # Validation and the run's record read every option; neither counts.
    monkeypatch.setattr(waves, "validate", lambda config: None)
    plain, to_dict = config.to_dict(), ConfigDict.to_dict
    monkeypatch.setattr(
        ConfigDict, "to_dict", lambda self: plain if self is config else to_dict(self)
    )
    monkeypatch.setattr(ConfigDict, "__getitem__", recording_get)
    train(config, str(tmp_path))
    # A concepts file uses these; `tests/data/test_concept_files.py` tests it.
    read |= {option for option in options if option.startswith("concept_defaults.")}
    # Without a reading its words are not read; `test_trained_reading.py` tests them.
    read |= {option for option in options if option.startswith("reading.")}
    # Nothing is attacked, so only `every` is read; `test_adversary.py` tests the others.
    read |= {option for option in options if option.startswith("adversary.")} - {"adversary.every"}
    assert options - read == {"train.idle"}


@pytest.mark.parametrize("processes", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_several_processes_train_the_same_as_one(tmp_path, processes):
    """Processes with two devices each, like hosts of a pod, and this process with eight."""
    changes = {"train.steps": 2, "rollout.num_steps": 4, "rollout.trajectory_steps": 2}
    changes |= {"log.grid_every": 2, "log.grid_images": 2, "log.grid_steps": 2}
    overrides = [f"--config.{key}={value}" for key, value in changes.items()]
    # The script sets the number of devices; its processes compile as quickly as this one.
    program(
        tmp_path,
        "python3",
        f'XLA_FLAGS="{os.environ["XLA_FLAGS"]} $XLA_FLAGS" exec {sys.executable} "$@"',
    )
    environment = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    subprocess.run(
        [
            "launch/local_pod.sh",
            str(processes),
            "2",
            "--config",
            SMOKE,
            "--workdir",
            tmp_path / "pod",
            *overrides,
        ],
        check=True,
        cwd=ROOT,
        env=environment,
        capture_output=True,
        timeout=300,
    )
    train(load_config(SMOKE, overrides), str(tmp_path / "one"))
    ours, theirs = (load_adapter(tmp_path / run / "adapter") for run in ("pod", "one"))
    for part in ("ram", "sam"):
        a, b = getattr(ours, part)["constant"], getattr(theirs, part)["constant"]
        assert np.linalg.norm(a - b) < 1e-3 * np.linalg.norm(b)
    grids = [sorted((tmp_path / run / "grids").glob("*.png")) for run in ("pod", "one")]
    assert len(grids[0]) == 2
    for ours, theirs in zip(*grids, strict=True):
        difference = np.int16(Image.open(ours)) - np.int16(Image.open(theirs))
        assert np.abs(difference).max() <= 2


def test_run_continues_with_the_model_commit_it_began_with(tmp_path, monkeypatch):
    """The config names a branch, which may have moved since."""
    asked = []

    def opened(name, revision, **options):
        asked.append(revision)
        backbone = load_backbone(name, **options)
        commit = "commit 1" if revision == "main" else revision
        return dataclasses.replace(backbone, identity={**backbone.identity, "revision": commit})

    monkeypatch.setattr(spec, "load_backbone", opened)
    for _ in range(2):  # the second finds its only step done
        train(make_config(**{"model.revision": "main", "train.steps": 1}), str(tmp_path))
    assert asked == ["main", "commit 1"]


def test_interrupted_command_exits_with_75_and_continues(tmp_path, capsys):
    """The config has a moving average, a schedule and the other strategy."""
    changes = {
        "train.steps": 4,
        "checkpoint.every": 2,
        "log.every": 1,
        "log.grid_every": 0,
        "parallel.strategy": "mesh",
        "module.kind": "mlp",
        "optimizer.ema_decay": 0.9,
        "optimizer.lr_schedule": "cosine",
        "optimizer.warmup_steps": 1,
    }

    def command(workdir):
        overrides = [f"--config.{key}={value}" for key, value in changes.items()]
        return cli.main(
            ["train", "--config", SMOKE, "--workdir", str(tmp_path / workdir), *overrides]
        )

    assert command("whole") == 0
    with sigterm_at(2):
        assert command("halved") == 75
    assert "saved; run the same command to continue" in capsys.readouterr().err
    assert not (tmp_path / "halved" / "adapter").exists()
    assert command("halved") == 0
    assert_same_state(tmp_path / "halved", tmp_path / "whole")

    _, state = final_state(tmp_path / "whole")
    average = state["concepts"]["ema"]["ema"][0]["out"]["kernel"] / (1 - 0.9**4)
    exported = load_adapter(tmp_path / "whole" / "adapter").ram["out"]["kernel"]
    np.testing.assert_allclose(exported, average, rtol=1e-6)
    assert np.abs(exported).max() > 0
