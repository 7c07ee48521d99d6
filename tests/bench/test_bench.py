"""`respodiff bench`: its counts, its output, and its PyTorch side."""

import ast
import contextlib
import dataclasses
import json
import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, UNet2DConditionModel
from test_train_step import MAN, VIOLENCE, WOMAN, setup

from respodiff_jax import cli
from respodiff_jax.adapters import load_adapter
from respodiff_jax.backbone import load_backbone
from respodiff_jax.bench import (
    benchmark,
    generate,
    measure,
    model,
    published,
    report,
    torch_side,
    train,
)
from respodiff_jax.bench.measure import Spread
from respodiff_jax.bench.report import Report, Side
from respodiff_jax.errors import UserError
from respodiff_jax.method.train_step import train_step

CONFIG = str(pathlib.Path(__file__).parents[2] / "configs" / "smoke.py")
SMALL = [
    f"--config={CONFIG}",
    "--config.train.batch_size=8",
    "--config.rollout.num_steps=4",
    "--config.log.grid_steps=2",
]


@pytest.fixture(autouse=True)
def short_repetitions(monkeypatch):
    monkeypatch.setattr(measure, "SECONDS", 0.0)


def fails(capsys, *argv):
    """The error message of a command line that exits with status 2."""
    assert cli.main(["bench", *map(str, argv)]) == 2
    return capsys.readouterr().err


def test_flops_are_counted_in_the_program_as_written():
    a, b = jnp.zeros((8, 32)), jax.ShapeDtypeStruct((32, 4), jnp.float32)
    assert measure.flops(jnp.matmul, a, b) == 2 * 8 * 32 * 4

    def looped(a):
        return jax.lax.fori_loop(0, 7, lambda _, x: x @ x, a)

    once = measure.flops(looped, jnp.zeros((64, 64)))
    assert once == pytest.approx(2 * 64**3, rel=0.01)  # a loop's body counts once


def test_sides_alternate_and_ratios_are_of_neighbours(monkeypatch):
    monkeypatch.setattr(measure, "SECONDS", 1.0)
    calls, clock = [], [0.0]
    monkeypatch.setattr(measure.time, "perf_counter", lambda: clock[0])

    def side(name, seconds):
        def run(count):
            calls.append((name, count))
            clock[0] += count * seconds

        return run

    sides = {"a": side("a", 0.25), "b": side("b", 2.0)}
    rates = measure.take_turns(sides, repeats=3)
    assert calls == [("a", 1)] * 2 + [("b", 1)] * 2 + [("a", 4), ("b", 1)] * 3
    assert rates["a"].values == (4.0,) * 3 and rates["b"].values == (0.5,) * 3
    ratio = Spread((6.0, 8.0, 9.0)) / Spread((2.0, 2.0, 9.0))
    assert ratio.values == (3.0, 4.0, 1.0) and ratio.median == 3.0
    assert (ratio * 2).to_dict() == {"median": 6.0, "min": 2.0, "max": 8.0, "values": [6, 8, 2]}


def count(backbone, concepts, **changes):
    spec, arrays, state, _ = setup(backbone, concepts, **changes)
    frozen = {"unet": backbone.params["unet"]}
    return train.evaluations_per_sample(spec, state, frozen, arrays, batch_size=2)


def test_prompts_that_share_an_encoder_cost_less_than_two_evaluations(tiny_backbone):
    def flops(backbone, prompts):
        resolution = backbone.default_resolution
        latents = jax.ShapeDtypeStruct((1, *backbone.latent_shape(resolution)), jnp.float32)
        prompt = jax.tree.map(lambda x: x[0], backbone.encode_prompts([""], resolution))
        return model.forward_flops(backbone, backbone.params, latents, prompt, prompts)

    # Each program sums the weights of its upsampling once.
    assert flops(tiny_backbone, 2) == pytest.approx(2 * flops(tiny_backbone, 1), rel=0.01)
    emoji = load_backbone("emoji-world", dtype="float32")  # its encoder reads no prompt
    assert 1.5 < flops(emoji, 2) / flops(emoji, 1) < 1.9


@pytest.mark.slow
def test_faithful_samples_cost_the_mean_rollout_more(tiny_backbone):
    streaming = count(tiny_backbone, [WOMAN, MAN], **{"rollout.kind": "streaming"})
    # k is 0 .. num_steps - 2; each step is a guided prediction of two evaluations.
    for num_steps in (6, 50):
        faithful = count(tiny_backbone, [WOMAN], **{"rollout.num_steps": num_steps})
        assert faithful == pytest.approx(streaming + num_steps - 2, rel=0.01)
    # Safety needs the same number of predictions, for its target and for the trajectories.
    for concepts in ([WOMAN, VIOLENCE], [VIOLENCE]):
        with_safety = count(tiny_backbone, concepts, **{"rollout.kind": "streaming"})
        assert with_safety == pytest.approx(streaming, rel=1e-3)


def test_step_pairs_have_the_mean_rollout_length(tiny_backbone):
    spec, arrays, state, _ = setup(tiny_backbone, [WOMAN])

    @jax.jit  # drops everything that does not determine the length
    def length(step):
        now = state.replace(step=step)
        _, metrics = train_step(spec, now, tiny_backbone.params, arrays, jnp.arange(2))
        return metrics.ddim_index[0]

    starts = train._balanced_steps(seed=3, longest=4)
    assert len(starts) > 10
    pairs = [(int(length(start)), int(length(start + 1))) for start in starts[:6]]
    assert {sum(pair) for pair in pairs} == {4}
    assert len(set(pairs)) > 1


def meta_training(kind="constant", num_steps=50, batch_size=1):
    """The published procedure on SD 1.4's UNet, without allocating it."""
    with torch.device("meta"):
        unet = UNet2DConditionModel(cross_attention_dim=768, sample_size=64)
        prompt = torch_side.Conditions(torch.zeros(1, 77, 768))
    scheduler = DDIMScheduler(prediction_type="epsilon", clip_sample=False)
    scheduler.set_timesteps(num_steps)
    params = {"constant": np.zeros((8, 8, 1280), np.float32)}
    ram, sam = (torch_side.TorchModule(kind, params).to("meta") for _ in range(2))
    procedure = torch_side.Procedure(
        unet, scheduler, ram, sam, lr_ram=1e-2, lr_sam=1e-3, lambda_sem=0.5, guidance_scale=4.0
    )
    prompts = torch_side.Prompts(*[prompt] * 4)
    return torch_side.Training([(procedure, prompts)], (4, 64, 64), batch_size, seed=0)


@pytest.mark.slow
def test_published_procedure_takes_59_evaluations_on_sd14(capsys):
    evaluations = meta_training().evaluations_per_sample()
    with capsys.disabled():
        print(f"\n{evaluations:.2f} UNet evaluations per training sample, published procedure")
    # 48 for the rollout, 8 for the losses' predictions, the rest for two backward passes.
    assert 58 < evaluations < 61


def test_train_without_torch_on_streaming_rollouts(capsys, monkeypatch):
    """Without the empty cache: the step is that of `test_training.py`."""
    monkeypatch.setattr(measure, "_empty_compilation_cache", contextlib.nullcontext)
    argv = ["bench", "train", *SMALL, "--repeats", "1", "--config.rollout.trajectory_steps=2"]
    assert cli.main(argv) == 0
    printed = capsys.readouterr().out
    assert "| JAX, streaming" in printed and "PyTorch" not in printed


@pytest.mark.slow
def test_train_against_torch(tmp_path, capsys):
    out = tmp_path / "train.json"
    argv = ["bench", "train", *SMALL, "--repeats", "2", "--against", "torch", "--out", str(out)]
    argv += ["--config.rollout.kind=faithful"]
    assert cli.main(argv) == 0
    printed = capsys.readouterr().out
    assert "| JAX, faithful" in printed and "| PyTorch, published procedure" in printed
    assert "load average" in printed and "TFLOP/s (2048 × 2048 float32 matrix" in printed
    result = json.loads(out.read_text())
    ours, theirs = result["sides"]
    assert result["workload"]["concepts"] == 2 and result["environment"]["devices"] == 8
    assert len(ours["rate"]["values"]) == 2 and ours["rate"]["median"] > 0
    # Rollouts have 0 .. 2 steps.
    assert ours["evaluations"] == pytest.approx(2 + 5.9, abs=0.5)
    assert theirs["evaluations"] == pytest.approx(2 + 8 + 2.6, abs=0.6)
    assert ours["first_call"]["cold"] > ours["first_call"]["cached"] > 0
    assert ours["peak_memory"]["bytes"] > 1e6
    pairs = zip(ours["rate"]["values"], theirs["rate"]["values"], strict=True)
    assert result["speedup"]["values"] == pytest.approx([a / b for a, b in pairs])
    flops = ours["rate"]["median"] * ours["flops"]
    assert ours["utilisation"] == pytest.approx(flops / result["peak"]["flops_per_second"])


def test_generate_against_torch(tmp_path, capsys):
    out = tmp_path / "generate.json"
    argv = ["bench", "generate", *SMALL, "--repeats", "1", "--against", "torch", "--out", str(out)]
    assert cli.main(argv) == 0
    assert "images/s" in capsys.readouterr().out
    result = json.loads(out.read_text())
    ours, theirs = result["sides"]
    assert ours["flops"] == pytest.approx(theirs["flops"], rel=0.01) and ours["flops"] > 0
    assert (ours["name"], theirs["name"]) == ("JAX", "PyTorch, diffusers")
    assert result["workload"]["DDIM steps"] == 2 and result["workload"]["batch size"] == 8


def test_torch_side_loads_the_model_that_jax_runs(tiny_backbone):
    with model.diffusers_folder(tiny_backbone) as folder:
        unet, scheduler = torch_side.load_unet(folder, 5, "float32", "cpu")
    z = np.random.default_rng(0).standard_normal((2, 8, 8, 4)).astype(np.float32)
    cond = tiny_backbone.encode_prompts(["a person", "a man"], 16)
    timesteps = jnp.full(2, int(scheduler.timesteps[1]))
    ours = tiny_backbone.decode(
        tiny_backbone.params, *tiny_backbone.encode(tiny_backbone.params, z, timesteps, cond)
    )
    conditions = torch_side.Conditions.of(cond)
    with torch.no_grad():
        theirs = unet(torch_side.to_torch(z), scheduler.timesteps[1], conditions.context).sample
    np.testing.assert_allclose(ours, theirs.permute(0, 2, 3, 1), atol=1e-4)
    assert not scheduler.config.clip_sample


def test_torch_train_writes_adapters(tmp_path, capsys):
    folder = tmp_path / "torch"
    argv = ["bench", "torch-train", *SMALL, "--workdir", str(folder)]
    argv += ["--config.train.steps=3", "--config.checkpoint.every=2", "--config.module.kind=mlp"]
    argv += ["--config.optimizer.lr_schedule=linear"]
    assert cli.main(argv) == 0
    assert str(folder / "000003") in capsys.readouterr().out
    two, three = (load_adapter(folder / name) for name in ("000002", "000003"))
    assert sorted(path.name for path in folder.iterdir()) == ["000002", "000003"]
    assert three.names == ("a man", "a woman") and three.module.kind == "mlp"
    assert three.training["steps"] == 3 and three.training["seconds"] > two.training["seconds"]
    # Adam's first steps are about the learning rate: RAM's is 1e-2, in the last step a third of it.
    moved = np.abs(three.ram["out"]["bias"] - two.ram["out"]["bias"]).max(axis=1)
    assert (moved > 1e-4).all() and (moved < 0.4e-2).all()
    assert np.abs(three.ram["out"]["bias"][0] - three.ram["out"]["bias"][1]).max() > 1e-4
    assert "which is not empty" in fails(capsys, "torch-train", *SMALL, "--workdir", folder)


def test_mistakes_are_reported_before_measuring(tmp_path, capsys, monkeypatch):
    def refused(*argv):
        return fails(capsys, *argv, "--config", CONFIG)

    monkeypatch.setattr(model, "open_model", None)  # no case gets that far
    assert "is 0, expected at least 1" in refused("train", "--repeats", "0")
    assert "does not exist; create it" in refused("train", "--out", tmp_path / "no" / "a.json")
    assert "is a folder" in refused("generate", "--out", tmp_path)
    assert "give both or neither" in refused("torch-train")
    assert "give both or neither" in refused("train", "--workdir", tmp_path / "w")
    assert "measures nothing" in refused("torch-train", "--workdir", "w", "--against", "torch")
    ema = ["torch-train", "--workdir", tmp_path / "w", "--config.optimizer.ema_decay=0.9"]
    assert "ema_decay is 0.9, but the published procedure has none" in refused(*ema)
    monkeypatch.setattr(model.jax, "default_backend", lambda: "tpu")
    assert "JAX runs on tpu, but this PyTorch" in refused("train", "--against", "torch")
    monkeypatch.setitem(sys.modules, "respodiff_jax.bench.torch_side", None)
    message = refused("generate", "--against", "torch")
    assert "needs PyTorch" in message and 'pip install -e ".[torch]"' in message


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"what": "sample"}, "`what` is 'sample', expected one of train, generate"),
        ({"against": "tf"}, "`against` is 'tf', expected 'torch' or None"),
        ({"repeats": 0}, "`repeats` is 0, expected at least 1"),
        ({"out": "gs://bucket/a.json"}, "`out` gs://bucket/a.json is on Google Cloud"),
    ],
)
def test_wrong_arguments_are_refused_by_name(arguments, message):
    with pytest.raises(UserError, match=message):
        benchmark.benchmark(**{"what": "train", "config": None} | arguments)


def imports(module):
    """The packages that a file imports anywhere."""
    names = []
    for node in ast.walk(ast.parse(pathlib.Path(module.__file__).read_text())):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names.append(node.module)
    return {name.split(".")[0] for name in names}


def test_neither_side_imports_the_other():
    for module in (benchmark, generate, measure, model, published, report, train):
        assert "torch" not in imports(module)
    assert "torch" in imports(torch_side)
    assert not {"jax", "flax", "respodiff_jax"} & imports(torch_side)


def test_report_prints_a_markdown_table():
    environment = {
        "cpu": "CPU",
        "cpu_cores": 2,
        "memory_gib": 4.0,
        "device": "chip",
        "platform": "tpu",
        "devices": 4,
        "load_average": 0.5,
        "versions": {"jax": "1"},
    }
    ours = Side(
        "JAX",
        Spread((4.0, 6.0, 5.0)),
        evaluations=6.0,
        first_call={"cold": 31.25, "cached": 2.0},
        peak_memory={"bytes": 3 * 2**20, "of": "process, measured"},
    )
    theirs = Side("PyTorch", Spread((2.0, 2.0, 1.0)), evaluations=60.0)
    peak = {"flops_per_second": 2e12, "of": "chip"}
    result = Report("train", "samples", {"model": "m"}, environment, peak, (ours, theirs))
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in str(result).splitlines()
        if line.startswith("|")
    ]
    assert rows == [
        ["", "JAX", "PyTorch", "ratio"],
        rows[1],
        ["samples/s: median (range)", "5 (4–6)", "2 (1–2)", "3 (2–5)"],
        ["UNet evaluations per sample", "6.00", "60.00", "0.10"],
        ["peak memory", "3 MiB (process, measured)", "–", ""],
        ["first call, compiling", "31.2 s", "–", ""],
        ["first call, cached", "2.0 s", "–", ""],
    ]
    assert str(result).endswith("peak: 2 TFLOP/s (chip)")
    alone = str(dataclasses.replace(result, sides=(ours,)))
    assert "ratio" not in alone and "PyTorch" not in alone


def test_known_devices_have_published_peaks(monkeypatch):
    @dataclasses.dataclass
    class Device:
        device_kind: str
        platform: str = "gpu"

    for kind, peak in (("NVIDIA H100 80GB HBM3", 989e12), ("TPU v5 lite", 197e12)):
        monkeypatch.setattr(jax, "devices", lambda kind=kind: [Device(kind)])
        monkeypatch.setattr(jax, "device_count", lambda: 4)
        best = measure.Peak("bfloat16")
        assert not best.sides and best.to_dict({})["flops_per_second"] == 4 * peak


def test_unknown_peaks_are_measured_as_a_side():
    best = measure.Peak("float32")
    assert list(best.sides) == ["matrix product"]
    best.sides["matrix product"](1)
    found = best.to_dict({"matrix product": Spread((3.0, 2.0, 7.0))})
    assert found["flops_per_second"] == 3.0 * 2 * 2048**3
