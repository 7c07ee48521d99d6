"""The cost of compiled programs, from HLO texts as the TPU compiler writes them, and its report."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_train_step import WOMAN, make_config

from respodiff_jax.compiling import ahead_of_time, analysis, hlo, programs, report, topologies
from respodiff_jax.compiling.hlo import HloModule
from respodiff_jax.training.config import with_concepts

V5E = topologies.CHIPS["v5e"]


TPU_TEXT = """\
HloModule jit__fun, is_scheduled=true, entry_computation_layout={(f32[4]{0:T(128)})->f32[4]{0}}

%add (x.1: f32[], y.1: f32[]) -> f32[] {
  %x.1 = f32[]{:T(128)} parameter(0)
  %y.1 = f32[]{:T(128)} parameter(1)
  ROOT %add.9 = f32[]{:T(128)} add(%x.1, %y.1)
}

%async_collective_fusion (param_0: bf16[32,16]) -> (bf16[32,16], bf16[32,64]) {
  %param_0 = bf16[32,16]{0,1:T(8,128)(2,1)S(1)} parameter(0)
  %all-gather.559 = bf16[32,64]{0,1:T(8,128)(2,1)} all-gather(%param_0), channel_id=45, \
replica_groups=mesh['axis_0'=1,'axis_1'=4] {'axis_1'}, dimensions={1}, \
frontend_attributes={chain_id="2"}, metadata={op_name="jit(f)/all-reduce(%x)"}
  ROOT %custom-call.27 = (bf16[32,16]{0,1:T(8,128)(2,1)S(1)}, /*index=1*/bf16[32,64]{0,1}) \
custom-call(%all-gather.559), custom_call_target="AsyncCollectiveStart"
}

%async_collective_done (param_0.1: bf16[32,16]) -> bf16[32,64] {
  %param_0.1 = bf16[32,16]{0,1:T(8,128)(2,1)S(1)} parameter(0)
  ROOT %all-gather.561 = bf16[32,64]{0,1:T(8,128)(2,1)} all-gather(%param_0.1), channel_id=45, \
dimensions={1}, frontend_attributes={chain_id="2"}
}

%in_the_loop (param_0.2: bf16[8,8]) -> bf16[2,8] {
  %param_0.2 = bf16[8,8]{1,0:T(8,128)(2,1)} parameter(0)
  ROOT %reduce-scatter.1 = bf16[2,8]{1,0:T(8,128)(2,1)} reduce-scatter(%param_0.2), \
channel_id=7, dimensions={0}, to_apply=%add
}

%body (arg.1: (s32[], bf16[8,8])) -> (s32[], bf16[8,8]) {
  %arg.1 = (s32[]{:T(128)}, bf16[8,8]{1,0:T(8,128)(2,1)}) parameter(0)
  %get-tuple-element.1 = s32[]{:T(128)} get-tuple-element(%arg.1), index=0
  %get-tuple-element.2 = bf16[8,8]{1,0:T(8,128)(2,1)} get-tuple-element(%arg.1), index=1
  %fusion.1 = bf16[2,8]{1,0:T(8,128)(2,1)} fusion(%get-tuple-element.2), kind=kCustom, \
calls=%in_the_loop
  ROOT %tuple.1 = (s32[]{:T(128)}, bf16[8,8]{1,0}) tuple(%get-tuple-element.1, \
%get-tuple-element.2)
}

%condition (arg.2: (s32[], bf16[8,8])) -> pred[] {
  %arg.2 = (s32[]{:T(128)}, bf16[8,8]{1,0:T(8,128)(2,1)}) parameter(0)
  ROOT %constant.1 = pred[]{:T(512)} constant(true)
}

ENTRY %main (p.1: f32[1,4,4,64], p.2: f32[4], p.3: pred[5]) -> f32[4] {
  %p.1 = f32[1,4,4,64]{3,2,1,0:T(4,128)S(1)} parameter(0)
  %p.2 = f32[4]{0:T(128)} parameter(1)
  %p.3 = pred[5]{0:T(128)} parameter(2)
  %all-reduce.4 = (f32[4]{0:T(128)}, f32[1,4,4,64]{3,2,1,0:T(4,128)S(1)}) \
all-reduce(%p.2, %p.1), channel_id=1, replica_groups={{0,1},{2,3}}, to_apply=%add
  %psum.25 = f32[4]{0:T(128)} all-reduce(%p.2), channel_id=1, to_apply=%add
  %collective-permute-start.5 = (pred[5]{0:T(128)}, pred[5]{0:T(128)}, u32[]{:S(2)}) \
collective-permute-start(%p.3), channel_id=83, source_target_pairs={{0,1}}
  %collective-permute-done.5 = pred[5]{0:T(128)} \
collective-permute-done(%collective-permute-start.5)
  %while.1 = (s32[]{:T(128)}, bf16[8,8]{1,0}) while(%tuple.7), condition=%condition, body=%body
  %custom-call.1 = f32[4]{0:T(128)} custom-call(%p.2), custom_call_target="tpu_custom_call"
  ROOT %custom-call.2 = f32[4]{0:T(128)} custom-call(%p.2), custom_call_target="tpu_custom_call"
}
"""


def test_collectives_are_read_from_hlo_text():
    module = HloModule(TPU_TEXT)
    found = module.collectives()
    assert [(c.op, c.nbytes, c.in_loop) for c in found] == [
        ("all-gather", 32 * 64 * 2, False),  # its result; one exchange in two fusions
        ("reduce-scatter", 8 * 8 * 2, True),
        ("all-reduce", 4 * 4 + 4 * 4 * 64 * 4, False),
        ("all-reduce", 4 * 4, False),  # another exchange on the same channel
        ("collective-permute", 5, False),
    ]
    assert found[2].operands == (("f32", (4,)), ("f32", (1, 4, 4, 64)))
    kernels = module.kernels()
    assert [(kernel.nbytes, kernel.flops) for kernel in kernels] == [(32, None)] * 2


SPLASH_TEXT = """\
ENTRY %main (p.1: bf16[16,40,4096], p.2: bf16[16,40,128]) -> bf16[16,4096,40] {
  %mask = s8[1,8,1]{2,1,0:T(8,128)(4,1)} constant(0)
  %q = bf16[16,40,4096]{2,1,0:T(8,128)(2,1)} parameter(0)
  %k = bf16[16,40,128]{2,1,0:T(8,128)(2,1)} parameter(1)
  %splash_mha_fwd_segmented_residuals.1 = (f32[512,128]{1,0:T(8,128)}, \
bf16[16,4096,40]{2,1,0:T(8,128)(2,1)S(1)}) custom-call(%mask, %q, %k, /*index=5*/%k), \
custom_call_target="tpu_custom_call", operand_layout_constraints={s8[1,8,1]{2,1,0}}
  ROOT %splash_mha_dkv_segmented_no_residuals.1 = bf16[16,128,40]{2,1,0:T(8,128)(2,1)S(1)} \
custom-call(%mask, %q, %k, %k), custom_call_target="tpu_custom_call"
}
"""


def test_flops_of_attention_kernels_are_counted():
    forward, backward = HloModule(SPLASH_TEXT).kernels()
    product = 2 * 16 * 4096 * 128 * 40
    assert (forward.flops, backward.flops) == (2 * product, 5 * product)
    query, key = [("bf16", (2, 8, 40, n)) for n in (4096, 128)]  # two concepts
    assert hlo.Kernel("splash_mha_fwd", (query, key), ()).flops == 2 * product
    read = 8 + 2 * 16 * 40 * (4096 + 2 * 128)
    assert forward.nbytes == read + 4 * 512 * 128 + 2 * 16 * 4096 * 40
    assert backward.nbytes == read + 2 * 16 * 128 * 40
    found = analysis.describe(make_program(), FakeCompiled(SPLASH_TEXT), V5E)
    assert found["flops"] == 3e12 + 7 * product and found["kernels_without_flops"] == 0
    on_chip = 2 * 16 * 4096 * 40 + 2 * 16 * 128 * 40  # the results
    assert found["bytes"] == forward.nbytes + backward.nbytes - on_chip
    assert found["xla_bytes"] == 8.19e9 + forward.nbytes + backward.nbytes


TRAFFIC_TEXT = """\
%branch (x: f32[8]) -> f32[8] {
  %x = f32[8]{0:T(128)} parameter(0)
  ROOT %negate.1 = f32[8]{0:T(128)S(1)} negate(%x)
}

ENTRY %main (p: f32[8,4], q: f32[2,4]) -> f32[8,4] {
  %p = f32[8,4]{1,0:T(8,128)} parameter(0)
  %q = f32[2,4]{1,0:T(8,128)} parameter(1)
  %i = s32[]{:T(128)S(6)} parameter(2)
  %copy-start = (f32[8,4]{1,0:T(8,128)S(1)}, f32[8,4]{1,0:T(8,128)}, u32[]{:S(2)}) copy-start(%p)
  %copy-done = f32[8,4]{1,0:T(8,128)S(1)} copy-done(%copy-start)
  %copy-start.1 = (f32[8,4]{1,0}, f32[8,4]{1,0:T(8,128)S(1)}, u32[]{:S(2)}) \
copy-start(%copy-done)
  %slice-start = ((f32[8,4]{1,0:T(8,128)}), f32[2,4]{1,0:T(8,128)S(1)}, s32[]{:S(2)}) \
slice-start(%p), slice={[0:2], [0:4]}
  %slice-done = f32[2,4]{1,0:T(8,128)S(1)} slice-done(%slice-start)
  %slice.1 = f32[1,4]{1,0:T(8,128)} slice(%p), slice={[0:1], [0:4]}
  %slice.2 = f32[1,4]{1,0:T(8,128)} slice(%slice-done), slice={[0:1], [0:4]}
  %conditional.1 = f32[8]{0:T(128)S(1)} conditional(%i, %p), branch_computations={%branch, %branch}
  ROOT %dynamic-update-slice.1 = f32[8,4]{1,0:T(8,128)} dynamic-update-slice(%p, %q, %i)
}
"""


def test_traffic_counts_what_leaves_or_enters_the_chip():
    whole, part, row = 8 * 4 * 4, 2 * 4 * 4, 4 * 4
    copied = whole + whole  # in, and back
    sliced = part + 2 * row + row  # copied ahead; read and written; written
    branch = 8 * 4  # one of the two runs, and reads
    updated = part + part
    assert HloModule(TRAFFIC_TEXT).traffic() == copied + sliced + branch + updated
    assert HloModule("").traffic() == 0


REARRANGING_TEXT = """\
%only (a: f32[8,4]) -> bf16[4,8] {
  %a = f32[8,4]{1,0} parameter(0)
  %cast.1 = bf16[8,4]{1,0} convert(%a)
  ROOT %transpose.1 = bf16[4,8]{1,0} transpose(%cast.1), dimensions={1,0}
}

%more (b: f32[8,4]) -> f32[8,4] {
  %b = f32[8,4]{1,0} parameter(0)
  %transpose.2 = f32[4,8]{1,0} transpose(%b), dimensions={1,0}
  ROOT %negate.2 = f32[4,8]{1,0} negate(%transpose.2)
}

ENTRY %main (p: f32[8,4]) -> f32[4,8] {
  %p = f32[8,4]{1,0} parameter(0)
  %fusion.1 = bf16[4,8]{1,0} fusion(%p), kind=kLoop, calls=%only
  %fusion.2 = f32[4,8]{1,0} fusion(%p), kind=kLoop, calls=%more
  ROOT %copy.1 = f32[4,8]{0,1} copy(%fusion.2)
}
"""


def test_rearranged_counts_only_what_computes_nothing():
    fused, alone = 8 * 4 * (4 + 2), 2 * 8 * 4 * 4
    module = HloModule(REARRANGING_TEXT)
    assert module.rearranged() == fused + alone
    assert module.rearranged(hlo.TRANSPOSING) == fused
    assert module.traffic() == fused + alone + 2 * 8 * 4 * 4
    assert HloModule(TRAFFIC_TEXT).rearranged() == HloModule("").rearranged() == 0


def make_program(**fields):
    values = {"lower": None, "batch_per_device": 1, "parameters": 0, "unused": 0}
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

    found = analysis.analyse(make_program(lower=Lowered, unused=9, batch_per_device=4), V5E)
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


def make_entry(step="train", **changes):
    config = with_concepts(
        make_config(**{"model.dtype": "float32", "rollout.kind": "streaming"}), [WOMAN]
    )
    result = {
        "batch_per_device": 4,
        "fits": True,
        "memory": dict.fromkeys(
            ("parameters", "arguments", "temporaries", "outputs", "aliased", "code", "peak"), 2**30
        )
        | {"total": 8 * 2**30, "available": V5E.hbm},
        "loop": {"repeats": 24.0},
        "flops": 6.2e12,
        "bytes": 81.9e9,
        "rearranged_bytes": 1.75e9,
        "transposed_bytes": 0.5e9,
        "kernels_without_flops": 3,
        "roofline": analysis.roofline(6.2e12, 81.9e9, V5E),
        "exchange": {
            "bytes": 656e3,
            "by_op": {"all-reduce": {"count": 2, "bytes": 656e3}},
            "gradients": 655360,
            "no_weights_moved": True,
        },
        "compile_seconds": 273.1,
    }
    return {
        "job": ahead_of_time.Compilation(config, "v5e:4x4", step).to_dict(),
        "chips": 16,
        "model": "random/sd14",
        "resolution": 512,
        "concepts": 1,
        "result": result | changes,
    }


def test_summary_and_table_of_results(monkeypatch):
    monkeypatch.setattr(ahead_of_time.importlib.metadata, "version", lambda name: "1.2")
    text = report.summary(make_entry())
    assert "random/sd14, 512 px, float32, train, 1 concept, streaming, pmap, flash" in text
    assert "8.00 GiB of 15.75: fits" in text
    assert "6.20 TFLOP, 31.47 ms at best" in text and "81.9 GB, 100 ms at best" in text
    assert "1.2 GB of copies to another layout and 0.5 GB of transposes and casts" in text
    assert "bound by    memory: at best 40 samples/s a chip" in text
    assert "1440 concepts/hour a chip, with 100 steps of batch size 1" in text
    assert "counts 24 times" in text and "3 Pallas kernels" in text
    assert "all-reduce 0.66 MB; gradients are 0.66 MB" in text
    assert "base weights stay where they are: yes" in text
    too_large = make_entry(fits=False)
    del too_large["result"]["roofline"]
    assert "DOES NOT FIT" in report.summary(too_large)
    limit = make_entry(analysis.LARGEST_BATCH)
    limit["result"] = {"largest": 9, "exact": True, "tried": {"9": 2**30, "10": 2**35}}
    assert "  9 samples a concept (9: 1.00 GiB, 10: 32.00 GiB)" in report.summary(limit)

    table = report.markdown([make_entry(), too_large, limit]).splitlines()
    cells = [line.count("|") for line in table if line.startswith("|")]
    assert cells == [13] * 4 + [5] * 3
    # A chip with 40 samples/s takes 2.5 s for 100 steps of batch size 1.
    assert table[2].endswith("| 8.00 of 15.75 | 6.20 | 81.9 | 0.1 | memory | 40 | 1440 | 0.66 |")
    assert "does not fit | – | –" in table[3]
    assert table[-1].endswith("pmap, flash | 9 |")
    assert "jax 1.2, libtpu 1.2" in "\n".join(table)


EARLIER_ENTRY = """\
{
  "job": {
    "step": "train",
    "topology": "v5e:4x4",
    "batch_per_device": 4,
    "attention": "flash",
    "config": {
      "model": {"dtype": "bfloat16"},
      "parallel": {"strategy": "pmap", "fsdp": false},
      "rollout": {"kind": "streaming"},
      "train": {"steps": 5000, "batch_size": 1}
    },
    "versions": {"jax": "0.10.2", "libtpu": "0.0.42.1"}
  },
  "chips": 16,
  "model": "random/sd14",
  "resolution": 512,
  "concepts": 2,
  "result": {
    "batch_per_device": 4,
    "fits": true,
    "memory": {"total": 7312375808, "available": 16911433728},
    "flops": 20.08e12,
    "bytes": 54.0e9,
    "roofline": {"seconds": 0.102, "bound": "compute"},
    "exchange": {"bytes": 656000}
  }
}
"""


def test_results_of_earlier_versions_are_read(tmp_path):
    (tmp_path / "compile.json").write_text(f"[{EARLIER_ENTRY}]")
    table = report.markdown(ahead_of_time.read_results(tmp_path / "compile.json"))
    assert "| random/sd14, 512 px, bfloat16 | v5e:4x4 | train, 2 concepts, streaming, pmap" in table
    assert "| 4 | 6.81 of 15.75 | 20.08 | 54.0 | 0.102 | compute | 39.2 | 28.24 | 0.66 |" in table
