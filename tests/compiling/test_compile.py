"""Ahead-of-time compilation: programs from shapes, and the command.

`pytest -m tpu_compile` compiles for TPU slices, with libtpu and without a TPU.
"""

import base64
import contextlib
import dataclasses
import json
import re
import subprocess
import sys
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_compile_analysis import V5E
from test_compile_report import make_entry
from test_parallel import BATCH
from test_topologies import needs_libtpu
from test_train_step import MAN, VIOLENCE, WOMAN, make_config, setup

from respodiff_jax import cli
from respodiff_jax.backbone import random_backbone
from respodiff_jax.backbone.attention import attention
from respodiff_jax.compiling import ahead_of_time, analysis, programs, topologies
from respodiff_jax.compiling.ahead_of_time import Compilation, compile_steps
from respodiff_jax.errors import UserError
from respodiff_jax.method.embedding import embed_concepts
from respodiff_jax.method.train_step import train_step
from respodiff_jax.training import parallel
from respodiff_jax.training.config import with_concepts


def config_of(concepts, strategy="pmap", rollout="streaming"):
    """The config of `test_parallel`, for eight devices."""
    config = make_config(
        **{
            "model.name": "random/tiny",
            "model.dtype": "float32",
            "parallel.strategy": strategy,
            "rollout.kind": rollout,
            "train.batch_size": BATCH,
        }
    )
    return with_concepts(config, concepts)


@contextlib.contextmanager
def compilations():
    """Counts hits and misses of the compilation cache."""
    counts = {"/jax/compilation_cache/cache_hits": 0, "/jax/compilation_cache/cache_misses": 0}

    def listener(event, **kwargs):
        if event in counts:
            counts[event] += 1

    jax.monitoring.register_event_listener(listener)
    try:
        yield counts
    finally:
        jax.monitoring.unregister_event_listener(listener)


@pytest.mark.parametrize(
    ("concepts", "strategy", "rollout"),
    [
        ([WOMAN], "pmap", "streaming"),
        pytest.param([WOMAN, VIOLENCE], "mesh", "streaming", marks=pytest.mark.slow),
        pytest.param([WOMAN, VIOLENCE], "mesh", "faithful", marks=pytest.mark.slow),
    ],
)
def test_program_compiled_from_shapes_is_the_one_that_trains(
    tiny_backbone, concepts, strategy, rollout
):
    """After a real step, compiling from shapes finds its program in the compilation cache."""
    changes = {"rollout.kind": rollout}
    spec, arrays, fresh, _ = setup(tiny_backbone, concepts, BATCH, **changes)
    placement = parallel.Placement(strategy, len(concepts), BATCH)
    step = placement.compile(partial(train_step, spec))
    step(
        placement.place_state(fresh),
        placement.replicate({"unet": tiny_backbone.params["unet"]}),
        placement.place_concepts(arrays),
    )
    config = config_of(concepts, strategy, rollout)
    model = random_backbone("tiny", abstract=True)
    program = programs.training(config, model, jax.devices())
    lowered = program.lower()
    with compilations() as counts:
        compiled = lowered.compile()
    assert list(counts.values()) == [1, 0]

    costs = ("flops", "bytes", "rearranged_bytes", "transposed_bytes", "xla_bytes")
    body = dict.fromkeys(costs, 1e9)
    found = analysis.describe(program, compiled, V5E, body)
    exchange = found["exchange"]
    unet, vae = (nbytes(model.params[part]) for part in ("unet", "vae"))
    # RAM and SAM of the one concept that a device trains.
    assert program.gradients == 2 * 4 * 4 * 64 * 4
    assert found["fits"] and found["memory"]["unused_parameters"] == program.unused > 0
    assert (program.parameters, program.unused) == (unet + vae, vae)
    assert exchange["no_weights_moved"] and exchange["only_gradients"]
    if rollout == "faithful":
        # Of the 6 steps of the schedule a rollout takes 0 to 4, on average 2; one is counted.
        assert found["loop"] == {"repeats": 2, **body}
        assert found["flops"] == found["counted"]["flops"] + 1e9
    else:
        numbers = 3 * 4  # two losses and the mean index
        assert exchange["by_op"] == {"all-reduce": {"count": 2, "bytes": 8192 + numbers}}
        assert program.lower_body is None and found["loop"] is None
        assert found["memory"]["arguments"] > unet


def nbytes(tree):
    return sum(np.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(tree))


@pytest.mark.parametrize("architecture", ["tiny", "tiny-xl"])
def test_concept_shapes_equal_those_of_embedded_concepts(architecture):
    concepts = [WOMAN, MAN, VIOLENCE]
    embedded = embed_concepts(random_backbone(architecture, dtype="bfloat16"), concepts, 16)
    model = random_backbone(architecture, dtype="bfloat16", abstract=True)
    shapes = programs.concept_shapes(model, concepts, 16)
    assert jax.tree.structure(embedded) == jax.tree.structure(shapes)
    for x, shape in zip(jax.tree.leaves(embedded), jax.tree.leaves(shapes), strict=True):
        assert (x.shape, x.dtype) == (shape.shape, shape.dtype)


def test_batch_per_device_sets_the_config_batch_size():
    config = config_of([WOMAN, MAN])
    compilation = Compilation(config, "v5e:2x4", "train", 3)
    topology = topologies.Topology("v5e:2x4", V5E, tuple(jax.devices()))
    changed, backbone = ahead_of_time._open(compilation, topology)
    assert changed.train.batch_size == 3 * 4 and config.train.batch_size == BATCH
    assert programs.training(changed, backbone, topology.devices).samples_per_device == 3


def test_waves_compile_with_one_size_and_the_most_neutral_prompts():
    """Twenty concepts train eight at a time, one on each device."""
    many = [dataclasses.replace(MAN, name=f"man {i}") for i in range(19)]
    config = with_concepts(config_of([MAN]), [*many, WOMAN])
    config.train.concepts_per_device = 1
    assert programs.concepts_at_a_time(config, 8) == 8 and programs.data_shards(config, 8) == 1
    program = programs.training(config, random_backbone("tiny", abstract=True), jax.devices())
    assert (program.samples_per_device, program.gradients) == (BATCH, 0)
    shapes = programs.concept_shapes(random_backbone("tiny", abstract=True), [*many, WOMAN], 16, 8)
    assert shapes.neutral.context.shape == (8, 2, 77, 32)


def test_sampling_repeats_its_loop_body_for_each_step():
    """Lowers two programs, compiles none; the first repeats the second."""
    config = config_of([WOMAN, MAN])
    model = random_backbone("tiny", abstract=True)
    program = programs.sampling(config, model, jax.devices())
    assert (program.samples_per_device, program.repeats, program.gradients) == (16, 50, 0)
    assert program.unused == nbytes(model.params["text_encoder"])
    sampler, body = program.lower(), program.lower_body()
    image = jax.ShapeDtypeStruct((8 * 16, 16, 16, 3), jnp.uint8)
    images, _ = sampler.out_info
    assert (images.shape, images.dtype) == (image.shape, image.dtype)
    flops = [lowered.cost_analysis()["flops"] for lowered in (sampler, body)]
    # Both programs are those of one device; the sampler also has the VAE.
    assert flops[0] > flops[1] > 0.5 * flops[0]


CONFIG = """\
from respodiff_jax.method.concepts import Concept
from respodiff_jax.training.config import add_concepts, default

def get_config():
    config = default()
    config.model.name = "random/tiny"
    config.model.dtype = "float32"
    config.rollout.num_steps = 6
    config.train.steps = 100
    woman = Concept("a woman", "gender", ("a person", "someone"), target_prompt="a woman")
    add_concepts(config, {"woman": woman})
    return config
"""


@pytest.fixture
def on_these_devices(monkeypatch):
    """Compiles for the simulated devices instead of the slice."""

    def open_topology(name):
        return topologies.Topology(name, topologies.parse_topology(name)[0], tuple(jax.devices()))

    monkeypatch.setattr(ahead_of_time, "open_topology", open_topology)
    monkeypatch.setattr(ahead_of_time.importlib.metadata, "version", lambda name: "1.2")


def test_known_results_are_not_compiled_again(tmp_path, on_these_devices, monkeypatch, capsys):
    (tmp_path / "config.py").write_text(CONFIG)
    argv = ["compile", "--config", str(tmp_path / "config.py"), "--topology", "v5e:2x4"]
    argv += ["--out", str(tmp_path / "out"), "--step", "train"]
    argv += ["--table", str(tmp_path / "table.md")]
    assert cli.main([*argv, "--batch-per-device", "1"]) == 0  # the program of the first test
    out = capsys.readouterr().out
    assert "compiling train of random/tiny for v5e:2x4" in out and "pmap" in out
    (entry,) = json.loads((tmp_path / "out" / "compile.json").read_text())
    assert entry["chips"] == 8 and entry["result"]["batch_per_device"] == 1
    assert entry["job"]["config"]["rollout"]["num_steps"] == 6
    assert entry["result"]["exchange"]["only_gradients"]

    with monkeypatch.context() as patch:
        patch.setattr(ahead_of_time, "analyse", pytest.fail)
        assert cli.main([*argv, "--batch-per-device", "1"]) == 0
    assert "compiling" not in capsys.readouterr().out
    monkeypatch.setattr(ahead_of_time, "analyse", lambda *args: make_entry()["result"])
    assert cli.main([*argv, "--batch-per-device", "2", "--config.train.steps=7"]) == 0
    assert len(json.loads((tmp_path / "out" / "compile.json").read_text())) == 2
    assert (tmp_path / "table.md").read_text().count("random/tiny") == 2


@pytest.mark.parametrize(
    ("concepts", "tried", "largest"), [(1, [2, 10, 11], 10), (16, [2, 5, 6], 5)]
)
def test_largest_batch_is_found_from_the_memory_of_programs(
    concepts, tried, largest, tmp_path, on_these_devices, monkeypatch, capsys
):
    def analyse(program, chip):  # a tenth of the memory for each sample
        result = make_entry()["result"]
        result["memory"] |= {"total": program.samples_per_device * (chip.hbm // 10)}
        return result | {"batch_per_device": program.samples_per_device}

    monkeypatch.setattr(ahead_of_time, "analyse", analyse)
    (tmp_path / "config.py").write_text(CONFIG)
    argv = ["compile", "--config", str(tmp_path / "config.py"), "--topology", "v5e:2x4"]
    argv += ["--out", str(tmp_path / "out"), "--step", "train", "--batch-per-device", "1"]
    row = {"group": "gender", "target_prompt": "a man", "neutral_prompts": ["a person"]}
    rows = [row | {"name": f"man {number}"} for number in range(concepts)]
    (tmp_path / "concepts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    argv += ["--concepts", str(tmp_path / "concepts.jsonl")]
    assert cli.main([*argv, "--largest-batch"]) == 0
    out = capsys.readouterr().out
    smallest = {1: "1.57", 16: "3.15"}[concepts]  # one sample of each of a chip's concepts
    assert f"  {largest} samples a concept (1: {smallest} GiB, " in out
    # The batch of one sample was compiled before.
    assert re.findall(r"trying a batch of (\d+)", out) == [str(batch) for batch in tried]
    _, found = json.loads((tmp_path / "out" / "compile.json").read_text())
    assert found["result"]["exact"]
    assert set(found["result"]["tried"]) == {str(batch) for batch in (1, *tried)}


def test_cache_compiles_steps_with_a_known_result_again(tmp_path, on_these_devices, monkeypatch):
    (tmp_path / "config.py").write_text(CONFIG)
    argv = ["compile", "--config", str(tmp_path / "config.py"), "--topology", "v5e:2x4"]
    argv += ["--out", str(tmp_path / "out"), "--step", "train", "--batch-per-device", "1"]
    kept, compiled = [], []
    monkeypatch.setattr(ahead_of_time, "keep_compiled", kept.append)
    monkeypatch.setattr(
        ahead_of_time, "analyse", lambda *args: compiled.append(1) or make_entry()["result"]
    )
    for cache in ([], [], ["--cache", "folder"]):
        assert cli.main([*argv, *cache]) == 0
    assert (kept, len(compiled)) == (["folder"], 2)
    assert len(json.loads((tmp_path / "out" / "compile.json").read_text())) == 1


def test_cached_kernels_do_not_name_source_files(tmp_path):
    """JAX's cache key includes the kernels' text, which must not depend on the installation."""
    options = (
        *("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs"),
        *("jax_include_full_tracebacks_in_locations", "jax_hlo_source_file_canonicalization_regex"),
    )
    before = {option: getattr(jax.config, option) for option in options}

    def kernels():
        def loss(x):
            return jnp.sum(attention(x, x, x, 0.3, "flash"))

        x = jax.ShapeDtypeStruct((1, 1024, 2, 64), jnp.bfloat16)
        program = jax.jit(jax.grad(loss)).trace(x).lower(lowering_platforms=("tpu",)).as_text()
        return [base64.b64decode(body) for body in re.findall(r"body\\22: \\22([\w+/=]+)", program)]

    try:
        ahead_of_time.keep_compiled(str(tmp_path))
        found = kernels()
    finally:
        for option, value in before.items():
            jax.config.update(option, value)
    assert len(found) == 2 and not any(b".py" in kernel for kernel in found)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--topology", "v5e:4x3x2"], "v5e has no slice '4x3x2'"),
        (["--topology", "v5e:2x4", "--batch-per-device", "0"], " is 0, expected at least 1"),
        (["--topology", "v5e:2x4", "--table", "no/table.md"], "the folder no does not exist"),
        (["--topology", "v5e:2x4"], "train.batch_size is 1, expected a multiple of 8"),
        (
            ["--topology", "v5e:2x4", "--config.model.name=owner/model"],
            "random/sd14, random/sd21 or random/sdxl",
        ),
        (
            ["--topology", "v5e:2x4", "--batch-per-device=1", "--config.model.resolution=7"],
            "is 7, this model needs a positive multiple",
        ),
        (["--topology", "v5e:2x4", "--config.model.attention=cudnn"], "which no TPU has"),
    ],
)
def test_mistakes_are_reported_before_anything_is_compiled(
    arguments, message, tmp_path, on_these_devices, monkeypatch, capsys
):
    monkeypatch.setattr(ahead_of_time, "analyse", pytest.fail)
    (tmp_path / "config.py").write_text(CONFIG)
    argv = ["compile", "--config", str(tmp_path / "config.py"), "--out", str(tmp_path / "out")]
    assert cli.main([*argv, *arguments]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batch_per_device": 0}, "`batch_per_device` is 0, expected at least 1"),
        ({"step": "grid"}, "`step` is 'grid', expected one of train, sample, both"),
        ({"table": "gs://bucket/table.md"}, "`table` gs://bucket/table.md is on Google Cloud"),
    ],
)
def test_wrong_arguments_are_refused_by_name(arguments, message, tmp_path):
    with pytest.raises(UserError, match=message):
        compile_steps([config_of([WOMAN])], ["v5e:4x4"], tmp_path / "out", **arguments)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("content", ['{"mine": 1}', "[1]", "\xff{"])
def test_foreign_compile_json_is_not_overwritten(content, tmp_path):
    file = tmp_path / "compile.json"
    file.write_text(content, encoding="latin-1")
    with pytest.raises(UserError, match=r"compile\.json is not what `respodiff compile` writes"):
        compile_steps([config_of([WOMAN])], ["v5e:4x4"], tmp_path)
    assert file.read_text(encoding="latin-1") == content


def test_environment_is_set_before_jax_is_imported():
    code = (
        "import os, sys\n"
        "from respodiff_jax.compiling import set_environment\n"
        "set_environment()\n"
        "assert os.environ['JAX_PLATFORMS'] == 'cpu'\n"
        "assert not {'jax', 'huggingface_hub'} & sys.modules.keys()\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def compiled_for(topology, compilation):
    opened = ahead_of_time._open(compilation, topology)
    program = ahead_of_time._program(compilation.step, *opened, topology)
    return analysis.analyse(program, topology.chip)


@pytest.mark.tpu_compile
@needs_libtpu
@pytest.mark.parametrize("strategy", ["pmap", "mesh"])
def test_training_compiles_for_a_slice(strategy, no_metadata_server):
    """64 pixels make self-attention long enough for the kernel."""
    topology = topologies.open_topology("v5e:2x2")
    config = config_of([WOMAN], strategy)
    config.model.dtype, config.model.resolution = "bfloat16", 64
    found = compiled_for(topology, Compilation(config, topology.name, "train"))
    assert found["fits"] and found["kernels_without_flops"] == 0
    assert found["memory"]["total"] < 2**30
    exchange = found["exchange"]
    assert exchange["no_weights_moved"]
    # The exchanged arrays are gradients, losses and the mean index.
    assert exchange["by_op"].keys() == {"all-reduce"}
    assert exchange["bytes"] == exchange["gradients"] + 3 * 4


@pytest.mark.tpu_compile
@needs_libtpu
def test_chips_with_concepts_of_their_own_exchange_nothing(no_metadata_server):
    topology = topologies.open_topology("v5e:2x2")
    config = config_of([dataclasses.replace(MAN, name=f"man {i}") for i in range(8)])
    config.model.dtype, config.model.resolution = "bfloat16", 64
    found = compiled_for(topology, Compilation(config, topology.name, "train", batch_per_device=1))
    assert found["batch_per_device"] == 2 and found["exchange"]["bytes"] == 0


@pytest.mark.tpu_compile
@needs_libtpu
def test_sampling_compiles_for_a_slice(no_metadata_server):
    topology = topologies.open_topology("v5e:2x2")
    found = compiled_for(topology, Compilation(config_of([WOMAN, MAN]), topology.name, "sample"))
    assert found["fits"] and found["loop"]["repeats"] == 50
    assert found["flops"] > 40 * found["loop"]["flops"]
    # Each device samples its own images.
    assert found["exchange"]["bytes"] == 0
