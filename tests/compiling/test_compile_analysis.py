"""The cost of compiled programs, and the largest batch."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_hlo import SPLASH_TEXT, TPU_TEXT

from respodiff_jax.compiling import analysis, programs, topologies
from respodiff_jax.compiling.hlo import HloModule

V5E = topologies.CHIPS["v5e"]


def make_program(**fields):
    values = {"lower": None, "samples_per_device": 1, "parameters": 0, "unused": 0}
    return programs.Program(**values | fields)


@dataclasses.dataclass
class FakeCompiled:
    """A compiled program with a given text and fixed costs."""

    text: str

    def as_text(self):
        return self.text

    def cost_analysis(self):
        return {"flops": 3e12, "bytes accessed": 8.19e9}

    def memory_analysis(self):
        sizes = {"argument": 100, "output": 30, "alias": 20, "temp": 7, "generated_code": 5}
        sizes = {f"{name}_size_in_bytes": n for name, n in sizes.items()}
        return type("Sizes", (), sizes | {"peak_memory_in_bytes": 90})


def test_flops_of_kernels_are_added_to_those_of_xla():
    forward, backward = HloModule(SPLASH_TEXT).kernels()
    found = analysis.describe(make_program(), FakeCompiled(SPLASH_TEXT), V5E)
    assert found["flops"] == 3e12 + forward.flops + backward.flops
    assert found["kernels_without_flops"] == 0
    on_chip = 2 * 16 * 4096 * 40 + 2 * 16 * 128 * 40  # the results
    assert found["bytes"] == forward.nbytes + backward.nbytes - on_chip
    assert found["xla_bytes"] == 8.19e9 + forward.nbytes + backward.nbytes


def test_describe_adds_up_the_cost_of_a_program():
    chip = dataclasses.replace(V5E, hbm=133)
    program = make_program(unused=11, gradients=4096, repeats=3.0)
    found = analysis.describe(
        program,
        FakeCompiled(TPU_TEXT),
        chip,
        {
            "flops": 1e12,
            "bytes": 1.638e12,
            "rearranged_bytes": 5.0,
            "transposed_bytes": 4.0,
            "xla_bytes": 2e12,
        },
    )
    assert found["memory"]["total"] == 100 + 30 - 20 + 7 + 5 + 11 == chip.hbm
    assert found["fits"] and found["memory"]["peak"] == 90
    exchanges, kernels, in_the_loop = 32 + 32 + 10, 64, 128 + 32
    assert found["flops"] == 5e12
    assert found["bytes"] == exchanges + kernels + in_the_loop + 2 * 1.638e12
    assert found["xla_bytes"] == 8.19e9 + 64 + 2 * 2e12
    assert (found["rearranged_bytes"], found["transposed_bytes"]) == (2 * 5, 2 * 4)
    assert found["kernels_without_flops"] == 2
    assert found["roofline"] == analysis.roofline(5e12, found["bytes"], chip)
    by_op = found["exchange"]["by_op"]
    assert by_op["reduce-scatter"] == {"count": 3, "bytes": 3 * 128}
    assert found["exchange"]["bytes"] == 4096 + 3 * 128 + 4112 + 16 + 5
    smaller = analysis.describe(
        program,
        FakeCompiled(""),
        dataclasses.replace(V5E, hbm=132),
        dict.fromkeys(found["counted"], 0),
    )
    assert not smaller["fits"]


@pytest.mark.parametrize(
    ("weight", "moved"),
    [
        (("bf16", (16, 32)), False),  # the compiler may transpose
        (("bf16", (32, 1, 16)), False),
        (("bf16", (64, 32)), False),  # gathered
        (("f32", (32, 16)), True),
        (("bf16", (64, 8)), True),
    ],
)
def test_exchanged_weights_are_found(weight, moved):
    program = make_program(weights=frozenset([weight]))
    exchange = analysis.describe(program, FakeCompiled(TPU_TEXT), V5E)["exchange"]
    assert exchange["no_weights_moved"] is moved
    # Besides the gradients, up to 4096 bytes of scalars are allowed.
    assert exchange["bytes"] == 4096 + 128 + 4112 + 16 + 5
    for gradients, only in ((4261, True), (4260, False)):
        program = make_program(gradients=gradients)
        exchange = analysis.describe(program, FakeCompiled(TPU_TEXT), V5E)["exchange"]
        assert exchange["only_gradients"] is only


def test_roofline_takes_the_longer_of_compute_and_memory():
    """With v5e's published peaks: 197 TFLOP/s and 819 GB/s."""
    assert analysis.roofline(394e12, 819e9, V5E) == {
        "seconds": 2.0,
        "bound": "compute",
        "compute_seconds": 2.0,
        "memory_seconds": 1.0,
    }
    assert analysis.roofline(197e12, 1638e9, V5E)["bound"] == "memory"


def test_analyse_compiles_a_program_for_all_devices():
    """The program is the gradient of a replicated weight, on simulated devices."""
    mesh = jax.sharding.Mesh(np.asarray(jax.devices()), ("data",))

    def lower():
        def sharded(spec, *shape):
            sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*spec))
            return jax.ShapeDtypeStruct(shape, jnp.float32, sharding=sharding)

        step = jax.grad(lambda w, x: jnp.sum(x @ w))
        return jax.jit(step).lower(sharded((), 64, 16), sharded(("data",), 8 * 32, 64))

    program = make_program(lower=lower, gradients=64 * 16 * 4)
    found = analysis.analyse(program, V5E)
    assert found["exchange"]["by_op"] == {"all-reduce": {"count": 1, "bytes": 64 * 16 * 4}}
    assert found["exchange"]["only_gradients"] and found["loop"] is None
    assert 32 * 64 * 4 <= found["memory"]["arguments"] < 2 * 32 * 64 * 4
    assert found["memory"]["outputs"] == 64 * 16 * 4
    assert found["compile_seconds"] >= 0


OUT_OF_MEMORY = (
    (
        "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO"
        " temporaries (800.00G) exceeds available HBM (15.75G).",
        800 * 2**30,
    ),
    (
        "RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory space"
        " hbm. Used 512.50M of 15.75G hbm. Exceeded hbm capacity by 4.77G.",
        int(512.5 * 2**20),
    ),
)


@pytest.mark.parametrize(("message", "required"), OUT_OF_MEMORY)
def test_program_refused_for_its_memory_does_not_fit(message, required):
    class Lowered:
        def compile(self):
            raise jax.errors.JaxRuntimeError(message)

    found = analysis.analyse(make_program(lower=Lowered, unused=9, samples_per_device=4), V5E)
    assert not found["fits"] and found["batch_per_device"] == 4
    assert found["memory"] == {"total": required + 9, "available": V5E.hbm}


def test_other_compiler_errors_are_raised():
    class Lowered:
        def compile(self):
            raise jax.errors.JaxRuntimeError("INTERNAL: 1.0G of 2.0G hbm")

    with pytest.raises(jax.errors.JaxRuntimeError, match="INTERNAL"):
        analysis.analyse(make_program(lower=Lowered), V5E)


@pytest.mark.parametrize(
    ("required", "first", "largest", "trials"),
    [
        (lambda b: 100 + 30 * b, 4, 30, 4),  # 4, 8, 30, 31
        (lambda b: 100 + 30 * b, 64, 30, 4),  # 64, 32, 30, 31
        (lambda b: 100 + 30 * b, 30, 30, 4),  # 30, 60, 31
        (lambda b: 2000 * b, 1, 0, 1),
        (lambda b: 2000 * b, 8, 0, 4),
    ],
)
def test_largest_batch_is_found_in_few_trials(required, first, largest, trials):
    found = analysis.find_largest_batch(required, 1000, first)
    assert (found["largest"], found["exact"]) == (largest, True)
    assert len(found["tried"]) <= trials
    assert all(n == required(batch) for batch, n in found["tried"].items())


def test_largest_batch_is_inexact_when_trials_run_out():
    found = analysis.find_largest_batch(lambda b: b * b, 10_000, 1, trials=3)
    assert found["largest"] in found["tried"] and found["largest"] < 100
    assert not found["exact"]
