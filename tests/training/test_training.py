"""Whole trainings: what they write, interruption, continuation, refusals."""

import contextlib
import json
import os
import pathlib
import shutil
import signal

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict
from PIL import Image

from respodiff_jax import cli
from respodiff_jax.adapters import load_adapter
from respodiff_jax.data import contrast
from respodiff_jax.errors import Interrupted, UserError
from respodiff_jax.method.concepts import Concept
from respodiff_jax.training import checkpoint, monitoring, parallel, spec, trained
from respodiff_jax.training.checkpoint import Checkpoints
from respodiff_jax.training.config import add_concepts, default
from respodiff_jax.training.outcomes import read_outcomes
from respodiff_jax.training.waves import train

ROOT = pathlib.Path(__file__).parents[2]
SMOKE = str(ROOT / "configs" / "smoke.py")
STEPS = 6


def make_config(**changes) -> ConfigDict:
    config = default()
    config.model.name = "random/tiny"
    config.model.dtype = "float32"
    config.rollout.num_steps, config.rollout.trajectory_steps = 4, 2
    config.train.steps = STEPS
    config.train.batch_size = 8
    config.checkpoint.every = 2
    config.log.every = 1
    config.log.grid_every = 0
    config.reading.train = False  # random text states cannot be read
    concepts = {
        key: Concept(
            name=f"a {key}",
            group="gender",
            neutral_prompts=("a person",),
            target_prompt=f"a {key}",
        )
        for key in ("woman", "man")
    }
    add_concepts(config, concepts)
    config.update_from_flattened_dict(changes)
    return config


def final_state(workdir):
    with Checkpoints(workdir) as checkpoints:
        return checkpoints.restore_host()


def assert_same_state(workdir, other):
    (step, ours), (other_step, theirs) = final_state(workdir), final_state(other)
    assert step == other_step
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)


@contextlib.contextmanager
def sigterm_at(step, number=signal.SIGTERM):
    """Sends SIGTERM, or another signal, to this process when it writes the log of a step."""
    write = monitoring.RunLog.write

    def write_and_kill(self, at):
        remaining = write(self, at)
        if at == step:
            os.kill(os.getpid(), number)
        return remaining

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(monitoring.RunLog, "write", write_and_kill)
        yield


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run that was never interrupted, with grids."""
    workdir = tmp_path_factory.mktemp("finished")
    changes = {"log.grid_every": STEPS, "log.grid_images": 2, "log.grid_steps": 2}
    train(make_config(**changes), str(workdir))
    return workdir


def test_run_writes_logs_grids_record_and_adapter(finished):
    lines = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    assert all(line["concepts"]["a man"]["loss_resp"] > 0 for line in lines)
    assert lines[0]["concepts"]["a man"]["loss_sem"] > 0  # the updated RAM is not zero
    assert list((finished / "tensorboard").glob("events*"))
    grids = sorted((finished / "grids").glob("*.png"))
    assert [g.name for g in grids] == ["0000006_00_a_man.png", "0000006_01_a_woman.png"]
    with Image.open(grids[0]) as picture:
        assert min(picture.size) > 32

    record = json.loads((finished / "run.json").read_text())
    assert record["config"]["train"]["batch_size"] == 8
    assert record["backbone"]["name"] == "random/tiny"
    assert [c["name"] for c in record["concepts"]] == ["a man", "a woman"]

    exported, held = load_adapter(finished / "adapter"), trained.load_adapter(finished)
    jax.tree.map(np.testing.assert_array_equal, exported.ram, held.ram)
    assert [c.name for c in exported.concepts] == ["a man", "a woman"]
    assert np.abs(exported.ram["constant"]).max() > 0


def test_a_run_that_goes_on_without_a_reading_loses_it(tmp_path):
    words = {"reading.people": contrast.PEOPLE[:20], "reading.things": contrast.THINGS[:20]}
    train(make_config(**{"train.steps": 1, "reading.train": True}, **words), tmp_path)
    assert trained.load_adapter(tmp_path).reading is not None
    train(make_config(**{"train.steps": 1}), tmp_path)
    assert trained.load_adapter(tmp_path).reading is None
    assert load_adapter(tmp_path / "adapter").reading is None


def test_all_exports_of_a_run_have_the_same_bytes(finished, tmp_path):
    def contents(folder):
        return {path.name: path.read_bytes() for path in folder.iterdir()}

    written = contents(finished / "adapter")
    assert {"README.md", "grid.png", "torch_adapter.py"} < set(written)
    for source, out in [(finished, tmp_path / "1"), (tmp_path / "1", tmp_path / "2")]:
        assert cli.main(["export", str(source), "--out", str(out)]) == 0
        assert contents(out) == written


def test_run_starts_from_an_adapter(finished, tmp_path):
    """At a learning rate of 0, the adapter's concept keeps its modules; the other is new."""
    changes = {"train.init_adapter": str(finished / "adapter"), "train.steps": 1}
    config = make_config(**changes)
    config.concepts.man.lr_ram = config.concepts.man.lr_sam = 0.0
    config.concepts.woman.name = "a girl"
    config.concepts.woman.lr_ram = config.concepts.woman.lr_sam = 0.0
    train(config, str(tmp_path))
    ours, theirs = load_adapter(tmp_path / "adapter"), load_adapter(finished / "adapter")
    assert ours.names == ("a man", "a girl") and theirs.names == ("a man", "a woman")
    for role in ("ram", "sam"):
        ours_role, theirs_role = (getattr(adapter, role)["constant"] for adapter in (ours, theirs))
        np.testing.assert_array_equal(ours_role[0], theirs_role[0])
        assert theirs_role[0].any() and not ours_role[1].any()
    assert ours.training["init_adapter"] == str(finished / "adapter")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train.init_adapter": "nowhere"}, "nowhere is not an adapter directory"),
        ({"module.kind": "mlp"}, "has constant modules .* the config makes mlp modules"),
        ({"model.name": "random/tiny-v"}, "trained on a model that predicts 'epsilon'"),
        (
            {"concepts.man.name": "x", "concepts.woman.name": "y"},
            "and none of the config",
        ),
    ],
)
def test_init_adapter_that_does_not_fit_is_refused(finished, tmp_path, changes, message):
    changes = {"train.init_adapter": str(finished / "adapter")} | changes
    with pytest.raises(UserError, match=message):
        train(make_config(**changes), str(tmp_path))


def test_checkpoints_hold_no_base_weights(finished, tiny_backbone):
    _, state = final_state(finished)
    module, samples, latent = 4 * 4 * 64, 8, 8 * 8 * 4
    sizes = {leaf.size for leaf in jax.tree.leaves(state)}
    assert sizes == {1, 2, 2 * module, 2 * samples, 2 * samples * latent}
    newest = finished / "checkpoints" / str(STEPS)
    size = sum(f.stat().st_size for f in newest.rglob("*") if f.is_file())
    assert size < 0.25 * sum(x.nbytes for x in jax.tree.leaves(tiny_backbone.params["unet"]))
    kept = sorted(int(p.name) for p in (finished / "checkpoints").iterdir() if p.name.isdigit())
    assert kept == [2, 4, 6]


@pytest.mark.parametrize(
    "number", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)]
)
def test_interrupted_run_continues_bit_for_bit(finished, tmp_path, number, capfd):
    stopped = pytest.raises(Interrupted, match=r"stopped at step [34] of 6")
    before = signal.getsignal(signal.SIGINT)
    with sigterm_at(3, number), stopped as stop:
        train(make_config(), str(tmp_path))
    told = "stopping: saves after this step; Ctrl-C again ends at once, without saving"
    assert (told in capfd.readouterr().err) == (number == signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before
    assert stop.value.step in (3, 4)
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.steps[-1] in (3, 4)
    assert not (tmp_path / "adapter").exists()
    assert trained.load_adapter(tmp_path).training["steps"] == stop.value.step
    train(make_config(), str(tmp_path))
    assert_same_state(tmp_path, finished)
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    steps = [json.loads(line)["step"] for line in lines]
    assert steps == list(range(1, STEPS + 1))


@contextlib.contextmanager
def no_space_at_the_second_grid():
    write_grid, written = monitoring.RunLog.write_grid, []

    def write_one(self, *args):
        write_grid(self, *args)
        written.append(args)
        if len(written) == 1:
            raise OSError("no space left")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(monitoring.RunLog, "write_grid", write_one)
        with pytest.raises(OSError, match="no space left"):
            yield


@contextlib.contextmanager
def stopped_at_the_first_grid():
    with sigterm_at(2), pytest.raises(Interrupted):
        yield


@pytest.mark.parametrize(
    "interrupted",
    [
        no_space_at_the_second_grid,
        pytest.param(stopped_at_the_first_grid, marks=pytest.mark.slow),
    ],
)
def test_interrupted_grids_are_drawn_when_the_run_continues(finished, interrupted, tmp_path):
    """The run is stopped when grids are due, or fails while it draws them."""
    changes = {"log.grid_every": 3, "log.grid_images": 2, "log.grid_steps": 2}
    config = make_config(**changes | {"checkpoint.every": 3})
    with interrupted():
        train(config, str(tmp_path))
    names = [f"{step:07d}_{c}.png" for step in (3, 6) for c in ("00_a_man", "01_a_woman")]
    assert len(list((tmp_path / "grids").glob("*.png"))) < 2
    for name in names[2:]:  # from a run that was killed later; the new run replaces them
        (tmp_path / "grids").mkdir(exist_ok=True)
        (tmp_path / "grids" / name).write_bytes(b"old")
    train(config, str(tmp_path))
    assert_same_state(tmp_path, finished)
    assert sorted(path.name for path in (tmp_path / "grids").iterdir()) == names
    for name in names[2:]:
        assert (tmp_path / "grids" / name).read_bytes() == (finished / "grids" / name).read_bytes()


def test_more_steps_continue_a_finished_run(finished, tmp_path):
    """The second run also has another strategy and other checkpoints."""
    train(make_config(**{"train.steps": 4}), str(tmp_path))
    changes = {"parallel.strategy": "mesh", "checkpoint.every": 1, "checkpoint.keep": 2}
    train(make_config(**changes), str(tmp_path))
    (_, ours), (_, theirs) = final_state(tmp_path), final_state(finished)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=2e-4), ours, theirs)
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.steps == [5, 6]


def test_damaged_checkpoint_is_reported_and_the_previous_one_used(finished, tmp_path, capfd):
    workdir = tmp_path / "run"
    shutil.copytree(finished, workdir)
    for file in (workdir / "checkpoints" / str(STEPS)).rglob("*"):
        if file.is_file() and file.stat().st_size > 200:
            os.truncate(file, file.stat().st_size // 2)
    train(make_config(), str(workdir))
    assert f"checkpoint {STEPS} is damaged" in capfd.readouterr().out
    assert (workdir / "damaged_checkpoints" / str(STEPS)).is_dir()
    assert_same_state(workdir, finished)


def flip_a_bit(folder, rng):
    """Flips a random bit of the files in a folder, and returns the file."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    file = rng.choice(files, p=(sizes := np.array([f.stat().st_size for f in files])) / sizes.sum())
    content = bytearray(file.read_bytes())
    content[rng.integers(len(content))] ^= 1 << rng.integers(8)
    file.write_bytes(content)
    return file


# Orbax's event loop has ended when its own threads notice the damage.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("seeds", [range(6), pytest.param(range(6, 306), marks=pytest.mark.slow)])
def test_flipped_bit_in_a_checkpoint_never_restores_other_values(finished, tmp_path, seeds, capfd):
    """The damage is reported, and the checkpoint before it is used; or it does not matter."""
    kept = {step: Checkpoints(finished).restore_host(step)[1] for step in (4, 6)}
    used = []
    for seed in seeds:
        workdir = tmp_path / str(seed)
        shutil.copytree(finished / "checkpoints", workdir / "checkpoints")
        flip_a_bit(workdir / "checkpoints" / "6", np.random.default_rng(seed))
        try:
            step, state = final_state(workdir)
            jax.tree.map(np.testing.assert_array_equal, state, kept[step])
            assert (step == 6) != ("checkpoint 6 is damaged" in capfd.readouterr().out)
            used.append(step)
        except UserError as error:  # Orbax reads these records before any state
            assert "cannot be opened" in str(error) and "_CHECKPOINT_METADATA" in str(error)
            used.append(None)
        shutil.rmtree(workdir)
    assert 4 in used
    if len(used) > 100:
        reported = len(used) - used.count(6)
        print(
            f"{reported} of {len(used)} flipped bits were reported, {used.count(6)} did not matter"
        )


def test_changed_values_in_a_checkpoint_are_noticed_on_all_devices(finished, tmp_path, capfd):
    """Another value in a whole, readable file, which only the checksums can notice."""
    shutil.copytree(finished / "checkpoints", tmp_path / "checkpoints")
    _, held = final_state(finished)
    placement = parallel.Placement("mesh", 2, 8)
    everywhere = jax.sharding.NamedSharding(placement.mesh, jax.sharding.PartitionSpec())
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), held)
    abstract = jax.tree.map(lambda x: x.update(sharding=everywhere), abstract)
    restore = Checkpoints._restore

    def changed(self, step, abstract):
        state = restore(self, step, abstract)
        ram = state["concepts"]["ram"]
        if step == STEPS:
            ram["constant"] = ram["constant"].at[1, 3, 3, 63].multiply(1 + 2e-7)
        return state

    with pytest.MonkeyPatch.context() as patch, Checkpoints(tmp_path) as checkpoints:
        patch.setattr(Checkpoints, "_restore", changed)
        assert int(checkpoints.restore_latest(abstract)["step"]) == 4
    told = "checkpoint 6 is damaged (DATA_LOSS: values of concepts.ram.constant have changed)"
    assert told in capfd.readouterr().out
    assert (tmp_path / "damaged_checkpoints" / "6").is_dir()


@pytest.mark.parametrize(
    "error",
    [
        MemoryError("full"),
        OSError("too many open files"),
        ValueError("PERMISSION_DENIED: a file"),
        ValueError("shapes do not match"),
        TypeError("a bug of ours"),
    ],
)
def test_only_damage_moves_a_checkpoint_aside(finished, error, monkeypatch, capfd):
    def restore(*args, **kwargs):
        raise error

    for reader in (checkpoint.ocp.Checkpointer, checkpoint.ocp.CheckpointManager):
        monkeypatch.setattr(reader, "restore", restore)
    with Checkpoints(finished) as checkpoints:
        for use in (lambda: checkpoints.restore_latest({}), checkpoints.restore_host):
            with pytest.raises(type(error), match=str(error)):
                use()
        assert checkpoints.steps[-1] == STEPS
    assert "damaged" not in "".join(capfd.readouterr())


def test_reading_a_run_writes_nothing(finished, tmp_path):
    shutil.copy(finished / "run.json", tmp_path)
    with pytest.raises(UserError, match="holds no checkpoint"):
        trained.load_adapter(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["run.json"]


def test_damaged_log_is_reported(finished, tmp_path):
    lines = (finished / "metrics.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "run.json").write_bytes((finished / "run.json").read_bytes())
    (tmp_path / "metrics.jsonl").write_text(lines[0] + lines[1][5:] + lines[2])
    with pytest.raises(UserError, match=r"metrics\.jsonl, line 2 is not JSON"):
        train(make_config(), str(tmp_path))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seed": 1}, r"config.seed: 0 there, 1 here"),
        ({"concepts.man.lr_ram": 0.5}, r"config.concepts.man.lr_ram: 0.01 there, 0.5 here"),
        ({"model.name": "random/tiny-v"}, r"config.model.name: 'random/tiny' there"),
        ({"train.steps": 8, "optimizer.lr_schedule": "linear"}, r"lr_schedule: 'constant' there"),
    ],
)
def test_directory_of_another_config_is_refused_with_the_differences(
    finished, changes, message, monkeypatch
):
    monkeypatch.setattr(spec, "load_backbone", None)  # refused before the model is opened
    before = (finished / "run.json").read_text()
    with pytest.raises(UserError, match=message):
        train(make_config(**changes), str(finished))
    assert (finished / "run.json").read_text() == before


def test_changed_model_of_the_same_name_is_refused(finished, tmp_path):
    record = json.loads((finished / "run.json").read_text())
    record["backbone"]["unet_sha256"] = "0" * 64
    (tmp_path / "run.json").write_text(json.dumps(record))
    with pytest.raises(UserError, match=r"backbone.unet_sha256: '0000"):
        train(make_config(), str(tmp_path))


def test_diverged_concept_is_dropped_and_the_other_is_unchanged(finished, tmp_path, capfd):
    wild = {"concepts.man.lr_ram": 1e38, "log.every": 2}
    train(make_config(**wild), str(tmp_path))
    written = "".join(capfd.readouterr())
    assert "dropped 'a man': loss, module or optimiser state no longer finite at step" in written
    assert "1 of 2 concepts trained" in written and "lower the learning rates" in written
    ours, theirs = load_adapter(tmp_path / "adapter"), load_adapter(finished / "adapter")
    assert ours.names == ("a woman",) and theirs.names == ("a man", "a woman")
    for role in ("ram", "sam"):
        alone, among = getattr(ours, role)["constant"][0], getattr(theirs, role)["constant"][1]
        np.testing.assert_array_equal(alone, among)
    held = trained.load_adapter(tmp_path)
    assert held.names == ("a woman",)
    lost, kept = read_outcomes(tmp_path)
    assert lost["name"] == "a man" and 0 <= lost["diverged_at"] < STEPS and not lost["adapter"]
    assert kept == {
        "name": "a woman",
        "group": "gender",
        "steps": STEPS,
        "diverged_at": None,
        "adapter": "adapter",
    }
    (_, state) = final_state(tmp_path)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state))
