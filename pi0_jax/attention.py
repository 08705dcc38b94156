"""Attention of `pi0_jax.sampler`.

Axes: B batch, K key/value heads, R query rows of one key head, T query tokens, S tokens attended to, H head dim.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pi0 import numerics
from pi0_jax.models.layers import cast


def attend(
    q: Float[Array, "B K R H"],
    k: Float[Array, "B K S H"],
    v: Float[Array, "B K S H"],
    bias: Float[Array, "B T S"] | None,
) -> Float[Array, "B K R H"]:
    """Attention; float32 logits and softmax, `v`'s dtype otherwise. A key head's queries are rows of one product."""
    probabilities = cast(attention_probabilities(q, k, bias), "attention_probabilities", v.dtype.name)
    return jnp.einsum("BKRS,BKSH->BKRH", probabilities, v)


def attention_probabilities(
    q: Float[Array, "B K R H"], k: Float[Array, "B K S H"], bias: Float[Array, "B T S"] | None
) -> Float[Array, "B K R S"]:
    """How much each row attends to each place: the softmax of its logits."""
    accumulator = numerics.rounding("attention_logits", q.dtype.name)
    logits = jnp.einsum("BKRH,BKSH->BKRS", q, k, preferred_element_type=accumulator) * q.shape[-1] ** -0.5
    if bias is not None:
        shape = logits.shape
        logits = logits.reshape(*shape[:2], bias.shape[1], -1, shape[-1]) + bias[:, None, :, None]
        logits = logits.reshape(shape)
    return jax.nn.softmax(logits, axis=-1)


@jax.custom_vjp
def attend_suffix(
    q: Float[Array, "B K R H"],
    k: Float[Array, "B K S H"],
    v: Float[Array, "B K S H"],
    bias: Float[Array, "B T S"],
    new_k: Float[Array, "B K T H"],
    new_v: Float[Array, "B K T H"],
) -> Float[Array, "B K R H"]:
    """`attend(q, k, v, bias)`, with a gradient in q and in the suffix's keys and values `new_k` and `new_v` alone.

    They are the last of `k` and `v` too. Those of the prefix depend on no action; their gradient is left out.
    """
    return attend(q, k, v, bias)


def _attend_suffix_forward(*args: Array) -> tuple[Array, tuple[Array, ...]]:
    return attend(*args[:4]), args


def _attend_suffix_backward(args: tuple[Array, ...], out: Array) -> tuple[Array | None, ...]:
    q, k, v, bias, new_k, new_v = args
    probabilities, suffix = attention_probabilities(q, k, bias), new_k.shape[2]
    slope = jnp.einsum("BKRH,BKSH->BKRS", out, v, preferred_element_type=probabilities.dtype)
    slope = probabilities * (slope - (probabilities * slope).sum(axis=-1, keepdims=True)) * q.shape[-1] ** -0.5
    of_q = jnp.einsum("BKRS,BKSH->BKRH", slope, k).astype(q.dtype)
    of_k = jnp.einsum("BKRS,BKRH->BKSH", slope[..., -suffix:], q).astype(new_k.dtype)
    of_v = jnp.einsum("BKRS,BKRH->BKSH", probabilities[..., -suffix:], out).astype(new_v.dtype)
    return of_q, None, None, None, of_k, of_v


attend_suffix.defvjp(_attend_suffix_forward, _attend_suffix_backward)
