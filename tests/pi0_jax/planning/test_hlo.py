"""Counted by hand, against what is read in compiled programs."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pi0_jax.planning import hlo

# As the TPU's compiler writes them: a product of a batch of 8 as a dilated window, a loop that was unrolled twice, and
# a collective over one axis of the mesh.
TPU = """
%body (p: (u32[], f32[8,4,16], f32[8,16,32])) -> (u32[], f32[8,4,16], f32[8,16,32]) {
  %p = (u32[], f32[8,4,16]{2,1,0}, f32[8,16,32]{2,1,0}) parameter(0)
  %i = u32[]{:T(128)} get-tuple-element(%p), index=0
  %a = f32[8,4,16]{2,1,0:T(8,128)} get-tuple-element(%p), index=1
  %b = f32[8,16,32]{2,1,0:T(8,128)} get-tuple-element(%p), index=2
  %two = u32[]{:T(128)} constant(2)
  %product = f32[8,4,32]{2,1,0} convolution(%a, %b), window={size=8 stride=7 lhs_dilate=8}, dim_labels=0bf_0io->0bf
  %s = f32[8,4,32] all-reduce(%product), replica_groups=mesh['x'=2,'y'=4], device_ids=([4,2]T(1,0)) {'y'}, to_apply=%add
  %next = u32[]{:T(128)} add(%i, %two)
  ROOT %out = (u32[], f32[8,4,16]{2,1,0}, f32[8,16,32]{2,1,0}) tuple(%next, %a, %b)
}

%condition (p: (u32[], f32[8,4,16], f32[8,16,32])) -> pred[] {
  %p = (u32[], f32[8,4,16]{2,1,0}, f32[8,16,32]{2,1,0}) parameter(0)
  %i = u32[]{:T(128)} get-tuple-element(%p), index=0
  %ten = u32[]{:T(128)} constant(10)
  ROOT %less = pred[]{:T(512)} compare(%i, %ten), direction=LT
}

ENTRY %main (p: (u32[], f32[8,4,16], f32[8,16,32])) -> (u32[], f32[8,4,16], f32[8,16,32]) {
  %p = (u32[], f32[8,4,16]{2,1,0}, f32[8,16,32]{2,1,0}) parameter(0)
  ROOT %loop = (u32[], f32[8,4,16]{2,1,0}, /*index=2*/f32[8,16,32]{2,1,0}) while(%p), condition=%condition, body=%body
}
"""


def test_a_tpu_program():
    cost = hlo.count(TPU)
    assert cost.flops == 5 * 2 * 8 * 4 * 16 * 32
    assert cost.collectives == {"all-reduce": 5}
    assert cost.sent == {"all-reduce": 5 * 2 * 3 / 4 * (8 * 4 * 32 * 4)}  # a ring of 4, there and back


def test_a_loop_whose_first_iterations_were_taken_out_of_it():
    """Its counter starts at 2, of 10, and goes up by 2."""
    start = """
  %two = u32[] constant(2)
  %started = u32[] copy(%two)
  %a = f32[8,4,16] get-tuple-element(%p), index=1
  %b = f32[8,16,32] get-tuple-element(%p), index=2
  %from = (u32[], f32[8,4,16], f32[8,16,32]) tuple(%started, %a, %b)
  ROOT %loop"""
    entry = TPU.index("ENTRY")
    text = TPU[:entry] + TPU[entry:].replace("\n  ROOT %loop", start).replace("while(%p)", "while(%from)")
    assert hlo.count(text).flops == 4 * 2 * 8 * 4 * 16 * 32


def test_memory_of_the_host_and_of_the_core_is_no_traffic():
    """A prefetch into the core reads 2 of 8 rows; a copy to the host reads all of them."""
    text = """
ENTRY %main (x: f32[8,32]) -> f32[8,32] {
  %x = f32[8,32]{1,0} parameter(0)
  %prefetch = ((f32[8,32]{1,0}), f32[2,32]{1,0:S(1)}, s32[]) slice-start(%x), slice={[0:2], [0:32]}
  %part = f32[2,32]{1,0:S(1)} slice-done(%prefetch)
  %offload = (f32[8,32]{1,0:S(5)}, f32[8,32]{1,0}, u32[]{:S(2)}) copy-start(%x)
  ROOT %kept = f32[8,32]{1,0:S(5)} copy-done(%offload)
}
"""
    assert hlo.count(text).traffic == (2 + 8) * 32 * 4 + 4  # and the copy's context


def test_a_scan_counts_as_often_as_it_runs():
    """Nine products of [8, 32] and [32, 32], forward; three times as many with gradients of both."""

    def last(w: jax.Array, x: jax.Array) -> jax.Array:
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, w)[0].sum()

    w, x = jax.ShapeDtypeStruct((9, 32, 32), jnp.float32), jax.ShapeDtypeStruct((8, 32), jnp.float32)
    for function, times in ((last, 1), (jax.grad(last, (0, 1)), 3)):
        cost = hlo.count(jax.jit(function).lower(w, x).compile().as_text())
        assert cost.flops == times * 9 * 2 * 8 * 32 * 32 and not cost.collectives
        assert cost.traffic >= 9 * 32 * 32 * 4  # every weight is read


def test_a_padded_convolution():
    """A 3-wide kernel over 5 places with padding: 13 products, of 2 channels to 4, in a batch of 7."""
    text = """
ENTRY %main (x: f32[7,5,2], k: f32[3,2,4]) -> f32[7,5,4] {
  %x = f32[7,5,2]{2,1,0} parameter(0)
  %k = f32[3,2,4]{2,1,0} parameter(1)
  ROOT %y = f32[7,5,4]{2,1,0} convolution(%x, %k), window={size=3 pad=1_1}, dim_labels=b0f_0io->b0f
}
"""
    assert hlo.count(text).flops == 2 * 13 * 2 * 4 * 7


# A collective that the TPU's compiler overlaps with a product: its start, a part of it beside that, and its end.
ASYNC = """
%start (x: f32[1,128]) -> (f32[1,128], f32[16,128], u32[]) {
  %x = f32[1,128]{1,0} parameter(0)
  %gather = f32[16,128] all-gather(%x), channel_id=7, replica_groups=[1,16]<=[16], frontend_attributes={chain_id="3"}
  ROOT %started = (f32[1,128], f32[16,128], u32[]) custom-call(%gather), custom_call_target="AsyncCollectiveStart"
}

%beside (a: f32[8,32], b: f32[32,64], x: f32[1,128], y: f32[16,128]) -> (f32[8,64], f32[1,128], f32[16,128]) {
  %a = f32[8,32]{1,0} parameter(0)
  %b = f32[32,64]{1,0} parameter(1)
  %dot = f32[8,64]{1,0} dot(%a, %b), lhs_contracting_dims={1}, rhs_contracting_dims={0}
  %x = f32[1,128]{1,0} parameter(2)
  %y = f32[16,128]{1,0} parameter(3)
  %gather = f32[16,128] all-gather(%x), channel_id=7, replica_groups=[1,16]<=[16], frontend_attributes={chain_id="3"}
  ROOT %out = (f32[8,64], f32[1,128], f32[16,128], f32[16,128]) tuple(%dot, %x, %y, %gather)
}

%done (x: f32[1,128], y: f32[16,128]) -> f32[16,128] {
  %x = f32[1,128]{1,0} parameter(0)
  %y = f32[16,128]{1,0} parameter(1)
  %gather = f32[16,128] all-gather(%x), channel_id=7, replica_groups=[1,16]<=[16], frontend_attributes={chain_id="3"}
  ROOT %end = f32[16,128]{1,0} custom-call(%gather, %x, %y), custom_call_target="AsyncCollectiveDone"
}

ENTRY %main (a: f32[8,32], b: f32[32,64], x: f32[1,128]) -> f32[16,128] {
  %a = f32[8,32]{1,0} parameter(0)
  %b = f32[32,64]{1,0} parameter(1)
  %x = f32[1,128]{1,0} parameter(2)
  %async-collective-start = (f32[1,128]{1,0}, f32[16,128]{1,0}, u32[]{:S(2)}) fusion(%x), kind=kCustom, calls=%start
  %x1 = f32[1,128]{1,0} get-tuple-element(%async-collective-start), index=0
  %y1 = f32[16,128]{1,0} get-tuple-element(%async-collective-start), index=1
  %fusion = (f32[8,64], f32[1,128], f32[16,128], f32[16,128]) fusion(%a, %b, %x1, %y1), kind=kOutput, calls=%beside
  %x2 = f32[1,128]{1,0} get-tuple-element(%fusion), index=1
  %y2 = f32[16,128]{1,0} get-tuple-element(%fusion), index=2
  ROOT %async-collective-done = f32[16,128]{1,0} fusion(%x2, %y2), kind=kCustom, calls=%done
}
"""


def test_an_asynchronous_collective_counts_once():
    """The gather of [1, 128] from 16 devices; memory sees what it reads and writes, and the product's arrays."""
    cost = hlo.count(ASYNC)
    assert cost.collectives == {"all-gather": 1} and cost.sent == {"all-gather": 15 * 128 * 4}
    assert cost.flops == 2 * 8 * 32 * 64
    assert cost.traffic == 4 * ((1 + 16) * 128 + 8 * 32 + 32 * 64 + 8 * 64)
    assert not cost.unknown


def test_collectives_with_a_start_and_an_end_count_once():
    """As instructions of their own, and as a computation that three instructions name."""
    text = """
%gathering (x: f32[4,8]) -> f32[16,8] {
  %x = f32[4,8]{1,0} parameter(0)
  ROOT %gather = f32[16,8]{1,0} all-gather(%x), replica_groups=[2,4]<=[8], dimensions={0}
}

ENTRY %main (x: f32[4,8]) -> f32[16,8] {
  %x = f32[4,8]{1,0} parameter(0)
  %permute = (f32[4,8]{1,0}, f32[4,8]{1,0}, u32[], u32[]) collective-permute-start(%x), source_target_pairs={{0,1}}
  %permuted = f32[4,8]{1,0} collective-permute-done(%permute)
  %start = ((f32[4,8]{1,0}), f32[16,8]{1,0}, u32[]) async-start(%permuted), calls=%gathering
  %update = ((f32[4,8]{1,0}), f32[16,8]{1,0}, u32[]) async-update(%start), calls=%gathering
  ROOT %done = f32[16,8]{1,0} async-done(%update), calls=%gathering
}
"""
    cost = hlo.count(text)
    assert cost.collectives == {"collective-permute": 1, "all-gather": 1}
    assert cost.sent == {"collective-permute": 4 * 8 * 4, "all-gather": 3 * 4 * 8 * 4}


def test_kernels_count_what_they_say():
    """A Pallas kernel with a cost estimate, one without, whose attributes are on lines of their own, and no kernel."""
    known = 'backend_config={"custom_call_config":{"body":"","cost_estimate":{"flops":"1024","transcendentals":"0"}}}'
    kernel = 'f32[8,8]{1,0} custom-call(%x), custom_call_target="tpu_custom_call"'
    text = f"""
ENTRY %main (x: f32[8,8]) -> f32[8,8] {{
  %x = f32[8,8]{{1,0}} parameter(0)
  %product.3 = {kernel}, {known}
  %splash.1 = {kernel}, frontend_attributes={{kernel_metadata={{
"xprof_metadata":"{{}}"
}}}}, metadata={{op_name="splash"}}, backend_config={{"custom_call_config":{{"body":""}}}}
  ROOT %whole = f32[8,8]{{1,0}} custom-call(%splash.1), custom_call_target="ConcatBitcast"
}}
"""
    cost = hlo.count(text)
    assert cost.flops == 1024 and cost.unknown == {"splash": 1}
