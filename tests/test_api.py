"""The public API: `import respodiff_jax as rd`."""

import inspect
import os
import pathlib
import re
import subprocess
import sys
from functools import partial

import numpy as np
import pytest

import respodiff_jax as rd
from respodiff_jax import cli
from respodiff_jax.data import contrast
from respodiff_jax.method import objective

ROOT = pathlib.Path(__file__).parents[1]
FLAGS = os.environ["XLA_FLAGS"].replace("device_count=8", "device_count=1")
ONE_DEVICE = {"XLA_FLAGS": FLAGS, "PYTHONPATH": str(ROOT)}


def test_importing_the_package_is_fast_and_loads_no_jax():
    code = (
        "import sys, time; start = time.perf_counter(); import respodiff_jax;"
        "print(time.perf_counter() - start); loaded = set(sys.modules);"
        "print(sorted(loaded & {'jax', 'numpy', 'flax', 'ml_collections'}))"
    )
    out = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    seconds, loaded = out.stdout.splitlines()
    assert float(seconds) < 0.1
    assert loaded == "[]"


def test_public_names_are_few_and_documented():
    assert len(rd.__all__) <= 16
    assert set(rd.__all__) <= set(dir(rd))
    for name in rd.__all__:
        assert inspect.getdoc(getattr(rd, name)), name
    for name in rd.method.__all__:
        found = getattr(rd.method, name)
        if callable(found):
            assert inspect.getdoc(found), name
    assert (ROOT / "respodiff_jax" / "py.typed").exists()
    with pytest.raises(AttributeError, match="no attribute 'trian'"):
        rd.trian  # noqa: B018


def test_config_takes_options_by_section_as_the_command_line_does():
    config = rd.load_config(ROOT / "configs/smoke.py", train={"steps": 7}, seed=3)
    same = rd.load_config(ROOT / "configs/smoke.py", ["--config.train.steps=7", "--config.seed=3"])
    assert config.to_dict() == same.to_dict()
    for wrong in ({"train": {"stepz": 7}}, {"trian": {"steps": 7}}, {"train": {"steps": "many"}}):
        with pytest.raises(rd.UserError, match=r"smoke\.py"):
            rd.load_config(ROOT / "configs/smoke.py", **wrong)
    with pytest.raises(rd.UserError, match=r"are not --config\.SECTION\.OPTION=VALUE"):
        rd.load_config(ROOT / "configs/smoke.py", ["train.steps=7"])


def test_config_names_the_options_that_a_section_has():
    smoke = ROOT / "configs/smoke.py"
    with pytest.raises(rd.UserError, match=r"config\.train has no 'stepz'; it has batch_size, "):
        rd.load_config(smoke, train={"stepz": 7})
    with pytest.raises(rd.UserError, match=r"config\.train is 7, expected a mapping"):
        rd.load_config(smoke, train=7)


def test_a_path_instead_of_what_was_loaded_from_it_is_refused(tmp_path):
    path, out = str(ROOT / "configs/smoke.py"), tmp_path / "out"
    with pytest.raises(rd.UserError, match=r"`config` is .* as from `load_config`"):
        rd.train(path, out)
    model = r"`model` is 'emoji-world', expected a model as from `load_model`"
    with pytest.raises(rd.UserError, match=model):
        rd.generate("emoji-world", "a doctor")
    with pytest.raises(rd.UserError, match=model):
        rd.generate_folder(lambda: "emoji-world", "a doctor", out)
    for given in ("emoji-world", lambda: "emoji-world"):
        for suite in (None, "winobias"):
            with pytest.raises(rd.UserError, match=model):
                rd.evaluate(given, out=out, part="fairness", suite=suite)
    with pytest.raises(rd.UserError, match=r"`adapter` is 'adapter', .* as from `load_adapter`"):
        rd.export("adapter", out)
    assert not list(tmp_path.rglob("*.*"))


def block_of(page, first_line):
    text = (ROOT / page).read_text(encoding="utf-8")
    blocks = re.findall(r"^```python\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    (block,) = (block for block in blocks if block.startswith(first_line))
    return block


def run(code, folder, **environment):
    """Runs code on one CPU device in an empty folder beside configs/."""
    (folder / "configs").symlink_to(ROOT / "configs")
    environment = os.environ | ONE_DEVICE | environment
    subprocess.run([sys.executable, "-c", code], check=True, cwd=folder, env=environment)


def test_readme_script_trains_draws_and_evaluates_on_emoji_world(tmp_path):
    code = block_of("README.md", "import respodiff_jax as rd\n")
    assert len(code.splitlines()) <= 15
    small = code.replace('"steps": 400', '"steps": 2, "batch_size": 1')
    small = small.replace("images_per_prompt=8", "images_per_prompt=2, num_steps=1")
    small = small.replace('part="fairness"', 'part="fairness", max_prompts=2, num_steps=1')
    assert small.count("num_steps=1") == 2 and '"steps": 2' in small
    small = small.replace(
        '"batch_size": 1}',
        '"batch_size": 1}, optimizer={"warmup_steps": 0},\n'
        f"    reading={ {'things': contrast.THINGS[:20], 'people': contrast.PEOPLE[:20]} }",
    )
    run(small, tmp_path)
    assert (tmp_path / "cook.png").stat().st_size > 0
    assert (tmp_path / "evaluations" / "gender" / "report.html").exists()
    assert rd.load_adapter(tmp_path / "adapters" / "gender").names == ("a man", "a woman")


def test_hand_written_loop_gives_the_commands_adapter_bit_for_bit(tmp_path):
    code = block_of("docs/train.md", "from functools import partial\n")
    assert len(code.splitlines()) <= 20
    options = {"steps": 3, "batch_size": 2}
    loop = code.replace('"configs/smoke.py"', f'"configs/smoke.py", train={options}')
    assert str(options) in loop
    command = """
from respodiff_jax import cli
argv = ["train", "--config", "configs/smoke.py", "--workdir", "run", "--config.log.grid_every=0"]
assert cli.main([*argv, "--config.train.steps=3", "--config.train.batch_size=2"]) == 0
"""
    # Without a short compilation's other flag, which changes the last bits.
    flags = "--xla_force_host_platform_device_count=1 --xla_backend_optimization_level=0"
    run(loop + command, tmp_path, XLA_FLAGS=flags)
    ours, theirs = (rd.load_adapter(tmp_path / path) for path in ("adapters/mine", "run/adapter"))
    assert ours.names == theirs.names
    for role in ("ram", "sam"):
        by_hand, by_command = (getattr(adapter, role)["constant"] for adapter in (ours, theirs))
        assert by_hand.any()
        np.testing.assert_array_equal(by_hand, by_command)


def test_intermediate_values_are_those_of_the_step(tiny_backbone):
    import jax
    import jax.numpy as jnp

    config = rd.load_config(ROOT / "configs/smoke.py", train={"batch_size": 2})
    spec = rd.step_spec(config, tiny_backbone)
    concepts = rd.method.embed_concepts(tiny_backbone, [*rd.method.GENDER.values()])
    state = rd.method.init_state(spec, concepts, seed=0, batch_size=2)
    args = (state, tiny_backbone.params, concepts, jnp.arange(2))
    values = jax.jit(partial(rd.method.step_values, spec))(*args)
    _, metrics = jax.jit(partial(rd.method.train_step, spec))(*args)
    np.testing.assert_allclose(values.loss_resp, metrics.loss_resp, rtol=1e-5)
    np.testing.assert_allclose(values.loss_sem, metrics.loss_sem, rtol=1e-5)
    norm = np.linalg.norm(np.asarray(values.grad_ram["constant"]).reshape(2, -1), axis=1)
    np.testing.assert_allclose(norm, metrics.grad_norm_ram, rtol=1e-4)
    scale = np.reshape(concepts.guidance_scale, (2, 1, 1, 1, 1))
    target = values.eps_empty + scale * (values.eps_own - values.eps_empty)
    np.testing.assert_allclose(values.eps_target, target, rtol=1e-5, atol=1e-5)
    losses = np.mean((values.eps_ram - values.eps_target) ** 2, axis=(1, 2, 3, 4))
    np.testing.assert_allclose(losses, metrics.loss_resp, rtol=1e-5)


def test_fault_inside_the_numerics_is_never_reported_as_a_users_mistake(
    tmp_path, monkeypatch, capsys
):
    """The ValueError of a step leaves the command line, so Python prints it, with status 1."""

    def wrong_shapes(eps_ram, eps_target):
        raise ValueError("operands could not be broadcast together")

    monkeypatch.setattr(objective, "responsible_loss", wrong_shapes)
    argv = ["train", "--config", str(ROOT / "configs/smoke.py"), "--workdir", str(tmp_path / "run")]
    with pytest.raises(ValueError, match="could not be broadcast") as found:
        cli.main([*argv, "--config.log.grid_every=0"])
    assert not isinstance(found.value, rd.UserError)
    assert "respodiff: error" not in capsys.readouterr().err
