"""Decode text token by token, over a cache of fixed shape.

Axes: B batch, S places of the cache, V vocabulary, D decoded tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from pi0 import numerics

# Of a token [B, 1], its position [B, 1], the places [B, S] it attends to, its own place, and the cache: the logits
# [B, V] of the next token, and the cache with this one in its place.
ReadToken = Callable[[Array, Array, Array, Array, Any], tuple[Array, Any]]


def decode(
    logits: Float[Array, "B V"],
    cache: Any,
    valid: Bool[Array, "B S"],
    start: int,
    steps: int,
    read_token: ReadToken,
    *,
    skipped: int = 0,
    read_last: bool = False,
    temperature: float = 0.0,
    rng: Array | None = None,
    allowed: Bool[Array, " V"] | None = None,
    eos_token: int = numerics.EOS_TOKEN,
    stages: dict[str, Array] | None = None,
) -> tuple[Int[Array, "B D"], Any]:
    """At most D = `steps` tokens, int32, the first of which `logits` predict; and the cache with them.

    `valid` are the places of the prefix that are attended to; the tokens take those from `start` on, and the last one
    only if asked to `read_last`. Token i has the position prefix length + `skipped` + i. Each row ends with `eos_token`
    and then zeros, or is cut; decoding ends when all rows have. Each token is the likeliest, or with a `temperature`
    drawn by `rng`, of those `allowed` (default: all). `stages`, where given, receives `decoded_logits` [B, D, V], from
    which each token was chosen, 0 after the end of a row. Raises ValueError for no steps, and for a temperature below 0
    or without `rng`.
    """
    if steps < 1:
        raise ValueError(f"max_decoding_steps is {steps}; it must be at least 1")
    if temperature < 0 or (temperature > 0 and rng is None):
        raise ValueError(f"temperature is {temperature}; it must be 0, or positive and with rng given")
    places, length = jnp.arange(valid.shape[1]), valid.sum(axis=1, keepdims=True)

    def choose(logits: Array, i: Array, tokens: Array, done: Array, kept: Any) -> tuple[Array, Array, Any]:
        """Write token i."""
        if kept is not None:
            kept = kept.at[:, i].set(jnp.where(done[:, None], 0, logits))
        if allowed is not None:
            logits = jnp.where(allowed, logits, numerics.MASKED_LOGIT)
        if rng is not None and temperature > 0:
            token = jax.random.categorical(jax.random.fold_in(rng, i), logits / temperature)
        else:
            token = jnp.argmax(logits, axis=-1)
        token = jnp.where(done, 0, token).astype(tokens.dtype)
        return tokens.at[:, i].set(token), done | (token == eos_token), kept

    def read(i: Array, cache: Any, tokens: Array) -> tuple[Array, Any]:
        """Read token i − 1; the logits [B, V] of token i."""
        seen = valid | (places >= start) & (places < start + i)
        token = jax.lax.dynamic_slice_in_dim(tokens, i - 1, 1, axis=1)
        return read_token(token, length + skipped + i - 1, seen, start + i - 1, cache)

    def step(carry: tuple) -> tuple:
        i, cache, *chosen = carry
        logits, cache = read(i, cache, chosen[0])
        return i + 1, cache, *choose(logits, i, *chosen)

    kept = None if stages is None else jnp.zeros((len(valid), steps, logits.shape[1]), logits.dtype)
    empty = jnp.zeros((len(valid), steps), jnp.int32), jnp.zeros(len(valid), bool), kept
    carry = (jnp.int32(1), cache, *choose(logits, jnp.int32(0), *empty))
    i, cache, tokens, _, kept = jax.lax.while_loop(lambda c: (c[0] < steps) & ~c[3].all(), step, carry)
    if stages is not None:
        stages["decoded_logits"] = kept
    return tokens, read(i, cache, tokens)[1] if read_last else cache


def written(tokens: Int[Array, "B D"], eos_token: int) -> Bool[Array, "B D"]:
    """Which tokens are text: all up to the first `eos_token`, itself included."""
    ends = tokens == eos_token
    return jnp.cumsum(ends, axis=1) - ends == 0
