"""Layers that SigLIP and Gemma share: projections, layer norm, activation, attention.

Axes: B batch, T queries, S keys, W width, N heads, K key/value heads, G = N/K, H head dim.
Values are rounded to the compute dtype at the places that `pi0.numerics.ROUNDING` lists, and nowhere else.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float

from pi0 import numerics, recording
from pi0_jax.models.lora import LoRA, at_least_float32

T = TypeVar("T")
AXES = ("data", "fsdp", "tensor")  # of the mesh, see `pi0_jax.training.sharding`
ROWS = PartitionSpec(("data", "fsdp"))  # of arrays whose first axis is the batch
HOST_MEMORY = "pinned_host"  # JAX's name of the memory of a device's host

# The results of operations, by their names in `record`, that `remat` keeps for the backward pass.
ATTENTION = ("query", "key", "value", "RoPE of query", "RoPE of key", "attention", "attention residual")
KEPT = {"full": (), "wide": ATTENTION, "mlp": (*ATTENTION, "softmax")}


def record(name: str, value: T) -> T:
    """`pi0.recording.record`, and the name by which `remat` keeps the value."""
    return jax.tree.map(lambda x: checkpoint_name(x, name), recording.record(name, value))


def constrain_rows(x: jax.Array) -> jax.Array:
    """Keep the first axis of [B, ...] over `data` and `fsdp`, and the others whole; a batch too small stays whole."""
    mesh = jax.sharding.get_abstract_mesh()
    if not set(AXES) <= set(mesh.axis_names) or x.shape[0] % (mesh.shape["data"] * mesh.shape["fsdp"]):
        return x
    return jax.lax.with_sharding_constraint(x, ROWS)


def cast(x: Array, place: str, dtype: str) -> Array:
    """`x`, of any shape, in the dtype of `pi0.numerics.ROUNDING` for `place` in a model that computes in `dtype`."""
    return x.astype(numerics.rounding(place, dtype))


class Linear(nnx.Module):
    """y = x·kernel (+ bias): kernel [*in, *out], the axes of heads kept apart; in `dtype`, rounded once at the end.

    `lora`, for projections without bias, is added to it.
    """

    def __init__(
        self,
        in_axes: tuple[int, ...],
        out_axes: tuple[int, ...],
        *,
        bias: bool,
        dtype: str,
        rngs: nnx.Rngs,
        lora: LoRA | None = None,
    ):
        self.in_ndim, self.dtype, self.lora = len(in_axes), dtype, lora
        scale = 1 / math.sqrt(math.prod(in_axes))
        init = jax.random.truncated_normal(rngs.params(), -2, 2, (*in_axes, *out_axes)) * scale
        self.kernel = nnx.Param(init)
        self.bias = nnx.Param(jnp.zeros(out_axes)) if bias else None

    def __call__(self, x: Float[Array, "..."]) -> Float[Array, "..."]:
        x, kernel = x.astype(self.dtype), self.kernel[...].astype(self.dtype)
        if self.bias is None:
            y = jnp.tensordot(x, kernel, axes=self.in_ndim)
            return y if self.lora is None else y + self.lora(x)
        y = jnp.tensordot(x, kernel, axes=self.in_ndim, preferred_element_type=numerics.at_least_float32(self.dtype))
        return (y + self.bias[...].astype(self.dtype)).astype(self.dtype)

    def merged_kernel(self) -> Float[Array, "..."]:
        """The kernel, with the low-rank update added in float32 where there is one."""
        kernel = self.kernel[...]
        return kernel if self.lora is None else at_least_float32(kernel) + self.lora.update()


class LayerNorm(nnx.Module):
    """Layer norm over the last axis, in float32, rounded to `dtype`."""

    def __init__(self, width: int, *, dtype: str):
        self.dtype = dtype
        self.scale = nnx.Param(jnp.ones(width))
        self.bias = nnx.Param(jnp.zeros(width))

    def __call__(self, x: Float[Array, "... W"]) -> Float[Array, "... W"]:
        x = cast(x, "norm", self.dtype)
        mean = x.mean(-1, keepdims=True)
        variance = jnp.square(x - mean).mean(-1, keepdims=True)
        normed = (x - mean) * jax.lax.rsqrt(variance + numerics.LAYER_NORM_EPS)
        return (normed * self.scale[...] + self.bias[...]).astype(self.dtype)


def gelu(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """GELU with the tanh approximation, in float32, rounded to the dtype of `x`."""
    return jax.nn.gelu(cast(x, "activation", x.dtype.name), approximate=True).astype(x.dtype)


def attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    mask: Bool[Array, "B T S"] | None = None,
    implementation: str = "plain",
) -> Float[Array, "B T N H"]:
    """Grouped-query attention, scaled by H^-0.5; float32 logits and softmax, `v`'s dtype otherwise.

    `implementation` is the config's `attention`; "xla" and "cudnn" round at the same places as "plain".
    """
    if implementation != "plain":
        mask = None if mask is None else mask[:, None]
        out = jax.nn.dot_product_attention(q, k, v, mask=mask, implementation=implementation)  # type: ignore[call-overload]
        return record("attention", out)
    batch, queries, heads, head_dim = q.shape
    q = q.reshape(batch, queries, k.shape[2], heads // k.shape[2], head_dim)
    accumulator = numerics.rounding("attention_logits", q.dtype.name)
    products = jnp.einsum("BTKGH,BSKH->BKGTS", q, k, preferred_element_type=accumulator)
    logits = record("logits", products * head_dim**-0.5)
    if mask is not None:
        logits = jnp.where(record("mask", mask)[:, None, None], logits, numerics.MASKED_LOGIT)
    probabilities = cast(jax.nn.softmax(logits, axis=-1), "attention_probabilities", v.dtype.name)
    out = jnp.einsum("BKGTS,BSKH->BTKGH", record("softmax", probabilities), v)
    return record("attention", out.reshape(batch, queries, heads, head_dim))


def remat(layer: Callable[..., Any], config_remat: str) -> Callable[..., Any]:
    """A layer, whose intermediates the backward pass recomputes but for those that `config_remat` keeps.

    The input of the layer, its first argument, is always kept; for "offload", in the host's memory.
    """
    policies = jax.checkpoint_policies
    if config_remat == "none":
        return layer
    if config_remat in KEPT:
        policy = policies.save_only_these_names(*KEPT[config_remat])
    elif config_remat == "offload":
        policy = policies.save_and_offload_only_these_names(
            names_which_can_be_saved=[],
            names_which_can_be_offloaded=["input"],
            offload_src="device",
            offload_dst=HOST_MEMORY,
        )
    else:
        policy = getattr(policies, config_remat)

    def named(x: Any, *args: Any) -> Any:
        return layer(jax.tree.map(lambda x: checkpoint_name(x, "input"), x), *args)

    return jax.checkpoint(named, prevent_cse=False, policy=policy)
