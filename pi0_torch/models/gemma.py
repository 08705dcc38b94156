"""Gemma, as one expert or two that share one attention: PaliGemma's language model and the action expert.

Axes: B batch, T tokens of one expert, S all tokens that are attended to, W width, N heads, K key/value heads, H head
dim, M mlp, L layers, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from pi0 import numerics
from pi0.config import GemmaConfig
from pi0.recording import record, section
from pi0_torch.models.layers import Linear, attention, cast, dtype_name, gelu, remat
from pi0_torch.models.lora import at_least_float32, make_lora

Cache = list[tuple[Float[Tensor, "B S K H"], Float[Tensor, "B S K H"]]]  # one entry per layer


class TwoTimes(NamedTuple):
    """The condition at the flow time [B, W] and that at t = 0 [1, W], which tokens `given` [B, T] as they are have."""

    now: Float[Tensor, "B W"]
    clean: Float[Tensor, "1 W"]
    given: Bool[Tensor, "B T"]


Condition = Float[Tensor, "B W"] | TwoTimes


class RMSNorm(nn.Module):
    """RMS norm in float32, × (1 + scale), rounded to `dtype`; gives no gate."""

    def __init__(self, width: int, *, dtype: str):
        super().__init__()
        self.dtype = dtype
        self.scale = nn.Parameter(torch.zeros(width))

    def forward(self, x: Float[Tensor, "B T W"], condition: Condition | None) -> tuple[Float[Tensor, "B T W"], None]:
        """The norm of `x`, and no gate."""
        scale = cast(self.scale, "norm", self.dtype)
        return (normalize(x, self.dtype) * (1 + scale)).to(getattr(torch, self.dtype)), None


class AdaptiveRMSNorm(nn.Module):
    """RMS norm whose scale, shift and gate are a projection of the condition (π0.5)."""

    def __init__(self, width: int, *, dtype: str):
        super().__init__()
        self.dtype = dtype
        self.modulation = Linear(width, 3 * width, bias=True, dtype=dtype)
        nn.init.zeros_(self.modulation.weight)  # starts as the identity: gate 0

    def forward(
        self, x: Float[Tensor, "B T W"], condition: Condition | None
    ) -> tuple[Float[Tensor, "B T W"], Float[Tensor, "B T W"]]:
        """The norm of `x`, scaled and shifted by the condition, and the gate."""
        scale, shift, gate = self.modulate(condition)
        scale, shift = cast(scale, "norm", self.dtype), cast(shift, "norm", self.dtype)
        return (normalize(x, self.dtype) * (1 + scale) + shift).to(getattr(torch, self.dtype)), gate

    def modulate(self, condition: Condition | None) -> Sequence[Float[Tensor, "B T W"]]:
        """Scale, shift and gate of each token, T = 1 for all alike."""
        assert condition is not None, "an adaptive norm needs a condition"
        if not isinstance(condition, TwoTimes):
            return record("modulation", self.modulation(condition))[:, None].chunk(3, dim=-1)
        now, clean = (self.modulation(c)[:, None].chunk(3, dim=-1) for c in (condition.now, condition.clean))
        given = condition.given[..., None]
        return [torch.where(given, a, b) for a, b in zip(clean, now, strict=True)]


def normalize(x: Float[Tensor, "B T W"], dtype: str) -> Float[Tensor, "B T W"]:
    """x / rms(x) over the last axis, in float32."""
    x = cast(x, "norm", dtype)
    return F.rms_norm(x, x.shape[-1:], eps=numerics.RMS_NORM_EPS)


Rotation = tuple[Float[Tensor, "B T 1 half"], Float[Tensor, "B T 1 half"]]  # sine and cosine, half of H


def rotation(positions: Int[Tensor, "B T"], head_dim: int, dtype: str) -> Rotation:
    """The sines and cosines by which RoPE rotates heads at `positions`, float32."""
    timescale = torch.from_numpy(numerics.rope_timescale(head_dim)).to(positions.device)
    angles = positions[..., None, None] / cast(timescale, "rope", dtype)
    return record("sine", angles.sin()), record("cosine", angles.cos())


def apply_rope(x: Float[Tensor, "B T N H"], rotation: Rotation, dtype: str) -> Float[Tensor, "B T N H"]:
    """Rotary position embedding, half-split, in float32, rounded to `dtype`."""
    sin, cos = rotation
    first, second = cast(x, "rope", dtype_name(x)).chunk(2, dim=-1)
    rotated = torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)
    return rotated.to(getattr(torch, dtype))


class Attention(nn.Module):
    """One expert's projections into and out of the shared attention."""

    def __init__(self, config: GemmaConfig, *, dtype: str, query_dtype: str):
        super().__init__()
        self.dtype, self.query_dtype = dtype, query_dtype
        width, self.head_dim = config.width, config.head_dim
        heads, kv_heads = config.num_heads * self.head_dim, config.num_kv_heads * self.head_dim
        lora = partial(make_lora, config, scale=config.lora_scale, dtype=dtype)
        self.query = Linear(width, heads, bias=False, dtype=dtype, lora=lora("d", "nh"))
        self.key = Linear(width, kv_heads, bias=False, dtype=dtype, lora=lora("d", "kh"))
        self.value = Linear(width, kv_heads, bias=False, dtype=dtype, lora=lora("d", "kh"))
        self.out = Linear(heads, width, bias=False, dtype=dtype, lora=lora("nh", "d"))

    def project(self, x: Float[Tensor, "B T W"], rotation: Rotation) -> tuple[Tensor, Tensor, Tensor]:
        """Rotated queries [B, T, N, H] and keys [B, T, K, H], and values [B, T, K, H]."""
        heads = (-1, self.head_dim)
        q = record("query", self.query(x).unflatten(-1, heads))
        k = record("key", self.key(x).unflatten(-1, heads))
        v = record("value", self.value(x).unflatten(-1, heads))
        q, k = apply_rope(q, rotation, self.query_dtype), apply_rope(k, rotation, self.dtype)
        return record("RoPE of query", q), record("RoPE of key", k), v


class MLP(nn.Module):
    """gelu(x·gate) * (x·up) · down."""

    def __init__(self, config: GemmaConfig, *, dtype: str):
        super().__init__()
        width, mlp_dim = config.width, config.mlp_dim
        lora = partial(make_lora, config, scale=1.0, dtype=dtype)
        self.gate = Linear(width, mlp_dim, bias=False, dtype=dtype, lora=lora("d", "m"))
        self.up = Linear(width, mlp_dim, bias=False, dtype=dtype, lora=lora("d", "m"))
        self.down = Linear(mlp_dim, width, bias=False, dtype=dtype, lora=lora("m", "d"))

    def forward(self, x: Float[Tensor, "B T W"]) -> Float[Tensor, "B T W"]:
        """The MLP of each token."""
        gate, up = record("MLP gate", self.gate(x)), record("MLP up", self.up(x))
        return self.down(record("GELU", gelu(gate)) * up)


class Block(nn.Module):
    """One layer of one expert."""

    def __init__(self, config: GemmaConfig, *, adaptive: bool, dtype: str, query_dtype: str):
        super().__init__()
        self.attention_norm = make_norm(config.width, adaptive=adaptive, dtype=dtype)
        self.attention = Attention(config, dtype=dtype, query_dtype=query_dtype)
        self.mlp_norm = make_norm(config.width, adaptive=adaptive, dtype=dtype)
        self.mlp = MLP(config, dtype=dtype)

    def around(self, function: Callable[..., Any], *args: Any) -> Any:
        """`function` of `args`, which computes with this layer: where parameters are sharded, these are gathered."""
        return function(*args)


def make_norm(width: int, *, adaptive: bool, dtype: str) -> RMSNorm | AdaptiveRMSNorm:
    """The norm of an expert: adaptive where a condition is given to it."""
    return AdaptiveRMSNorm(width, dtype=dtype) if adaptive else RMSNorm(width, dtype=dtype)


class Expert(nn.Module):
    """One transformer: layers and a final norm; with `vocab_size`, the text embedding [V, W] too,
    and unless `tied_output`, the output projection [V, W].

    Rotated queries are rounded to `query_dtype`, what each layer and the final norm give to `residual_dtype` (default
    of both: `dtype`).
    """

    def __init__(
        self,
        config: GemmaConfig,
        *,
        adaptive: bool = False,
        vocab_size: int | None = None,
        tied_output: bool = True,
        dtype: str,
        query_dtype: str | None = None,
        residual_dtype: str | None = None,
        remat: str,
    ):
        super().__init__()
        self.head_dim, self.dtype, self.remat = config.head_dim, getattr(torch, dtype), remat
        self.residual_dtype = residual_dtype or dtype
        if vocab_size is not None:
            self.embedding = nn.Parameter(torch.randn(vocab_size, config.width).mul_(0.01))
        self.tied_output = tied_output
        if not tied_output:
            self.output = nn.Parameter(self.embedding.detach().clone())
        self.layers = nn.ModuleList(
            Block(config, adaptive=adaptive, dtype=dtype, query_dtype=query_dtype or dtype) for _ in range(config.depth)
        )
        self.final_norm = make_norm(config.width, adaptive=adaptive, dtype=self.residual_dtype)

    def embed(self, tokens: Int[Tensor, "B T"]) -> Float[Tensor, "B T W"]:
        """Text embeddings × sqrt(W)."""
        x = self.embedding[tokens].to(self.dtype)
        return x * torch.tensor(math.sqrt(x.shape[-1]), dtype=self.dtype, device=x.device)

    def logits(self, x: Float[Tensor, "B T W"]) -> Float[Tensor, "B T V"]:
        """The vocabulary's logits, float32; multiplied in the wider dtype of the two."""
        output = self.embedding if self.tied_output else self.output
        dtype = torch.promote_types(x.dtype, output.dtype)
        return at_least_float32(F.linear(x.to(dtype), output.to(dtype)))


def gated_residual(x: Tensor, y: Tensor, gate: Tensor | None) -> Tensor:
    """x + y, or x + y·gate, all [B, T, W], in the dtype of `x`."""
    return x + y if gate is None else x + y.to(x.dtype) * gate


def joint_layer(
    blocks: Sequence[Block],
    xs: Sequence[Float[Tensor, "B T W"]],
    rotations: Sequence[Rotation],
    mask: Bool[Tensor, "B T S"],
    conditions: Sequence[Condition | None],
    cached: tuple[Tensor, Tensor] | None,
    slot: Int[Tensor, " 1"] | None,
    insulated: bool,
) -> tuple[list[Float[Tensor, "B T W"]], tuple[Tensor, Tensor]]:
    """One layer of all experts: own norms, projections and MLPs around one shared attention over `cached` and `xs`.

    Keys and values are [B, S, K, H], those `cached` and those returned.
    """
    section("layer")
    normed, gates = zip(*(b.attention_norm(x, c) for b, x, c in zip(blocks, xs, conditions, strict=True)), strict=True)
    record("attention norm", normed)
    record("gate of attention", gates)
    projected = [b.attention.project(x, r) for b, x, r in zip(blocks, normed, rotations, strict=True)]
    q, k, v = (torch.cat(parts, dim=1) for parts in zip(*projected, strict=True))
    if cached is not None and slot is not None:
        k, v = (c.index_copy_(1, slot, x) for c, x in zip(cached, (k, v), strict=True))  # in place: nothing grows
    elif cached is not None:
        k, v = torch.cat([cached[0], k], dim=1), torch.cat([cached[1], v], dim=1)
    attended = insulated_attention(q, k, v, mask, xs[0].shape[1]) if insulated else attention(q, k, v, mask)
    outs, start = [], 0
    for block, x, condition, gate in zip(blocks, xs, conditions, gates, strict=True):
        own = attended[:, start : start + x.shape[1]].flatten(-2)
        start += x.shape[1]
        dtype, x = x.dtype, cast(x, "residual", dtype_name(x))
        x = record("attention residual", gated_residual(x, record("out projection", block.attention.out(own)), gate))
        y, gate = block.mlp_norm(x, condition)
        record("MLP norm", y)
        y = record("MLP down", block.mlp(y))
        x = record("MLP residual", gated_residual(x, y, record("gate of MLP", gate)))
        outs.append(x.to(dtype))
    return outs, (k, v)


def insulated_attention(
    q: Float[Tensor, "B S N H"],
    k: Float[Tensor, "B S K H"],
    v: Float[Tensor, "B S K H"],
    mask: Bool[Tensor, "B S S"],
    split: int,
) -> Float[Tensor, "B S N H"]:
    """`attention` of two experts, of which the first has `split` tokens; its keys and values get no gradient from the
    second one's queries, and its queries do not attend to the second ("Knowledge Insulating Vision-Language-Action
    Models", section V).
    """
    first = attention(q[:, :split], k[:, :split], v[:, :split], mask[:, :split, :split])
    k, v = (torch.cat([x[:, :split].detach(), x[:, split:]], dim=1) for x in (k, v))
    return torch.cat([first, attention(q[:, split:], k, v, mask[:, split:])], dim=1)


def joint_forward(
    experts: Sequence[Expert],
    xs: Sequence[Float[Tensor, "B T W"]],
    positions: Sequence[Int[Tensor, "B T"]],
    mask: Bool[Tensor, "B T S"],
    conditions: Sequence[Condition | None],
    cache: Cache | None = None,
    slot: Int[Tensor, " 1"] | None = None,
    stages: dict[str, Tensor] | None = None,
    insulated: bool = False,
) -> tuple[list[Float[Tensor, "B T W"]], Cache]:
    """Run one or both experts through all layers. Returns their outputs after the final norms, and keys and values.

    `xs`, `positions`, `conditions`: one entry per expert of `experts`, in order; all queries T together attend to
    the S tokens of `cache` (where given) followed by all of `xs`; or, with `slot`, to the S places of `cache`, of which
    the one token of `xs` takes that one. `stages`, where given, receives `layers.{i}` [L, B, T, W] of the i-th expert.
    `insulated` keeps the second expert's gradient out of the first (`insulated_attention`).
    """
    layer = remat(joint_layer, experts[0].remat if cache is None else "none")  # sampling keeps little
    xs = [x.to(getattr(torch, e.residual_dtype)) for e, x in zip(experts, xs, strict=True)]
    section("RoPE")
    rotations = [rotation(p, e.head_dim, dtype_name(x)) for e, p, x in zip(experts, positions, xs, strict=True)]
    outputs, new_cache = [], []
    for i, blocks in enumerate(zip(*(e.layers for e in experts), strict=True)):
        cached = None if cache is None else cache[i]
        run = layer
        for block in blocks:
            run = partial(block.around, run)
        xs, keys_values = run(blocks, xs, rotations, mask, conditions, cached, slot, insulated)
        outputs.append(xs)
        new_cache.append(keys_values)
    if stages is not None:
        stages.update({f"layers.{i}": torch.stack(output) for i, output in enumerate(zip(*outputs, strict=True))})
    section("out")
    outs = [e.final_norm(x, c)[0] for e, x, c in zip(experts, xs, conditions, strict=True)]
    return record("final norm", outs), new_cache
