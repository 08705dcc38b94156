"""LoRA: a low-rank update beside a projection, heads kept apart as in openpi's checkpoints.

Axes: d width, n heads, k key/value heads, h head dim, m mlp, r rank.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn

from pi0 import numerics
from pi0.config import GemmaConfig
from pi0.recording import record


def at_least_float32(x: Tensor) -> Tensor:
    """`x`, of any shape, in float32, or in its own dtype where that is wider."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


class LoRA(nn.Module):
    """x·a·b × scale, in `dtype`: a [*in, (heads), r], b [(heads), r, *out]; x and the result have flat heads."""

    def __init__(self, in_axes: str, out_axes: str, sizes: dict[str, int], *, scale: float, dtype: str):
        super().__init__()
        heads = "".join(axis for axis in in_axes + out_axes if axis in "nk")
        a_axes = in_axes + "".join(axis for axis in heads if axis not in in_axes) + "r"
        b_axes = heads + "r" + out_axes.replace(heads, "")
        self.heads_summed = bool(heads) and heads in in_axes  # openpi sums out's heads in either factor
        kept = "r" if self.heads_summed else heads + "r"
        self.first = f"...{in_axes},{a_axes}->...{kept}"
        self.second = f"...{kept},{kept}{out_axes.replace(heads, '')}->...{out_axes}"
        summed = b_axes.replace(heads, heads.upper()) if self.heads_summed else b_axes
        self.product = f"{a_axes},{summed}->{out_axes}{in_axes}"
        self.scale, self.dtype = scale, getattr(torch, dtype)
        self.in_sizes, self.out_ndim = tuple(sizes[axis] for axis in in_axes), len(out_axes)
        self.a = nn.Parameter(torch.randn([sizes[axis] for axis in a_axes]).mul_(numerics.LORA_INIT_STDDEV))
        self.b = nn.Parameter(torch.randn([sizes[axis] for axis in b_axes]).mul_(numerics.LORA_INIT_STDDEV))

    def forward(self, x: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        """The update of [..., in], [..., out]."""
        x = torch.einsum(self.first, x.to(self.dtype).unflatten(-1, self.in_sizes), self.a.to(self.dtype))
        b = self.b.to(self.dtype)
        b = b.sum(dim=0) if self.heads_summed else b
        x = torch.einsum(self.second, x, b)
        return record("LoRA", x * self.scale).flatten(-self.out_ndim)

    def update(self) -> Float[Tensor, "out in"]:
        """a·b × scale in the weight's axes, heads flat, float32."""
        product = torch.einsum(self.product, at_least_float32(self.a), at_least_float32(self.b)) * self.scale
        return product.flatten(0, self.out_ndim - 1).flatten(1)


def make_lora(config: GemmaConfig, in_axes: str, out_axes: str, *, scale: float, dtype: str) -> LoRA | None:
    """The update of one of an expert's projections, None where the expert has none."""
    if config.lora_rank is None:
        return None
    sizes = {"d": config.width, "n": config.num_heads, "k": config.num_kv_heads, "h": config.head_dim}
    sizes |= {"m": config.mlp_dim, "r": config.lora_rank}
    return LoRA(in_axes, out_axes, sizes, scale=scale, dtype=dtype)
