"""Faults of rounding alone, in bfloat16: the same function, and in float64 the same numbers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import ml_dtypes
import numpy as np
import torch
import torch.nn.functional as F

import pi0_torch.models.gemma as torch_gemma
import pi0_torch.models.layers as torch_layers
import pi0_torch.models.siglip as torch_siglip
from pi0 import numerics
from pi0.variants import get_variant
from pi0_eval.parity.frameworks import Results
from pi0_torch.models.lora import at_least_float32
from tests.faults.mutation import Mutation

# Stages before which too little is computed for many values to be on the other side of a rounding.
FIRST = ("vision layer 0", "suffix tokens", "prefix layer 0", "suffix layer 0")
OTHER_BITS = 0.1  # of a token's values: 0 differ of most tokens where nothing is wrong, 0.28 to 1 where it is

# PyTorch multiplies no two dtypes, as these would: `code` has the probabilities, with their product in float32. JAX
# adds no float32 velocity to bfloat16 actions.
REFUSED = [
    ("torch", "attention_probabilities", "queries"),
    ("torch", "attention_probabilities", "fast_queries"),
    ("torch", "attention_logits", "fast_queries"),
    ("jax", "action_projections", "queries"),
]


def other_bits(a: Results, b: Results) -> str | None:
    """The first of `FIRST` of which more than `OTHER_BITS` of the values of most tokens differ in bfloat16, if any.

    One value that is on the other side of a rounding by chance changes the tokens that attend to it, half of their
    values or so; a rounding at another place changes all tokens.
    """
    for stage in FIRST:
        if stage in a.stages:
            rounded = (results.stages[stage].astype(ml_dtypes.bfloat16) for results in (a, b))  # the suffix is float32
            if np.median(np.not_equal(*rounded).mean(axis=-1)) > OTHER_BITS:
                return f"bits of {stage}"
    return None


def places(variant: str) -> Iterator[Mutation]:
    """The other dtype at each place of `pi0.numerics.ROUNDING` that the model has."""
    config = get_variant(variant)
    flow, queries = config.action_expert is not None, config.family.query_rounding
    stages = {
        "patches": "vision layer 0",
        "norm": "vision layer 0",
        "rope": "prefix layer 0",
        queries: "prefix layer 0",
        "attention_logits": "vision layer 0",
        "attention_probabilities": "vision layer 0",
        "residual": "vision layer 0",
        "activation": "vision layer 0",
        **({"action_residual": "suffix layer 0", "time": "", "action_projections": "suffix tokens"} if flow else {}),
    }
    for place, stage in stages.items():
        dtype = {numerics.FLOAT32: numerics.COMPUTE, numerics.COMPUTE: numerics.FLOAT32}[numerics.ROUNDING[place]]
        name = f"{place} in {'bfloat16' if dtype == numerics.COMPUTE else 'float32'}"
        # The budget finds one alone: an angle of up to 1571 rad in 8 bits.
        first = f"bits of {stage}" if stage else "suffix layer 0" if variant == "tiny_pi05" else "suffix tokens"
        flipped = (numerics, "ROUNDING", numerics.ROUNDING | {place: dtype})
        for framework in ("torch", "jax"):
            if framework == "jax" and variant != "tiny_pi05" and place != "fast_queries":
                continue  # the same code, which compiles anew for each
            if (framework, place, queries) in REFUSED:
                continue
            if framework == "torch" and place == "activation":
                same = f"{name}: PyTorch computes GELU of bfloat16 in float32 all the same"
                yield Mutation(same, variant, (), patches=(flipped,), rounding=True)
                continue
            yield Mutation(name, variant, (first,), framework, patches=(flipped,), rounding=True)


def code(variant: str) -> Iterator[Mutation]:
    """Roundings of PyTorch's model that are no place's."""
    attend, normalize = torch_layers.attention, torch_gemma.normalize

    def each(name: str, stage: str, *patches: tuple[Any, str, Any]) -> Mutation:
        return Mutation(name, variant, (f"bits of {stage}",), patches=patches, rounding=True)

    def unrounded(q: Any, k: Any, v: Any, mask: Any = None) -> Any:
        return attend(q, k, at_least_float32(v), mask).to(v.dtype)

    def product(s: Any, x: Any) -> Any:
        return s.down(torch_gemma.gelu(at_least_float32(s.gate(x))) * s.up(x))

    def bias_after(s: Any, x: Any) -> Any:
        y = F.linear(x.to(s.dtype), s.weight.to(s.dtype))
        y = y if s.bias is None else y + s.bias.to(s.dtype)
        return y if s.lora is None else y + s.lora(x)

    def norm(s: Any, x: Any, condition: Any) -> Any:
        dtype = getattr(torch, s.dtype)
        return normalize(x, s.dtype).to(dtype) * (1 + s.scale).to(dtype), None

    def attention(value: Any) -> list[tuple[Any, str, Any]]:
        return [(module, "attention", value) for module in (torch_siglip, torch_gemma)]

    yield each("attention_probabilities in float32", "vision layer 0", *attention(unrounded))
    yield each("GELU not rounded before its product", "prefix layer 0", (torch_gemma.MLP, "forward", product))
    yield each("bias added after rounding", "vision layer 0", (torch_layers.Linear, "forward", bias_after))
    yield each("norm rounded before its scale", "prefix layer 0", (torch_gemma.RMSNorm, "forward", norm))
    text = lambda s, t: (s.embedding[t] * s.embedding.shape[-1] ** 0.5).to(s.dtype)  # noqa: E731
    yield each("text embedding rounded after its scale", "prefix layer 0", (torch_gemma.Expert, "embed", text))
