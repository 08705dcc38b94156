"""Decode text token by token, over a cache of fixed shape.

Axes: B batch, S places of the cache, V vocabulary, D decoded tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from pi0 import numerics

# Of a token [B, 1], its position [B, 1], the places [B, S] it attends to, its own place [1], and the cache, in which it
# takes its place: the logits [B, V] of the next token.
ReadToken = Callable[[Tensor, Tensor, Tensor, Tensor, Any], Tensor]


@torch.no_grad()
def decode(
    logits: Float[Tensor, "B V"],
    cache: Any,
    valid: Bool[Tensor, "B S"],
    start: int,
    steps: int,
    read_token: ReadToken,
    *,
    skipped: int = 0,
    read_last: bool = False,
    temperature: float = 0.0,
    rng: torch.Generator | None = None,
    allowed: Bool[Tensor, " V"] | None = None,
    eos_token: int = numerics.EOS_TOKEN,
    stages: dict[str, Tensor] | None = None,
) -> Int[Tensor, "B D"]:
    """At most D = `steps` tokens, int32, the first of which `logits` predict; the cache has them afterwards.

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
    places, length = torch.arange(valid.shape[1], device=valid.device), valid.sum(dim=1, keepdim=True)

    def choose(logits: Tensor, i: int, tokens: Tensor, done: Tensor) -> tuple[Tensor, Tensor]:
        """Write token i."""
        if kept is not None:
            kept[:, i] = logits.masked_fill(done[:, None], 0)
        if allowed is not None:
            logits = logits.masked_fill(~allowed, numerics.MASKED_LOGIT)
        if rng is not None and temperature > 0:
            token = (logits / temperature).softmax(dim=-1).multinomial(1, generator=rng)[:, 0]
        else:
            token = logits.argmax(dim=-1)
        token = token.masked_fill(done, 0)
        tokens[:, i] = token
        return tokens, done | (token == eos_token)

    def read(i: int, tokens: Tensor) -> Tensor:
        """Read token i − 1; the logits [B, V] of token i."""
        seen = valid | (places >= start) & (places < start + i)
        return read_token(tokens[:, i - 1, None], length + skipped + i - 1, seen, places[start + i - 1, None], cache)

    kept = None if stages is None else logits.new_zeros(len(valid), steps, logits.shape[1])
    tokens, done = valid.new_zeros(len(valid), steps, dtype=torch.int32), valid.new_zeros(len(valid))
    tokens, done = choose(logits, 0, tokens, done)
    i = 1
    while i < steps and not done.all():
        tokens, done = choose(read(i, tokens), i, tokens, done)
        i += 1
    if read_last:
        read(i, tokens)
    if stages is not None and kept is not None:
        stages["decoded_logits"] = kept
    return tokens


def written(tokens: Int[Tensor, "B D"], eos_token: int) -> Bool[Tensor, "B D"]:
    """Which tokens are text: all up to the first `eos_token`, itself included."""
    ends = tokens == eos_token
    return ends.cumsum(dim=1) - ends.int() == 0
