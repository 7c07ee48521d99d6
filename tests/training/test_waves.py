"""Concepts in waves: outcomes, kills and restarts."""

import dataclasses
import functools
import json
import pathlib
import random
import shutil
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from respodiff_jax import cli
from respodiff_jax.adapters import load_adapter
from respodiff_jax.backbone import load_backbone
from respodiff_jax.errors import Interrupted, UserError
from respodiff_jax.method.embedding import embed_concepts
from respodiff_jax.method.state import init_state
from respodiff_jax.method.train_step import train_step
from respodiff_jax.training import trained, waves
from respodiff_jax.training.config import concepts_from, load_config
from respodiff_jax.training.outcomes import read_outcomes
from respodiff_jax.training.spec import step_spec
from respodiff_jax.training.waves import plan_runs, train, wave_size

ROOT = pathlib.Path(__file__).parents[2]
CONFIGS = ROOT / "configs"
SMOKE = str(CONFIGS / "smoke.py")
EMOJI_CONCEPTS = str(CONFIGS / "emoji_concepts.jsonl")
OVERRIDES = (
    "--config.rollout.num_steps=4",
    "--config.rollout.trajectory_steps=2",
    "--config.train.steps=4",
    "--config.train.batch_size=1",
    "--config.train.concepts_per_device=1",
    "--config.checkpoint.every=2",
    "--config.log.every=1",
    "--config.log.grid_every=0",
)


def write_concepts(path, count, **of_one):
    """Writes a file of `count` concepts; the second also has the fields `of_one`."""
    rows = [
        {
            "name": f"concept {i}",
            "group": "numbers",
            # Concepts, and waves, differ in their number of neutral prompts.
            "neutral_prompts": ["a person", "someone"][: 1 + (i == 0)],
            "target_prompt": f"the number {i}",
        }
        for i in range(count)
    ]
    rows[1] |= of_one
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def train_command(concepts, workdir, *overrides):
    argv = ["train", "--config", SMOKE, "--concepts", concepts, "--workdir", str(workdir)]
    return [*argv, *OVERRIDES, *overrides]


def modules_of(workdir):
    """Concept name -> (RAM, SAM), each as one vector, from all adapters of a job."""
    found = {}
    for outcome in read_outcomes(workdir):
        if outcome["adapter"] is not None:
            adapter = load_adapter(workdir / outcome["adapter"])
            row = adapter.names.index(outcome["name"])
            found[outcome["name"]] = _vector(adapter.ram, row), _vector(adapter.sam, row)
    return found


def _vector(params, row):
    """All parameters of one concept's module."""
    return np.concatenate([np.ravel(leaf[row]) for leaf in jax.tree.leaves(params)])


@pytest.fixture(scope="module")
def twenty(tmp_path_factory):
    """Twenty concepts, one on each of eight devices: waves of eight, eight and four.

    The second concept diverges.
    """
    folder = tmp_path_factory.mktemp("twenty")
    concepts = write_concepts(folder / "concepts.jsonl", 20, lr_ram=1e38)
    assert cli.main(train_command(concepts, folder / "run")) == 0
    return concepts, folder / "run"


@pytest.mark.parametrize(
    ("concepts", "devices", "per_device", "size"),
    [
        (3, 8, None, 3),
        (64, 8, 8, 64),
        (20, 8, 8, 24),  # one wave, three per device
        (20, 8, None, 24),
        (300, 256, 2, 512),
        (65, 8, 8, 40),  # two waves of about equal size, not 64 and 1
        (20, 8, 1, 8),
        (1000, 256, 2, 512),
        (1000, 256, 8, 1024),
        (5, 1, 2, 2),
        (3, 2, 1, 2),
    ],
)
def test_wave_size_follows_from_concepts_and_devices(concepts, devices, per_device, size):
    assert wave_size(concepts, devices, per_device) == size


def test_each_wave_writes_an_adapter_and_outcomes_list_all_concepts(twenty, capsys):
    _, workdir = twenty
    outcomes = read_outcomes(workdir)
    assert [o["name"] for o in outcomes] == [f"concept {i}" for i in range(20)]
    assert [o["adapter"] for o in outcomes] == [
        None if i == 1 else f"waves/{i // 8:04d}/adapter" for i in range(20)
    ]
    assert outcomes[1]["diverged_at"] is not None and outcomes[0]["steps"] == 4
    adapter = load_adapter(workdir / "waves" / "0002" / "adapter")
    assert adapter.names == tuple(f"concept {i}" for i in range(16, 20))  # without the copies
    assert cli.main(["inspect", str(workdir / "waves" / "0002")]) == 0
    assert "concept 19" in capsys.readouterr().out


def test_finished_waves_can_be_exported_before_the_others_finish(twenty, tmp_path, monkeypatch):
    """The job stops before its second wave."""
    concepts, _ = twenty
    run = waves.train_run

    def first_only(session, wave, *args):
        if wave.label != "wave 1 of 3":
            raise Interrupted("stopped", 0)
        return run(session, wave, *args)

    monkeypatch.setattr(waves, "train_run", first_only)
    assert cli.main(train_command(concepts, tmp_path / "run")) == 75
    export = ["export", str(tmp_path / "run"), "--out", str(tmp_path / "out")]
    assert cli.main(export) == 0
    assert load_adapter(tmp_path / "out").names == tuple(f"concept {i}" for i in (0, *range(2, 8)))


def test_training_whose_concepts_all_diverged_so_far_has_no_adapter(tmp_path):
    outcome = {"name": "a", "group": "g", "steps": 4, "diverged_at": 1, "adapter": None}
    (tmp_path / "outcomes.jsonl").write_text(json.dumps(outcome) + "\n")
    (tmp_path / "waves.json").write_text(json.dumps({"size": 1, "concepts": 2}))
    with pytest.raises(UserError, match="all concepts of the finished waves diverged"):
        trained.load_adapter(tmp_path)


def test_outcomes_are_gathered_again_from_the_waves(twenty, tmp_path):
    """The directory's file is missing, or has outcomes of a deleted wave."""
    concepts, finished = twenty
    shutil.copytree(finished / "waves", tmp_path / "waves")
    planned = plan_runs(finished, load_config(SMOKE, OVERRIDES, concepts), 8)
    moved = [
        dataclasses.replace(wave, folder=tmp_path / "waves" / wave.folder.name) for wave in planned
    ]
    waves.gather_outcomes(tmp_path, moved)
    assert read_outcomes(tmp_path) == read_outcomes(finished)
    shutil.rmtree(tmp_path / "waves" / "0001")
    waves.gather_outcomes(tmp_path, moved[1:2])
    assert [o["name"] for o in read_outcomes(tmp_path)] == [
        f"concept {i}" for i in (*range(8), *range(16, 20))
    ]


def test_concepts_of_several_waves_are_exported_together(twenty, tmp_path, capsys):
    _, workdir = twenty

    def export(*names):
        only = [part for name in names for part in ("--only", name)]
        return cli.main(["export", str(workdir), *only, "--out", str(tmp_path / "out")])

    assert export("concept 17", "concept 3") == 0
    adapter = load_adapter(tmp_path / "out")
    assert adapter.names == ("concept 17", "concept 3")
    assert adapter.training["steps"] == 4  # the same in both waves
    for row, name in enumerate(adapter.names):
        np.testing.assert_array_equal(_vector(adapter.ram, row), modules_of(workdir)[name][0])
    assert export() == 0
    assert len(load_adapter(tmp_path / "out").names) == 19
    capsys.readouterr()
    assert export("concept 1") == 2
    assert "concept 'concept 1' diverged at step" in capsys.readouterr().err
    assert export("concept 99") == 2
    assert "has no concept 'concept 99' yet" in capsys.readouterr().err


def test_waves_start_from_an_adapter_with_one_of_the_concepts(twenty, tmp_path):
    """At a learning rate of 0, one concept keeps the adapter's modules; the others are new."""
    _, workdir = twenty
    out = str(tmp_path / "start")
    assert cli.main(["export", str(workdir), "--only", "concept 2", "--out", out]) == 0
    concepts = write_concepts(tmp_path / "nine.jsonl", 9)
    changes = {"train.steps": 1, "train.init_adapter": out}
    changes |= {f"concept_defaults.lr_{role}": 0.0 for role in ("ram", "sam")}
    overrides = [f"--config.{key}={value}" for key, value in changes.items()]
    assert cli.main(train_command(concepts, tmp_path / "run", *overrides)) == 0
    found, trained = modules_of(tmp_path / "run"), modules_of(workdir)
    assert len(found) == 9 and len(list((tmp_path / "run" / "waves").iterdir())) == 2
    for name, modules in found.items():
        for ours, theirs in zip(modules, trained["concept 2"], strict=True):
            np.testing.assert_array_equal(ours, theirs if name == "concept 2" else 0 * theirs)


def test_single_wave_is_filled_up_to_the_same_number_on_each_device(twenty, tmp_path):
    """Nine concepts on eight devices, two on each, without `waves/`; on other devices, too."""
    concepts, workdir = write_concepts(tmp_path / "nine.jsonl", 9), tmp_path / "run"
    more = ["--config.train.concepts_per_device=2"]
    assert cli.main(train_command(concepts, workdir, *more, "--config.train.steps=2")) == 0
    (planned,) = plan_runs(workdir, load_config(SMOKE, [*OVERRIDES, *more], concepts), 3)
    assert (planned.size, planned.folder) == (16, workdir)
    assert cli.main(train_command(concepts, workdir, *more)) == 0
    assert cli.main(["export", str(workdir), "--out", str(tmp_path / "out")]) == 0
    assert load_adapter(tmp_path / "out").names == tuple(f"concept {i}" for i in range(9))
    trained = modules_of(twenty[1])
    for name, modules in modules_of(workdir).items():
        for ours, theirs in zip(modules, trained.get(name, modules), strict=True):
            # Adam's first steps enlarge rounding errors. Modules of other concepts differ far more.
            assert np.linalg.norm(ours - theirs) < 1e-2 * np.linalg.norm(theirs)


def test_concept_of_a_wave_equals_the_one_trained_alone(twenty, tmp_path):
    concepts, workdir = twenty
    lines = pathlib.Path(concepts).read_text().splitlines()
    found = modules_of(workdir)
    assert len(found) == 19
    for i in (0, 19):
        (tmp_path / f"{i}.jsonl").write_text(lines[i])
        # Eight devices cannot share the lone concept's batch of one sample: use one device.
        config = load_config(SMOKE, OVERRIDES, str(tmp_path / f"{i}.jsonl"))
        with pytest.MonkeyPatch.context() as patch:
            _use_one_device(patch)
            train(config, str(tmp_path / str(i)))
        alone = load_adapter(tmp_path / str(i) / "adapter")
        for ours, theirs in zip(found[f"concept {i}"], (alone.ram, alone.sam), strict=True):
            theirs = _vector(theirs, 0)
            assert np.linalg.norm(theirs) > 0
            assert np.linalg.norm(ours - theirs) < 1e-3 * np.linalg.norm(theirs)


def _use_one_device(patch):
    local = jax.local_devices
    patch.setattr(jax, "local_devices", lambda *args, **kwargs: local(*args, **kwargs)[:1])
    patch.setattr(jax, "device_count", lambda: 1)


def test_finished_waves_are_not_trained_again(twenty, capsys):
    concepts, workdir = twenty
    before = {path: path.stat().st_mtime_ns for path in (workdir / "waves").rglob("*.safetensors")}
    assert cli.main(train_command(concepts, workdir)) == 0
    assert "all 3 waves are done" in capsys.readouterr().out
    assert before == {path: path.stat().st_mtime_ns for path in before}


def test_finished_wave_whose_concepts_get_words_writes_its_adapter_again(twenty, tmp_path):
    concepts, finished = twenty
    workdir = tmp_path / "run"
    shutil.copytree(finished, workdir)
    rows = [json.loads(line) for line in pathlib.Path(concepts).read_text().splitlines()]
    rows[0] |= {"words": ["zero"], "max_timestep": 900}
    (tmp_path / "concepts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    other = workdir / "waves/0002/adapter/adapter_config.json"
    before = other.stat().st_mtime_ns
    assert cli.main(train_command(str(tmp_path / "concepts.jsonl"), workdir)) == 0
    changed = load_adapter(workdir / "waves/0000/adapter").concepts[0]
    assert (changed.words, changed.max_timestep) == (("zero",), 900)
    assert other.stat().st_mtime_ns == before
    for name, modules in modules_of(workdir).items():
        np.testing.assert_array_equal(modules, modules_of(finished)[name])


def test_outcomes_lost_by_a_kill_at_the_end_are_gathered_again(twenty, tmp_path):
    concepts, finished = twenty
    workdir = tmp_path / "run"
    shutil.copytree(finished, workdir)
    kept = [o for o in read_outcomes(finished) if not (o["adapter"] or "").startswith("waves/0002")]
    lines = "".join(json.dumps(outcome) + "\n" for outcome in kept)
    (workdir / "outcomes.jsonl").write_text(lines)
    assert cli.main(train_command(concepts, workdir)) == 0
    assert read_outcomes(workdir) == read_outcomes(finished)


def test_directory_of_other_concepts_is_refused(twenty, tmp_path, capsys):
    _, workdir = twenty
    more = write_concepts(tmp_path / "more.jsonl", 21)
    assert cli.main(train_command(more, workdir)) == 2
    assert "belongs to a training of 20 concepts, the config has 21" in capsys.readouterr().err
    other = write_concepts(tmp_path / "other.jsonl", 20, lambda_sem=3.0)
    assert cli.main(train_command(other, workdir)) == 2
    assert "concept_1.lambda_sem: 0.5 there, 3.0 here" in capsys.readouterr().err


def test_training_keeps_its_waves_on_other_devices(twenty):
    concepts, workdir = twenty
    config = load_config(SMOKE, OVERRIDES, concepts)
    for devices in (1, 8, 512):
        planned = plan_runs(workdir, config, devices)
        assert [len(wave.concepts) for wave in planned] == [8, 8, 4]
        assert [wave.size for wave in planned] == [8, 8, 8]
        assert [len(wave.filled_up) for wave in planned] == [8, 8, 8]


def kill_and_finish(argv, moments):
    """Runs a command once for each moment, with a SIGKILL soon after the moment, then to its end.

    Args:
      argv: arguments of the command.
      moments: functions that say whether their moment has come.
    """
    command = [sys.executable, "-m", "respodiff_jax", *argv]
    seconds = random.Random(0)
    for has_come in moments:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        while process.poll() is None and not has_come():
            time.sleep(0.05)
        time.sleep(seconds.uniform(0, 0.2))
        assert process.poll() is None
        process.send_signal(signal.SIGKILL)
        process.communicate()
    subprocess.run(command, check=True, capture_output=True)


def assert_same_adapters(workdir, other, count):
    """Checks for the same adapter files, to the byte, and the same outcomes."""
    files = sorted(path.relative_to(workdir) for path in workdir.rglob("*.safetensors"))
    assert len(files) == count
    for file in files:
        assert (workdir / file).read_bytes() == (other / file).read_bytes()
    assert read_outcomes(workdir) == read_outcomes(other)


@pytest.mark.slow
@pytest.mark.parametrize("killed", [(1,), (0, 1)])
def test_training_killed_at_random_moments_ends_with_the_same_bytes(twenty, tmp_path, killed):
    """Killed while the waves `killed` train: the second, when one has ended and one has not."""
    concepts, workdir = twenty
    ended = {}

    def wave_trains(number):
        done = tmp_path.glob("run/waves/*/outcomes.jsonl")
        ended.update({path: path.stat().st_mtime_ns for path in done})
        return (tmp_path / "run" / "waves" / f"{number:04d}" / "metrics.jsonl").exists()

    moments = [functools.partial(wave_trains, number) for number in killed]
    kill_and_finish(train_command(concepts, tmp_path / "run"), moments)
    assert 1 <= len(ended) < 3
    for path, moment in ended.items():  # the wave is not trained again
        assert path.stat().st_mtime_ns == moment
    assert_same_adapters(workdir, tmp_path / "run", 3)


EMOJI_CONFIG = str(CONFIGS / "emoji_gender.py")
EMOJI_OVERRIDES = (
    "--config.train.steps=10",
    "--config.train.batch_size=2",
    "--config.optimizer.warmup_steps=0",
    "--config.checkpoint.every=2",
    "--config.log.every=1",
    "--config.log.grid_every=0",
)


def sixty_four_command(workdir):
    """Trains 64 emoji concepts on eight simulated devices, eight on each."""
    argv = ["train", "--config", EMOJI_CONFIG, "--concepts", EMOJI_CONCEPTS]
    return [*argv, "--workdir", str(workdir), *EMOJI_OVERRIDES]


@pytest.fixture(scope="module")
def sixty_four(tmp_path_factory):
    """The directory of 64 concepts that were trained without interruption."""
    workdir = tmp_path_factory.mktemp("sixty_four")
    assert cli.main(sixty_four_command(workdir)) == 0
    return workdir


@pytest.mark.slow
def test_sixty_four_emoji_concepts_killed_at_random_moments_end_with_the_same_bytes(
    sixty_four, tmp_path
):
    def has_logged(step):
        log = tmp_path / "metrics.jsonl"
        return log.exists() and f'"step": {step},' in log.read_text()

    moments = [functools.partial(has_logged, step) for step in (2, 5, 8)]
    kill_and_finish(sixty_four_command(tmp_path), moments)
    assert_same_adapters(sixty_four, tmp_path, 1)


@pytest.mark.slow
def test_sixty_four_emoji_concepts_equal_those_trained_alone(sixty_four):
    """Run with `-s` to see the differences."""
    config = load_config(EMOJI_CONFIG, EMOJI_OVERRIDES, EMOJI_CONCEPTS)
    together = modules_of(sixty_four)
    assert len(together) == 64

    backbone = load_backbone("emoji-world", dtype="float32")
    resolution = backbone.default_resolution
    spec = step_spec(config, backbone, resolution)
    step = jax.jit(functools.partial(train_step, spec))
    worst = 0.0
    for concept in concepts_from(config):
        arrays = embed_concepts(backbone, [concept], resolution)
        state = init_state(spec, arrays, config.seed, config.train.batch_size)
        untrained = state.concepts.ram, state.concepts.sam
        for _ in range(config.train.steps):
            state, _ = step(state, backbone.params, arrays, np.arange(2))
        trained = state.concepts.ram, state.concepts.sam
        for ours, theirs, start in zip(together[concept.name], trained, untrained, strict=True):
            theirs, start = _vector(theirs, 0), _vector(start, 0)
            worst = max(worst, np.linalg.norm(ours - theirs) / np.linalg.norm(theirs - start))
    print(f"largest difference of a module, of what training changed: {worst:.1e}")
    assert worst < 1e-3


@pytest.mark.slow
def test_throughput_grows_with_the_concepts_of_a_wave():
    """Times steps of 1 to 64 concepts on one device, in turns; run with `-s` to see the rates.

    The test compares processor time, which does not include other programs on the machine.
    """
    overrides = ["--config.train.batch_size=1", "--config.module.kind=constant"]
    config = load_config(str(CONFIGS / "emoji_gender.py"), overrides, EMOJI_CONCEPTS)
    concepts = concepts_from(config)
    backbone = load_backbone("emoji-world", dtype="float32")
    spec = step_spec(config, backbone, backbone.default_resolution)
    step = jax.jit(functools.partial(train_step, spec))
    all_arrays = embed_concepts(backbone, concepts, backbone.default_resolution)
    frozen = jax.device_put({"unet": backbone.params["unet"]})
    ids = np.arange(1)
    seconds = {count: [] for count in (1, 2, 4, 8, 16, 32, 64)}
    arrays = {n: jax.tree.map(lambda x, n=n: x[:n], all_arrays) for n in seconds}
    states = {n: init_state(spec, arrays[n], config.seed, 1) for n in seconds}
    for turn in range(8):
        for count, found in seconds.items():
            steps = max(32 // count, 1)
            start = np.array([time.process_time(), time.perf_counter()])
            for _ in range(steps):
                states[count], _ = step(states[count], frozen, arrays[count], ids)
            jax.block_until_ready(states[count])
            if turn:  # the first compiles
                now = np.array([time.process_time(), time.perf_counter()])
                found.append((now - start) / steps)
    rates = {count: count / np.median(found, axis=0) for count, found in seconds.items()}
    print("concepts, concept-steps per second of processor time, and by the clock:")
    for count, (processor, clock) in rates.items():
        print(f"{count:4d} {processor:8.1f} {clock:8.1f}")
    rates = {count: processor for count, (processor, _) in rates.items()}
    assert rates[1] < rates[4] < rates[16] and rates[64] > 0.8 * rates[16]
