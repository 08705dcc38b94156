"""Layers that SigLIP and Gemma share: projections, layer norm, activation, attention.

Axes: B batch, T queries, S keys, W width, N heads, K key/value heads, G = N/K, H head dim.
Values are rounded to the compute dtype at the places that `pi0.numerics.ROUNDING` lists, and nowhere else.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from jaxtyping import Bool, Float
from torch import Tensor, nn

from pi0 import numerics
from pi0.recording import record
from pi0_torch.models.lora import LoRA, at_least_float32


def cast(x: Tensor, place: str, dtype: str) -> Tensor:
    """`x`, of any shape, in the dtype of `pi0.numerics.ROUNDING` for `place` in a model that computes in `dtype`."""
    return x.to(getattr(torch, numerics.rounding(place, dtype)))


def dtype_name(x: Tensor) -> str:
    """The dtype of `x`, of any shape, as `pi0.numerics` names it."""
    return str(x.dtype).removeprefix("torch.")


class Linear(nn.Module):
    """y = x·weightᵀ (+ bias): weight [out, in], the axes of heads flat; in `dtype`, rounded once at the end.

    `lora`, for projections without bias, is added to it.
    """

    def __init__(self, in_features: int, out_features: int, *, bias: bool, dtype: str, lora: LoRA | None = None):
        super().__init__()
        self.dtype, self.lora = getattr(torch, dtype), lora
        scale = 1 / math.sqrt(in_features)
        init = nn.init.trunc_normal_(torch.empty(out_features, in_features), a=-2, b=2).mul_(scale)
        self.weight = nn.Parameter(init)
        self.bias = nn.Parameter(torch.zeros(out_features)) if bias else None

    def forward(self, x: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        """[..., in] to [..., out]."""
        bias = None if self.bias is None else self.bias.to(self.dtype)
        y = F.linear(x.to(self.dtype), self.weight.to(self.dtype), bias)
        return y if self.lora is None else y + self.lora(x)

    def merged_weight(self) -> Float[Tensor, "out in"]:
        """The weight, with the low-rank update added in float32 where there is one."""
        return self.weight if self.lora is None else at_least_float32(self.weight) + self.lora.update()


class LayerNorm(nn.Module):
    """Layer norm over the last axis, in float32, rounded to `dtype`."""

    def __init__(self, width: int, *, dtype: str):
        super().__init__()
        self.dtype = dtype
        self.scale = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width))

    def forward(self, x: Float[Tensor, "... W"]) -> Float[Tensor, "... W"]:
        """The norm over the last axis."""
        scale, bias = cast(self.scale, "norm", self.dtype), cast(self.bias, "norm", self.dtype)
        normed = F.layer_norm(cast(x, "norm", self.dtype), scale.shape, scale, bias, numerics.LAYER_NORM_EPS)
        return normed.to(getattr(torch, self.dtype))


def gelu(x: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    """GELU with the tanh approximation, in float32, rounded to the dtype of `x`."""
    return F.gelu(cast(x, "activation", dtype_name(x)), approximate="tanh").to(x.dtype)


def attention(
    q: Float[Tensor, "B T N H"],
    k: Float[Tensor, "B S K H"],
    v: Float[Tensor, "B S K H"],
    mask: Bool[Tensor, "B T S"] | None = None,
) -> Float[Tensor, "B T N H"]:
    """Grouped-query attention, scaled by H^-0.5; float32 logits and softmax, `v`'s dtype otherwise."""
    batch, queries, heads, head_dim = q.shape
    q = q.reshape(batch, queries, k.shape[2], heads // k.shape[2], head_dim)
    q, k = cast(q, "attention_logits", dtype_name(q)), cast(k, "attention_logits", dtype_name(k))
    logits = record("logits", torch.einsum("BTKGH,BSKH->BKGTS", q, k) * head_dim**-0.5)
    if mask is not None:
        logits = logits.masked_fill(~record("mask", mask)[:, None, None], numerics.MASKED_LOGIT)
    probabilities = cast(logits.softmax(dim=-1), "attention_probabilities", dtype_name(v))
    out = torch.einsum("BKGTS,BSKH->BTKGH", record("softmax", probabilities), v)
    return record("attention", out.reshape(batch, queries, heads, head_dim))


def remat(function: Callable[..., Any], config_remat: str) -> Callable[..., Any]:
    """`function`, whose intermediates the backward pass recomputes, all of them unless `config_remat` is "none"."""
    if config_remat == "none" or not torch.is_grad_enabled():
        return function
    return lambda *args: torch.utils.checkpoint.checkpoint(function, *args, use_reentrant=False)
