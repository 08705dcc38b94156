"""Attention of `pi0_torch.sampler` by name: PyTorch's kernels, those of flash-attn, and the reference.

Axes: B batch, N heads, K key/value heads, R query rows of one key head, S tokens attended to, H head dim, W width.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn.attention import flex_attention as flex

from pi0 import numerics
from pi0.config import ModelConfig
from pi0_torch.models.layers import cast, dtype_name

Attend = Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]  # of queries, keys, values and bias


def eager_attention(
    q: Float[Tensor, "B K R H"],
    k: Float[Tensor, "B K S H"],
    v: Float[Tensor, "B K S H"],
    bias: Float[Tensor, "B 1 R S"] | None,
) -> Float[Tensor, "B K R H"]:
    """Attention; float32 logits and softmax, `v`'s dtype otherwise. A key head's queries are rows of one product."""
    name = dtype_name(q)
    logits = cast(q, "attention_logits", name) @ cast(k, "attention_logits", name).mT * q.shape[-1] ** -0.5
    if bias is not None:
        logits = logits + bias
    return cast(logits.softmax(dim=-1), "attention_probabilities", dtype_name(v)) @ v


def sdpa_attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
    """`eager_attention` by PyTorch's fused kernels: q [B, K, R, H], k and v [B, K, S, H]."""
    return F.scaled_dot_product_attention(q, k, v, None if bias is None else bias.expand(-1, -1, q.shape[2], -1))


def flex_attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
    """`eager_attention` by a kernel that PyTorch generates: q [B, K, R, H], k and v [B, K, S, H]."""
    if bias is None:
        return flex.flex_attention(q, k, v)
    rows = bias.expand(-1, -1, q.shape[2], -1)
    return flex.flex_attention(q, k, v, score_mod=lambda score, b, h, i, j: score + rows[b, 0, i, j])


def flash_attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
    """`eager_attention` by the package flash-attn, which has no mask: padding is to be at the left (`pad_left`).

    Where rows have different masks, as those of π0's state and actions, it is `sdpa_attention`. q is [B, K, R, H], k
    and v [B, K, S, H].
    """
    if bias is not None and bias.shape[2] > 1:
        return sdpa_attention(q, k, v, bias)
    padding = None if bias is None else (bias[:, 0, 0] < 0).sum(dim=-1, dtype=torch.int32)
    return call_flash(*(x.transpose(1, 2).contiguous() for x in (q, k, v)), padding).transpose(1, 2)


@torch.library.custom_op("pi0::flash_attention", mutates_args=())
def call_flash(q: Tensor, k: Tensor, v: Tensor, padding: Tensor | None) -> Tensor:
    """Attention of q [B, R, N, H] over k and v [B, S, K, H] without the first `padding` [B] of S: one opaque operation.

    Source: https://github.com/Dao-AILab/flash-attention, `flash_attn_with_kvcache`.
    """
    import flash_attn

    if padding is None:
        return flash_attn.flash_attn_func(q, k, v)
    ends = torch.full_like(padding, k.shape[1])
    return flash_attn.flash_attn_with_kvcache(q, k, v, cache_seqlens=ends, cache_leftpad=padding)


@call_flash.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, padding: Tensor | None) -> Tensor:
    return torch.empty_like(q)


def pad_left(
    prefix: Float[Tensor, "B S W"], valid: Bool[Tensor, "B S"]
) -> tuple[Float[Tensor, "B S W"], Bool[Tensor, "B S"]]:
    """The tokens of each row in their order, those that are not valid before all others."""
    order = valid.to(torch.uint8).argsort(dim=1, stable=True)
    return prefix.take_along_dim(order[..., None], dim=1), valid.take_along_dim(order, dim=1)


ATTENTION = {"sdpa": sdpa_attention, "flex": flex_attention, "flash": flash_attention, "eager": eager_attention}


def attention_backend(name: str | None, config: ModelConfig, device: torch.device, compiled: bool = False) -> Attend:
    """The attention of this name; default: sdpa, or eager where queries and keys have different dtypes.

    Raises ValueError for one that is unknown or not available.
    """
    dtype = config.runtime.dtype
    mixed = numerics.rounding(config.family.query_rounding, dtype) != dtype
    if name is None:
        name = "eager" if mixed else "sdpa"
    if name not in ATTENTION:
        raise ValueError(f"attention is {name!r}; it must be one of {', '.join(ATTENTION)}")
    if mixed and name != "eager":
        raise ValueError(f"attention {name!r}: {config.family.title} has float32 queries, so {dtype} keys need eager")
    if name == "flex" and compiled and device.type == "cpu":
        raise ValueError("attention 'flex': PyTorch cannot compile it on a CPU; use sdpa, or compile=False")
    if name == "flash":
        lacking = {
            "the package flash-attn (pip install flash-attn)": importlib.util.find_spec("flash_attn") is not None,
            f"a GPU, not {device.type}": device.type == "cuda",
            f"dtype bfloat16, not {dtype}": dtype == "bfloat16",
        }
        if not all(lacking.values()):
            needs = "; ".join(need for need, met in lacking.items() if not met)
            raise ValueError(f"attention 'flash' needs {needs}; sdpa, the default, needs nothing")
    return ATTENTION[name]
