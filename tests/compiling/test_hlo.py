"""Collectives, kernels and traffic, from HLO texts as the TPU compiler writes them."""

from respodiff_jax.compiling import hlo
from respodiff_jax.compiling.hlo import HloModule

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
