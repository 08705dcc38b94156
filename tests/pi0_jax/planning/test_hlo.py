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
