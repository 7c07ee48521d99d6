"""Commands that are killed at any moment and run again end as if they had not been killed.

`pytest -m slow tests/test_killed.py -s` kills each command at 20 seeded moments that are spread
over its run. By default `test_generation.py` and `test_waves.py` have a few interruptions.
"""

import functools
import json
import os
import pathlib
import random
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from evaluations import constant_adapter

from respodiff_jax.adapters import save_adapter
from respodiff_jax.evaluation import load_results
from respodiff_jax.storage import read_json_lines
from respodiff_jax.training.checkpoint import Checkpoints

ROOT = pathlib.Path(__file__).parents[1]
MODULE = [sys.executable, "-m", "respodiff_jax"]
# The demo with few steps and pictures.
SHORT_DEMO = """
import dataclasses, sys
from respodiff_jax import cli
from respodiff_jax.emoji import demo
whole, load_suite = demo.config, demo.load_suite
def short():
    config = whole()
    config.train.steps, config.train.batch_size = 6, 4
    config.optimizer.warmup_steps, config.rollout.num_steps = 0, 4
    config.checkpoint.every, config.log.every, config.log.grid_every = 2, 1, 0
    return config
def few(name, model):
    found = load_suite(name, model)
    return dataclasses.replace(found, subjects=("doctor", "teacher"), nobody=("a photo of a cat",))
demo.config, demo.load_suite, demo.IMAGES_PER_SUBJECT, demo.NUM_STEPS = short, few, 4, 2
sys.exit(cli.main(["demo", "--out", sys.argv[1]]))
"""


def generate(folder):
    options = ["--images-per-prompt", "6", "--steps", "2", "--batch-size", "8", "--base"]
    prompts = ["--prompt", "a person", "--prompt", "a cook", "--out", str(folder / "out")]
    adapter = ["--adapter", str(folder.parent / "adapter"), "--fair", "gender"]
    return [*MODULE, "generate", *adapter, *prompts, *options]


def evaluate(folder):
    adapter = ["--adapter", str(folder.parent / "adapter"), "--group", "gender"]
    options = ["--images-per-subject", "4", "--steps", "2", "--batch-size", "8"]
    suite = ["--suite", str(folder.parent / "suite.json"), "--out", str(folder / "out")]
    return [*MODULE, "evaluate", "fairness", *adapter, *suite, *options]


def train(folder):
    options = {"train.steps": 8, "rollout.num_steps": 4, "rollout.trajectory_steps": 2}
    options |= {"checkpoint.every": 2, "log.every": 1, "log.grid_every": 4, "log.grid_images": 2}
    options |= {"log.grid_steps": 2}
    overrides = [f"--config.{key}={value}" for key, value in options.items()]
    config = ["--config", str(ROOT / "configs" / "smoke.py"), "--workdir", str(folder / "out")]
    return [*MODULE, "train", *config, *overrides]


def demo(folder):
    return [sys.executable, "-c", SHORT_DEMO, str(folder / "out")]


def contents(folder, *patterns):
    files = {path for pattern in patterns for path in folder.glob(pattern) if path.is_file()}
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def same_results(ours, theirs):
    assert load_results(ours).measurements == load_results(theirs).measurements
    found = contents(ours, "per_image.csv", "*/*/*.png")
    assert len(found) > 8 and found == contents(theirs, "per_image.csv", "*/*/*.png")


def same_run(ours, theirs):
    for get in (
        lambda folder: contents(folder, "adapter/*", "grids/*", "outcomes.jsonl", "run.json"),
        lambda folder: [line["step"] for line in read_json_lines(folder / "metrics.jsonl")],
    ):
        assert get(ours) == get(theirs)
    (step, state), (other_step, other) = (
        Checkpoints(folder, create=False).restore_host() for folder in (ours, theirs)
    )
    assert step == other_step
    jax.tree.map(np.testing.assert_array_equal, state, other)


def same_generated(ours, theirs):
    assert contents(ours, "**/*") == contents(theirs, "**/*")


def same_demo(ours, theirs):
    same_run(ours / "run", theirs / "run")
    same_results(ours / "evaluation", theirs / "evaluation")


def pictures(folder):
    # `os.walk` passes over folders that vanish, such as those of checkpoints under way.
    walk = os.walk(folder / "out")
    return sum(name.endswith(".png") for _, _, names in walk for name in names)


def steps(folder):
    log = folder / "out" / "metrics.jsonl"
    return log.read_text().count("\n") if log.exists() else 0


def demo_steps(folder):
    log = folder / "out" / "run" / "metrics.jsonl"
    return (log.read_text().count("\n") if log.exists() else 0) + pictures(folder)


# command, what counts its progress, the count at its end, and how two folders are compared
COMMANDS = {
    "generate": (generate, pictures, 25, same_generated),
    "evaluate": (evaluate, pictures, 16, same_results),
    "train": (train, steps, 8, same_run),
    "demo": (demo, demo_steps, 30, same_demo),
}


@pytest.fixture(scope="module")
def place(tmp_path_factory, tiny_backbone, suite):
    """A folder with an adapter and a suite, for the folders of all runs."""
    folder = tmp_path_factory.mktemp("killed")
    save_adapter(constant_adapter(tiny_backbone, 3.0), folder / "adapter")
    fields = ("name", "clip", "subjects", "templates", "attributes")
    (folder / "suite.json").write_text(json.dumps({f: getattr(suite, f) for f in fields}))
    return folder


def run_killed(argv, has_come, delay):
    """Runs a command and kills it soon after a moment; returns whether it was still running."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    pipe = subprocess.DEVNULL
    with subprocess.Popen(argv, env=environment, stdout=pipe, stderr=pipe) as process:
        while process.poll() is None and not has_come():
            time.sleep(0.01)
        time.sleep(delay)
        was_running = process.poll() is None
        process.send_signal(signal.SIGKILL)
    return was_running


@pytest.mark.slow
@pytest.mark.parametrize("name", COMMANDS)
def test_killed_command_that_runs_again_ends_like_a_whole_one(place, name, kills=20):
    command, progress, end, compare = COMMANDS[name]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    run = functools.partial(subprocess.run, check=True, env=environment, capture_output=True)
    whole = place / f"{name} {kills} whole"
    run(command(whole))
    rng, killed = random.Random(kills), 0
    for number in range(kills):
        folder = place / f"{name} {kills} {number}"
        # Spread over the whole run; a small part of a step more, as files are written.
        moment = (number + rng.random()) * (end - 1) / kills
        has_come = lambda folder=folder, moment=moment: progress(folder) >= moment  # noqa: E731
        killed += run_killed(command(folder), has_come, rng.uniform(0, 0.2))
        run(command(folder))
        compare(folder / "out", whole / "out")
    assert killed >= 0.8 * kills  # the others had just ended
    print(f"{name}: {killed} of {kills} killed while running, all equal to a whole run")
