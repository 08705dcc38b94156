"""LoRA: a low-rank update beside a projection, heads kept apart as in openpi's checkpoints.

Axes: d width, n heads, k key/value heads, h head dim, m mlp, r rank.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from pi0 import numerics
from pi0.config import GemmaConfig
from pi0.recording import record


def at_least_float32(x: Array) -> Array:
    """`x`, of any shape, in float32, or in its own dtype where that is wider."""
    return x.astype(numerics.at_least_float32(x.dtype.name))


class LoRA(nnx.Module):
    """x·a·b × scale, in `dtype`: a [*in, (heads), r], b [(heads), r, *out]."""

    def __init__(self, in_axes: str, out_axes: str, sizes: dict[str, int], *, scale: float, dtype: str, rngs: nnx.Rngs):
        heads = "".join(axis for axis in in_axes + out_axes if axis in "nk")
        a_axes = in_axes + "".join(axis for axis in heads if axis not in in_axes) + "r"
        b_axes = heads + "r" + out_axes.replace(heads, "")
        self.heads_summed = bool(heads) and heads in in_axes  # openpi sums out's heads in either factor
        kept = "r" if self.heads_summed else heads + "r"
        self.first = f"...{in_axes},{a_axes}->...{kept}"
        self.second = f"...{kept},{kept}{out_axes.replace(heads, '')}->...{out_axes}"
        summed = b_axes.replace(heads, heads.upper()) if self.heads_summed else b_axes
        self.product = f"...{a_axes},...{summed}->...{in_axes}{out_axes}"
        self.scale, self.dtype = scale, dtype
        self.a = nnx.Param(
            jax.random.normal(rngs.params(), [sizes[axis] for axis in a_axes]) * numerics.LORA_INIT_STDDEV
        )
        self.b = nnx.Param(
            jax.random.normal(rngs.params(), [sizes[axis] for axis in b_axes]) * numerics.LORA_INIT_STDDEV
        )

    def __call__(self, x: Float[Array, "..."]) -> Float[Array, "..."]:
        x = jnp.einsum(self.first, x.astype(self.dtype), self.a[...].astype(self.dtype))
        b = self.b[...].astype(self.dtype)
        b = b.sum(axis=0) if self.heads_summed else b  # here, in float32: an einsum rounds each partial sum
        return record("LoRA", jnp.einsum(self.second, x, b) * self.scale)

    def update(self) -> Float[Array, "..."]:
        """a·b × scale in the kernel's axes (after those of stacked layers), float32."""
        a, b = at_least_float32(self.a[...]), at_least_float32(self.b[...])
        return jnp.einsum(self.product, a, b) * self.scale


def make_lora(
    config: GemmaConfig, in_axes: str, out_axes: str, *, scale: float, dtype: str, rngs: nnx.Rngs
) -> LoRA | None:
    """The update of one of an expert's projections, None where the expert has none."""
    if config.lora_rank is None:
        return None
    sizes = {"d": config.width, "n": config.num_heads, "k": config.num_kv_heads, "h": config.head_dim}
    sizes |= {"m": config.mlp_dim, "r": config.lora_rank}
    return LoRA(in_axes, out_axes, sizes, scale=scale, dtype=dtype, rngs=rngs)
