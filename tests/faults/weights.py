"""Faults in the weights, and in constants that both trees share."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import ml_dtypes
import numpy as np

from pi0 import numerics
from pi0.parameters import parameters
from pi0.variants import get_variant
from tests.faults.mutation import STEPS, Mutation, Weights


def weight_mutations(variant: str) -> Iterator[Mutation]:
    """Each parameter permuted, off by a millionth, and rounded to bfloat16."""

    def edit(name: str, change: Callable[[np.ndarray], np.ndarray]) -> Callable[[Weights], Weights]:
        return lambda weights: weights | {name: change(weights[name])}

    changes: dict[str, Callable[[np.ndarray], np.ndarray]] = {
        "permuted": lambda x: np.roll(x, 1, axis=-1),
        "a millionth larger": lambda x: x * np.float32(1.000001),
        "rounded to bfloat16": lambda x: x.astype(ml_dtypes.bfloat16).astype(np.float32),
    }
    for name in parameters(get_variant(variant)):
        for how, change in changes.items():
            equivalent = name == "vision.layers.attention.key.bias"  # adds one number to all logits of a query
            first = () if equivalent else stages_of(name, variant)
            yield Mutation(f"{name} {how}", variant, first, weights=edit(name, change))


def stages_of(name: str, variant: str) -> tuple[str, ...]:
    """The first stage that a parameter is in."""
    table = {
        "vision.final_norm": "image tokens",
        "vision.head": "image tokens",
        "vision": "vision layer 0",
        "paligemma.embedding": "prefix tokens",
        "paligemma.layers": "prefix layer 0",
        "paligemma.final_norm": "pre-logits" if variant == "tiny_pi0_fast" else "prefix out",
        "action_expert.layers": "suffix layer 0",
        "action_expert.final_norm": "suffix out",
        "action_out_proj": "velocity",
        "time_mlp": "suffix layer 0",
    }
    return (next((stage for part, stage in table.items() if name.startswith(part)), "suffix tokens"),)


def constants(variant: str) -> Iterator[Mutation]:
    """Shared constants and tables, in either tree."""
    suffix = "suffix layer 0" if variant == "tiny_pi05" else "suffix tokens"
    table: list[tuple[str, str, Any, str]] = [
        ("layer norm's epsilon 1e-5", "LAYER_NORM_EPS", 1e-5, "vision layer 0"),
        ("layer norm's epsilon 1e-12", "LAYER_NORM_EPS", 1e-12, "vision layer 0"),
        ("RMS norm's epsilon 1e-5", "RMS_NORM_EPS", 1e-5, "prefix layer 0"),
        ("RMS norm's epsilon 0", "RMS_NORM_EPS", 0.0, "prefix layer 0"),
        ("RoPE's base 10001", "ROPE_BASE", 10_001.0, "prefix layer 0"),
        ("RoPE's base 1e6", "ROPE_BASE", 1e6, "prefix layer 0"),
        ("masked logits -5", "MASKED_LOGIT", -5.0, "prefix layer 0"),
    ]
    if variant != "tiny_pi0_fast":
        real = numerics.time_frequencies
        later = numerics.euler_times
        table += [
            ("time's table in float64", "time_frequencies", float64_frequencies, suffix),
            ("time's frequencies reversed", "time_frequencies", lambda *a: real(*a)[::-1].copy(), suffix),
            ("Euler times one step late", "euler_times", lambda n: later(n) - np.float32(1 / n), "actions"),
            ("last Euler time is 0", "euler_times", lambda n: np.append(later(n)[:-1], np.float32(0)), "actions"),
            ("Euler times by linspace", "euler_times", lambda n: np.linspace(1, 1 / n, n, dtype=np.float32), "actions"),
            ("one Euler step more", "euler_times", lambda n: np.append(later(n), np.float32(0)), "actions"),
        ]
    for name, target, value, stage in table:
        if name == "Euler times by linspace" and np.array_equal(value(STEPS), numerics.euler_times(STEPS)):
            continue
        for framework in ("torch", "jax"):
            yield Mutation(name, variant, (stage,), framework, patches=((numerics, target, value),))
    name = "masked logits -1e9: their softmax is 0 all the same"
    yield Mutation(name, variant, (), patches=((numerics, "MASKED_LOGIT", -1e9),))


def float64_frequencies(width: int, periods: tuple[float, float] = numerics.TIME_PERIODS) -> np.ndarray:
    fraction = np.linspace(0, 1, width // 2)
    return 2 * np.pi / (periods[0] * (periods[1] / periods[0]) ** fraction)
