"""The command line: what it calls, what it writes, and how it reports mistakes."""

import errno
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys

import pytest
from test_adapters import VIOLENCE, make_adapter

from respodiff_jax import cli
from respodiff_jax.adapters import load_adapter, save_adapter
from respodiff_jax.backbone import random_backbone
from respodiff_jax.cli import inputs
from respodiff_jax.errors import Interrupted, UserError
from respodiff_jax.training import distributed, trained, waves

ROOT = pathlib.Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def no_compilation_cache(monkeypatch):
    monkeypatch.setattr(distributed, "enable_compilation_cache", lambda: None)


@pytest.fixture(scope="module")
def adapter_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapter")
    identity = random_backbone("tiny", abstract=True).identity
    save_adapter(make_adapter(shape=(4, 4, 64), **identity, resolution=16), folder)
    return str(folder)


def fails(capsys, *argv):
    """Runs a command, which must exit with status 2, and returns its message."""
    assert cli.main([str(arg) for arg in argv]) == 2
    error = capsys.readouterr().err
    assert error.startswith("respodiff: error: ")
    assert "Traceback" not in error
    return error


def test_help_imports_no_jax():
    script = (
        "import sys\n"
        "from respodiff_jax import cli\n"
        "try:\n"
        "    cli.main(['generate', '--help'])\n"
        "finally:\n"
        "    assert not {'jax', 'flax', 'diffusers', 'numpy'} & set(sys.modules)\n"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "--fair GROUP" in result.stdout


def test_version_is_printed(capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["--version"])
    assert stop.value.code == 0
    assert re.fullmatch(r"respodiff \d+\.\d+\.\d+\n", capsys.readouterr().out)


@pytest.mark.parametrize("special", ["pipe", "device", "folder"])
@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_only_regular_files_are_read(adapter_folder, tmp_path, capsys, special, name):
    """A pipe would never end, and a link to a device would fill the memory."""
    folder = shutil.copytree(adapter_folder, tmp_path / "adapter")
    (folder / name).unlink()
    if special == "pipe":
        os.mkfifo(folder / name)
    elif special == "device":
        (folder / name).symlink_to("/dev/zero")
    else:
        (folder / name).mkdir()
    assert cli.main(["inspect", str(folder)]) == 2
    message = capsys.readouterr().err
    assert name in message and ("expected a file" in message or "has no" in message)


def test_export_does_not_overwrite_other_files(adapter_folder, tmp_path, capsys):
    (tmp_path / "README.md").write_text("mine")
    argv = ["export", adapter_folder, "--out", str(tmp_path)]
    assert cli.main(argv) == 2
    assert "has other files and no adapter" in capsys.readouterr().err
    assert [f.name for f in tmp_path.iterdir()] == ["README.md"]
    assert (tmp_path / "README.md").read_text() == "mine"
    assert cli.main([*argv, "--overwrite"]) == 0
    assert cli.main(argv) == 0  # it is an adapter now
    assert cli.main([*argv[:-1], str(tmp_path / "new")]) == 0


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["train", "--config", "nope.py", "--workdir", "run"], "--config nope.py: no such file"),
        (["inspect", "nope"], "adapter 'nope': no such folder, and not a hub id"),
        (
            ["import", "nope.pth", "--concepts", "ids.json", "--out", "out"],
            "checkpoint nope.pth: no such file",
        ),
        (["export", "a/b/c", "--out", "out"], "adapter 'a/b/c': no such folder"),
        (
            ["generate", "--adapter", "nope", "--fair", "g", "--prompt", "a", "--out", "out"],
            "adapter 'nope': no such folder",
        ),
    ],
)
def test_absent_files_are_reported_before_jax_is_imported(argv, message, tmp_path):
    code = "import sys; from respodiff_jax import cli; "
    code += f"status = cli.main({argv}); print('jax' in sys.modules, status)"
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    options = {"cwd": tmp_path, "env": environment, "capture_output": True, "text": True}
    done = subprocess.run([sys.executable, "-c", code], check=True, **options)
    assert done.stdout == "False 2\n" and message in done.stderr
    assert not list(tmp_path.iterdir())


def test_empty_path_is_refused(capsys):
    argv = ["train", "--config", str(ROOT / "configs/smoke.py"), "--workdir", ""]
    assert cli.main(argv) == 2
    assert "a path is empty, expected the name of a folder" in capsys.readouterr().err


@pytest.mark.slow
def test_second_process_finds_compiled_programs_in_the_cache(tmp_path):
    """Without an option, the cache is a folder in the user's cache."""
    script = (
        "import jax, sys\n"
        "from respodiff_jax import cli\n"
        "events = []\n"
        "jax.monitoring.register_event_listener(lambda event, **_: events.append(event))\n"
        "assert cli.main(sys.argv[1:]) == 0\n"
        "print('hits:', events.count('/jax/compilation_cache/cache_hits'))\n"
    )
    argv = ["generate", "--model", "random/tiny", "--prompt", "a person", "--steps", "1", "--out"]
    # As for users, whose programs compile for longer than those of `conftest.py`.
    ours = ("JAX_COMPILATION_CACHE_DIR", "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "XLA_FLAGS")
    env = {name: value for name, value in os.environ.items() if name not in ours}
    env |= {"XDG_CACHE_HOME": str(tmp_path / "cache")}
    first, second = (
        subprocess.run(
            [sys.executable, "-c", script, *argv, str(tmp_path / out)],
            env=env,
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for out in ("first", "second")
    )
    assert "hits: 0" in first
    assert "hits: 0" not in second
    assert (tmp_path / "first" / "grid.png").read_bytes() == (
        tmp_path / "second" / "grid.png"
    ).read_bytes()


@pytest.mark.parametrize("verb", cli._VERBS)
def test_each_verb_has_help_with_examples(verb, capsys):
    with pytest.raises(SystemExit, match="0"):
        cli.main([verb, "--help"])
    assert capsys.readouterr().out.count(f"respodiff {verb}") >= 2  # usage, and an example


def test_command_alone_says_what_to_do_first(capsys):
    assert cli.main([]) == 0
    assert "A first look, without a download:\n\n  respodiff play\n" in capsys.readouterr().out


def test_unknown_option_is_answered_with_the_nearest(capsys):
    with pytest.raises(SystemExit, match="2"):
        cli.main(["generate", "--out", "o", "--pormpt", "a cook"])
    told = capsys.readouterr().err
    assert "unrecognized arguments: --pormpt a cook; did you mean '--prompt'?" in told


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "No space left on device; what was"),
        (OSError(errno.EROFS, "Read-only file system", "/x"), "Read-only file system (/x); what"),
        (ValueError("RESOURCE_EXHAUSTED: ...: No space left on device [28]"), "No space left on"),
    ],
)
def test_failure_of_the_machine_is_one_line(error, message, monkeypatch, capsys, tmp_path):
    def fail(model):
        raise error

    monkeypatch.setattr("respodiff_jax.evaluate", fail)
    argv = ["evaluate", "fairness", "--model", "emoji-world", "--out", str(tmp_path / "out")]
    assert cli.main(argv) == 1
    told = capsys.readouterr().err
    assert told.startswith(f"respodiff: error: {message}") and told.count("\n") == 1
    assert "run the same command again" in told


def test_python_m_runs_the_command():
    result = subprocess.run(
        [sys.executable, "-m", "respodiff_jax", "fly"], capture_output=True, text=True
    )
    assert result.returncode == 2
    assert "invalid choice: 'fly'" in result.stderr


def test_generate_writes_a_folder_from_adapters_and_prompts(adapter_folder, tmp_path, capsys):
    (tmp_path / "prompts.csv").write_text('id,prompt\n1,"a person, smiling"\n2,\n3,a man\n')
    identity = random_backbone("tiny", abstract=True).identity
    safety = make_adapter("mlp", (VIOLENCE,), shape=(4, 4, 64), **identity, resolution=16)
    save_adapter(safety, tmp_path / "safety")
    argv = ["generate", "--adapter", adapter_folder, "--out", str(tmp_path / "out")]
    argv += ["--adapter", str(tmp_path / "safety"), "--safe"]
    argv += ["--prompt", "a boat", "--prompts-file", str(tmp_path / "prompts.csv")]
    argv += ["--images-per-prompt", "2", "--fair", "gender", "--ratio", "a woman=0.5,a man=0.5"]
    argv += ["--base", "--seed", "9", "--steps", "1", "--guidance", "3", "--batch-size", "8"]
    argv += ["--sampler", "dpm++"]
    assert cli.main(argv) == 0
    assert "12 images" in capsys.readouterr().out
    lines = (tmp_path / "out" / "manifest.jsonl").read_text().splitlines()
    lines = [json.loads(line) for line in lines]
    adapted = [line for line in lines if line["file"].startswith("images/")]
    assert len(lines) == 12 and len(adapted) == 6
    assert [line["seed"] for line in adapted] == [9, 10, 11, 12, 13, 14]
    prompts = ["a boat", "a person, smiling", "a man"]
    assert [line["prompt"] for line in adapted[::2]] == prompts
    for line in adapted:
        assert line["guidance_scale"] == 3.0 and line["num_steps"] == 1
        assert line["sampler"] == "dpm++"
        assert line["model"]["name"] == "random/tiny"
        assert line["adapter"] == [adapter_folder, str(tmp_path / "safety")]
        assert line["concepts"]["anti-violence"] == 1
    for first, second in zip(adapted[::2], adapted[1::2], strict=True):
        assert {*first["concepts"], *second["concepts"]} == {"a woman", "a man", "anti-violence"}
    for file in ("images/00005.png", "base/00005.png", "grid.png"):
        assert (tmp_path / "out" / file).stat().st_size > 0

    assert cli.main(argv) == 0
    assert "all 12 images are there already: nothing left to draw" in capsys.readouterr().out
    message = fails(capsys, *argv, "--seed", 10)
    assert "another command, which differs in seed;" in message and "--overwrite" in message


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "no prompts"),
        (["--prompt", "a"], "no model: give --model"),
        (["--prompt", "a", "--prompts-file", "nowhere.txt"], "nowhere.txt cannot be read"),
        (["--prompt", "a", "--images-per-prompt", "0"], "--images-per-prompt is 0"),
        (["--prompt", "a", "--seed", "-1"], "--seed is -1"),
        (["--prompt", "a", "--model", "m", "--base"], "--base compares with an adapter"),
        (["--prompt", "a", "--model", "m", "--concept", "x"], "--concept given but no adapter"),
        (["--prompt", "a", "--model", "m", "--batch-size", "3"], "multiple of the 8 devices"),
        (["--prompt", "a", "--model", "m", "--steps", "0"], "sampling steps is 0"),
        (["--prompt", "a", "--adapter", "nowhere"], "adapter 'nowhere': no such folder"),
        (["--prompt", "a", "--adapter", "ADAPTER"], "none of its concepts is chosen"),
        (["--prompt", "a", "--adapter", "ADAPTER", "--concept", "a cat=1"], "a woman, a man"),
        (["--prompt", "a", "--adapter", "ADAPTER", "--concept", "=1"], "'=1' is not NAME=NUMBER"),
        (
            ["--prompt", "a", "--adapter", "ADAPTER", "--fair", "gender", "--ratio", "a man"],
            "--ratio: 'a man' is not NAME=NUMBER",
        ),
        (
            ["--prompt", "a", "--adapter", "ADAPTER", "--adapter", "ADAPTER", "--concept", "a man"],
            "is given twice; give each adapter once",
        ),
        (
            ["--prompt", "a", "--adapter", "ADAPTER", "--concept", "a woman=strong"],
            "concept 'a woman': scale is 'strong', expected a number",
        ),
        (
            ["--prompt", "a", "--adapter", "ADAPTER", "--concept", "woman"],
            "concept 'woman' is not in the adapter; did you mean 'a woman'?",
        ),
        (
            ["--prompt", "a", "--adapter", "ADAPTER", "--fair", "gendre"],
            "no group 'gendre'; did you mean 'gender'? The adapter has gender: a woman, a man",
        ),
        (
            ["--prompt", "a", "--model", "random/tiny", "--images-per-prompt", "100000000"],
            "at most",
        ),
    ],
)
def test_generate_reports_mistakes_before_loading_a_model(
    arguments, message, adapter_folder, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr("respodiff_jax.backbone.load_backbone", pytest.fail)
    arguments = [adapter_folder if arg == "ADAPTER" else arg for arg in arguments]
    assert message in fails(capsys, "generate", "--out", tmp_path / "out", *arguments)
    assert not (tmp_path / "out").exists()


def test_generate_refuses_a_resolution_that_does_not_fit_the_adapter(
    adapter_folder, tmp_path, capsys
):
    argv = ["generate", "--adapter", adapter_folder, "--prompt", "a", "--concept", "a man"]
    assert "resolution is 0" in fails(capsys, *argv, "--resolution", 0, "--out", tmp_path / "out")
    message = fails(capsys, *argv, "--resolution", 32, "--out", tmp_path / "out")
    assert "(4, 4, 64)" in message and "(8, 8, 64); generate at resolution 16" in message


def test_long_prompts_are_shortened_in_warnings(tiny_backbone):
    prompt = "a person and " * 200
    with pytest.warns(UserWarning, match="tokens, the text encoder reads") as told:
        tiny_backbone.tokenise([prompt])
    assert len(str(told[0].message)) < 400


def test_folder_of_a_training_that_has_not_ended_says_so(tmp_path, capsys):
    message = fails(capsys, "inspect", tmp_path)
    assert (
        "it has no adapter_config.json" in message and "writes its adapter when it ends" in message
    )


def test_unreachable_hub_is_told_shortly(capsys, monkeypatch):
    long = "(MaxRetryError('HTTPSConnectionPool(host=...): Max retries exceeded " + "x" * 900

    def unreachable(*args, **options):
        raise OSError(long)

    monkeypatch.setattr("huggingface_hub.snapshot_download", unreachable)
    message = fails(capsys, "inspect", "owner/name")
    assert "cannot be fetched from the hub: (MaxRetryError" in message and len(message) < 400


def test_train_passes_config_overrides_and_hosts(monkeypatch):
    calls = []

    def record(name):
        return lambda *args, **kwargs: calls.append((name, args, kwargs)) or name

    monkeypatch.setattr(inputs, "check_file", lambda option, path: None)
    monkeypatch.setattr("respodiff_jax.training.config.load_config", record("config"))
    monkeypatch.setattr("respodiff_jax.training.waves.run_training", record("train"))
    monkeypatch.setattr(distributed, "initialize", record("hosts"))
    argv = ["train", "--config", "c.py", "--config.train.steps=3", "--workdir", "w", "--profile"]
    argv += ["--coordinator", "host0:1", "--num-processes", "2", "--process-id", "1"]
    assert cli.main([*argv, "--config.seed=1"]) == 0
    assert calls == [
        ("config", ("c.py", ["--config.train.steps=3", "--config.seed=1"]), {"concepts": None}),
        ("hosts", ("host0:1", 2, 1, False), {}),
        ("train", ("config", "w"), {"profile": True}),
    ]


@pytest.mark.parametrize(
    "arguments",
    [
        ["train", "--config", "c.py", "--workdir", "w", "--steps=3"],
        ["train", "--config", "c.py", "--workdir", "w", "--config.train.steps", "3"],
        ["export", "run", "--out", "a", "--config.train.steps=3"],
        ["train", "--config", "c.py"],
    ],
)
def test_unknown_and_missing_options_are_refused(arguments, capsys):
    with pytest.raises(SystemExit, match="2"):
        cli.main(arguments)
    error = capsys.readouterr().err
    assert error.startswith(f"respodiff {arguments[0]}: error: ") and error.count("\n") == 1
    assert f"see respodiff {arguments[0]} --help" in error
    assert "unrecognized arguments" in error or "required: --workdir" in error


def test_export_writes_the_adapter_of_a_run(tmp_path, monkeypatch, capsys):
    adapter = make_adapter("conv")
    calls = []

    def load(*args):
        calls.append(args)
        return adapter

    monkeypatch.setattr(trained, "load_adapter", load)
    (tmp_path / "run.json").write_text("{}")
    run = str(tmp_path)
    assert cli.main(["export", run, "--out", str(tmp_path / "out"), "--step", "5"]) == 0
    assert calls == [(run, 5, [])]
    assert load_adapter(tmp_path / "out").names == adapter.names
    assert "conv adapter of a woman, a man" in capsys.readouterr().out
    (tmp_path / "file").write_text("")
    assert "cannot be written" in fails(capsys, "export", run, "--out", tmp_path / "file" / "x")


@pytest.mark.parametrize(
    "command",
    [
        ["demo", "--out", "gs://b/x"],
        ["compare", "one", "two", "--out", "gs://b/x"],
        ["push", "gs://b/x", "owner/name"],
    ],
)
def test_buckets_are_refused_by_verbs_that_need_local_paths(command, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(os, "environ", os.environ.copy())
    assert "gs://b/x is on Google Cloud Storage" in fails(capsys, *command)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("error", "status", "told"),
    [
        (KeyboardInterrupt(), 130, "interrupted"),
        (UserError("all diverged"), 2, "error: all diverged"),
        (Interrupted("stopped at step 3", 3), 75, "stopped at step 3; run the same command"),
    ],
)
def test_exit_status_says_how_the_command_ended(error, status, told, tmp_path, monkeypatch, capsys):
    def ended(*args):
        raise error

    monkeypatch.setattr(trained, "load_adapter", ended)
    (tmp_path / "run.json").write_text("{}")
    assert cli.main(["export", str(tmp_path), "--out", "a"]) == status
    assert told in capsys.readouterr().err


def test_cores_are_used_before_adapters_start_jax(tmp_path, monkeypatch):
    chosen = []
    monkeypatch.setattr(distributed, "use_cores", lambda *given: chosen.append(given))
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "run.json").write_text('{"backbone": {"name": "emoji-world"}}')
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / "adapter_config.json").write_text('{"backbone": 3}')
    for argv in (
        ["generate", "--adapter", "run", "--batch-size", "4", "--prompt", "a cook", "--out", "o"],
        ["evaluate", "fairness", "--adapter", "run", "--model", "another", "--out", "o"],
        ["generate", "--adapter", "damaged", "--prompt", "a cook", "--out", "o"],
    ):
        monkeypatch.chdir(tmp_path)
        assert cli.main(argv) == 2
    assert chosen == [("emoji-world", 4), ("another", None), (None, None)]
    monkeypatch.setattr(waves, "run_training", lambda *args, **given: None)
    train = ["train", "--config", str(ROOT / "configs/emoji_gender.py"), "--workdir", "w"]
    assert cli.main(train) == 0
    assert chosen[3:] == [("emoji-world", 8)]
