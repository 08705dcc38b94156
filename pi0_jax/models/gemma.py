"""Gemma, as one expert or two that share one attention: PaliGemma's language model and the action expert.

Axes: B batch, T tokens of one expert, S all tokens that are attended to, W width, N heads, K key/value heads, H head
dim, M mlp, L layers, V vocabulary. Layers are stacked on a leading axis and scanned.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from pi0 import numerics
from pi0.config import GemmaConfig
from pi0.recording import section
from pi0_jax.models.layers import Linear, attention, cast, constrain_rows, gelu, record, remat
from pi0_jax.models.lora import at_least_float32, make_lora

Cache = tuple[Float[Array, "L B S K H"], Float[Array, "L B S K H"]]


class TwoTimes(NamedTuple):
    """The condition at the flow time [B, W] and that at t = 0 [1, W], which tokens `given` [B, T] as they are have."""

    now: Float[Array, "B W"]
    clean: Float[Array, "1 W"]
    given: Bool[Array, "B T"]


Condition = Float[Array, "B W"] | TwoTimes


class RMSNorm(nnx.Module):
    """RMS norm in float32, × (1 + scale), rounded to `dtype`; gives no gate."""

    def __init__(self, width: int, *, dtype: str):
        self.dtype = dtype
        self.scale = nnx.Param(jnp.zeros(width))

    def __call__(self, x: Float[Array, "B T W"], condition: Condition | None) -> tuple[Float[Array, "B T W"], None]:
        scale = cast(self.scale[...], "norm", self.dtype)
        return (normalize(x, self.dtype) * (1 + scale)).astype(self.dtype), None


class AdaptiveRMSNorm(nnx.Module):
    """RMS norm whose scale, shift and gate are a projection of the condition (π0.5)."""

    def __init__(self, width: int, *, dtype: str, rngs: nnx.Rngs):
        self.dtype = dtype
        self.modulation = Linear((width,), (3 * width,), bias=True, dtype=dtype, rngs=rngs)
        self.modulation.kernel[...] = jnp.zeros((width, 3 * width))  # starts as the identity: gate 0

    def __call__(
        self, x: Float[Array, "B T W"], condition: Condition | None
    ) -> tuple[Float[Array, "B T W"], Float[Array, "B T W"]]:
        scale, shift, gate = self.modulate(condition)
        scale, shift = cast(scale, "norm", self.dtype), cast(shift, "norm", self.dtype)
        return (normalize(x, self.dtype) * (1 + scale) + shift).astype(self.dtype), gate

    def modulate(self, condition: Condition | None) -> Sequence[Float[Array, "B T W"]]:
        """Scale, shift and gate of each token, T = 1 for all alike."""
        assert condition is not None, "an adaptive norm needs a condition"
        if not isinstance(condition, TwoTimes):
            return jnp.split(record("modulation", self.modulation(condition))[:, None], 3, axis=-1)
        now, clean = (jnp.split(self.modulation(c)[:, None], 3, axis=-1) for c in (condition.now, condition.clean))
        given = condition.given[..., None]
        return [jnp.where(given, a, b) for a, b in zip(clean, now, strict=True)]


def normalize(x: Float[Array, "B T W"], dtype: str) -> Float[Array, "B T W"]:
    """x / rms(x) over the last axis, in float32."""
    x = cast(x, "norm", dtype)
    return x * jax.lax.rsqrt(jnp.square(x).mean(-1, keepdims=True) + numerics.RMS_NORM_EPS)


Rotation = tuple[Float[Array, "B T 1 half"], Float[Array, "B T 1 half"]]  # sine and cosine, half of H


def rotation(positions: Int[Array, "B T"], head_dim: int, dtype: str) -> Rotation:
    """The sines and cosines by which RoPE rotates heads at `positions`, float32."""
    angles = positions[..., None, None] / cast(jnp.asarray(numerics.rope_timescale(head_dim)), "rope", dtype)
    return record("sine", jnp.sin(angles)), record("cosine", jnp.cos(angles))


def apply_rope(x: Float[Array, "B T N H"], rotation: Rotation, dtype: str) -> Float[Array, "B T N H"]:
    """Rotary position embedding, half-split, in float32, rounded to `dtype`."""
    sin, cos = rotation
    first, second = jnp.split(cast(x, "rope", x.dtype.name), 2, axis=-1)
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return rotated.astype(dtype)


class Attention(nnx.Module):
    """One expert's projections into and out of the shared attention."""

    def __init__(self, config: GemmaConfig, *, dtype: str, query_dtype: str, rngs: nnx.Rngs):
        self.dtype, self.query_dtype = dtype, query_dtype
        width, heads = config.width, (config.num_heads, config.head_dim)
        kv_heads = (config.num_kv_heads, config.head_dim)
        lora = partial(make_lora, config, scale=config.lora_scale, dtype=dtype, rngs=rngs)
        self.query = Linear((width,), heads, bias=False, dtype=dtype, rngs=rngs, lora=lora("d", "nh"))
        self.key = Linear((width,), kv_heads, bias=False, dtype=dtype, rngs=rngs, lora=lora("d", "kh"))
        self.value = Linear((width,), kv_heads, bias=False, dtype=dtype, rngs=rngs, lora=lora("d", "kh"))
        self.out = Linear(heads, (width,), bias=False, dtype=dtype, rngs=rngs, lora=lora("nh", "d"))

    def project(self, x: Float[Array, "B T W"], rotation: Rotation) -> tuple[Array, Array, Array]:
        """Rotated queries [B, T, N, H] and keys [B, T, K, H], and values [B, T, K, H]."""
        q, k, v = record("query", self.query(x)), record("key", self.key(x)), record("value", self.value(x))
        q, k = apply_rope(q, rotation, self.query_dtype), apply_rope(k, rotation, self.dtype)
        return record("RoPE of query", q), record("RoPE of key", k), v


class MLP(nnx.Module):
    """gelu(x·gate) * (x·up) · down."""

    def __init__(self, config: GemmaConfig, *, dtype: str, rngs: nnx.Rngs):
        width, mlp_dim = config.width, config.mlp_dim
        lora = partial(make_lora, config, scale=1.0, dtype=dtype, rngs=rngs)
        self.gate = Linear((width,), (mlp_dim,), bias=False, dtype=dtype, rngs=rngs, lora=lora("d", "m"))
        self.up = Linear((width,), (mlp_dim,), bias=False, dtype=dtype, rngs=rngs, lora=lora("d", "m"))
        self.down = Linear((mlp_dim,), (width,), bias=False, dtype=dtype, rngs=rngs, lora=lora("m", "d"))

    def __call__(self, x: Float[Array, "B T W"]) -> Float[Array, "B T W"]:
        gate, up = record("MLP gate", self.gate(x)), record("MLP up", self.up(x))
        return self.down(record("GELU", gelu(gate)) * up)


class Block(nnx.Module):
    """One layer of one expert."""

    def __init__(self, config: GemmaConfig, *, adaptive: bool, dtype: str, query_dtype: str, rngs: nnx.Rngs):
        self.attention_norm = make_norm(config.width, adaptive=adaptive, dtype=dtype, rngs=rngs)
        self.attention = Attention(config, dtype=dtype, query_dtype=query_dtype, rngs=rngs)
        self.mlp_norm = make_norm(config.width, adaptive=adaptive, dtype=dtype, rngs=rngs)
        self.mlp = MLP(config, dtype=dtype, rngs=rngs)


def make_norm(width: int, *, adaptive: bool, dtype: str, rngs: nnx.Rngs) -> RMSNorm | AdaptiveRMSNorm:
    """The norm of an expert: adaptive where a condition is given to it."""
    return AdaptiveRMSNorm(width, dtype=dtype, rngs=rngs) if adaptive else RMSNorm(width, dtype=dtype)


class Expert(nnx.Module):
    """One transformer: stacked layers and a final norm; with `vocab_size`, the text embedding [V, W] too,
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
        attention: str = "plain",
        rngs: nnx.Rngs,
    ):
        self.head_dim, self.dtype, self.remat, self.attention = config.head_dim, dtype, remat, attention
        self.residual_dtype = residual_dtype or dtype
        if vocab_size is not None:
            self.embedding = nnx.Param(jax.random.normal(rngs.params(), (vocab_size, config.width)) * 0.01)
        self.tied_output = tied_output
        if not tied_output:
            self.output = nnx.Param(self.embedding[...])
        stack = nnx.split_rngs(splits=config.depth)(
            nnx.vmap(
                lambda rngs: Block(config, adaptive=adaptive, dtype=dtype, query_dtype=query_dtype or dtype, rngs=rngs)
            )
        )
        self.layers = stack(rngs)
        self.final_norm = make_norm(config.width, adaptive=adaptive, dtype=self.residual_dtype, rngs=rngs)

    def embed(self, tokens: Int[Array, "B T"]) -> Float[Array, "B T W"]:
        """Text embeddings × sqrt(W)."""
        x = constrain_rows(self.embedding[...][tokens].astype(self.dtype))
        return x * jnp.sqrt(x.shape[-1]).astype(self.dtype)

    def logits(self, x: Float[Array, "B T W"]) -> Float[Array, "B T V"]:
        """The vocabulary's logits, float32; multiplied in the wider dtype of the two."""
        output = self.embedding if self.tied_output else self.output
        return at_least_float32(jnp.matmul(x, output[...].T))


def gated_residual(x: Array, y: Array, gate: Array | None) -> Array:
    """x + y, or x + y·gate, all [B, T, W], in the dtype of `x`."""
    return x + y if gate is None else x + y.astype(x.dtype) * gate


def joint_layer(
    blocks: Sequence[Block],
    xs: Sequence[Float[Array, "B T W"]],
    rotations: Sequence[Rotation],
    mask: Bool[Array, "B T S"],
    conditions: Sequence[Condition | None],
    cached: tuple[Array, Array] | None,
    slot: Int[Array, ""] | None,
    implementation: str,
    insulated: bool,
) -> tuple[list[Float[Array, "B T W"]], tuple[Array, Array]]:
    """One layer of all experts: own norms, projections and MLPs around one shared attention over `cached` and `xs`.

    Keys and values are [B, S, K, H], those `cached` and those returned.
    """
    section("layer")
    normed, gates = zip(*(b.attention_norm(x, c) for b, x, c in zip(blocks, xs, conditions, strict=True)), strict=True)
    record("attention norm", normed)
    record("gate of attention", gates)
    projected = [b.attention.project(x, r) for b, x, r in zip(blocks, normed, rotations, strict=True)]
    q, k, v = (jnp.concatenate(parts, axis=1) for parts in zip(*projected, strict=True))
    if cached is not None and slot is not None:
        k, v = (jax.lax.dynamic_update_slice_in_dim(c, x, slot, axis=1) for c, x in zip(cached, (k, v), strict=True))
    elif cached is not None:
        k, v = jnp.concatenate([cached[0], k], axis=1), jnp.concatenate([cached[1], v], axis=1)
    if insulated:
        attended = insulated_attention(q, k, v, mask, xs[0].shape[1], implementation)
    else:
        attended = attention(q, k, v, mask, implementation)
    outs, start = [], 0
    for block, x, condition, gate in zip(blocks, xs, conditions, gates, strict=True):
        own = attended[:, start : start + x.shape[1]]
        start += x.shape[1]
        dtype, x = x.dtype, cast(x, "residual", x.dtype.name)
        x = record("attention residual", gated_residual(x, record("out projection", block.attention.out(own)), gate))
        y, gate = block.mlp_norm(x, condition)
        record("MLP norm", y)
        y = record("MLP down", block.mlp(y))
        x = record("MLP residual", gated_residual(x, y, record("gate of MLP", gate)))
        outs.append(x.astype(dtype))
    return outs, (k, v)


def insulated_attention(
    q: Float[Array, "B S N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    mask: Bool[Array, "B S S"],
    split: int,
    implementation: str,
) -> Float[Array, "B S N H"]:
    """`attention` of two experts, of which the first has `split` tokens; its keys and values get no gradient from the
    second one's queries, and its queries do not attend to the second ("Knowledge Insulating Vision-Language-Action
    Models", section V).
    """
    first = attention(q[:, :split], k[:, :split], v[:, :split], mask[:, :split, :split], implementation)
    k, v = (jnp.concatenate([jax.lax.stop_gradient(x[:, :split]), x[:, split:]], axis=1) for x in (k, v))
    return jnp.concatenate([first, attention(q[:, split:], k, v, mask[:, split:], implementation)], axis=1)


def joint_forward(
    experts: Sequence[Expert],
    xs: Sequence[Float[Array, "B T W"]],
    positions: Sequence[Int[Array, "B T"]],
    mask: Bool[Array, "B T S"],
    conditions: Sequence[Condition | None],
    cache: Cache | None = None,
    slot: Int[Array, ""] | None = None,
    stages: dict[str, Array] | None = None,
    insulated: bool = False,
) -> tuple[list[Float[Array, "B T W"]], Cache]:
    """Run one or both experts through all layers. Returns their outputs after the final norms, and keys and values.

    `xs`, `positions`, `conditions`: one entry per expert of `experts`, in order; all queries T together attend to
    the S tokens of `cache` (where given) followed by all of `xs`; or, with `slot`, to the S places of `cache`, of which
    the one token of `xs` takes that one. `stages`, where given, receives `layers.{i}` [L, B, T, W] of the i-th expert.
    `insulated` keeps the second expert's gradient out of the first (`insulated_attention`).
    """

    def layer(xs: list[Array], scanned: tuple[list[Block], Cache | None]) -> tuple[list[Array], Any]:
        xs, (blocks, cached) = [constrain_rows(x) for x in xs], scanned
        xs, keys_values = joint_layer(
            blocks, xs, rotations, mask, conditions, cached, slot, experts[0].attention, insulated
        )
        return xs, (keys_values, None if stages is None else xs)

    section("RoPE")
    rotations = [rotation(p, e.head_dim, e.dtype) for e, p in zip(experts, positions, strict=True)]
    xs = [x.astype(e.residual_dtype) for e, x in zip(experts, xs, strict=True)]
    kept = remat(layer, experts[0].remat if cache is None else "none")  # sampling keeps little
    xs, (cache, outputs) = jax.lax.scan(kept, xs, ([e.layers for e in experts], cache))
    if stages is not None:
        stages.update({f"layers.{i}": output for i, output in enumerate(outputs)})
    section("out")
    outs = [e.final_norm(x, c)[0] for e, x, c in zip(experts, xs, conditions, strict=True)]
    return record("final norm", outs), cache
