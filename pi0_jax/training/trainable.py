"""Trained and frozen parameters: split by a pattern of their dotted names, and joined again."""

from __future__ import annotations

import math
import re
from typing import Any

import jax.numpy as jnp

from pi0_jax.loading import flatten, unflatten

NO_KERNEL = re.compile(r"(^|[._])(bias|scale|embedding)$")


def split(params: dict[str, Any], pattern: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Nested parameters as (trained, frozen): `pattern` is found in the dotted names of frozen ones; "" freezes none.

    Raises ValueError for a pattern that is found in all or in none.
    """
    flat = flatten(params)
    frozen = {name for name in flat if pattern and re.search(pattern, name)}
    if len(frozen) == len(flat):
        raise ValueError(f"the pattern {pattern!r} freezes every parameter")
    if pattern and not frozen:
        raise ValueError(f"the pattern {pattern!r} freezes no parameter; names are like {next(iter(flat))}")
    trained = {name: value for name, value in flat.items() if name not in frozen}
    return unflatten(trained), unflatten({name: flat[name] for name in frozen})


def join(trained: dict[str, Any], frozen: dict[str, Any]) -> dict[str, Any]:
    """The inverse of `split`."""
    return unflatten(flatten(trained) | flatten(frozen))


def kernels(params: dict[str, Any]) -> dict[str, Any]:
    """The kernels and low-rank updates of nested parameters by dotted names, as float32.

    Without biases, scales of norms and embeddings (openpi `scripts/train.py`, `kernel_params`).
    """
    kept = {name: x for name, x in flatten(params).items() if not NO_KERNEL.search(name)}
    return {name: x.astype(jnp.float32) for name, x in kept.items()}


def table(trained: dict[str, Any], frozen: dict[str, Any]) -> str:
    """How many parameters of each part are trained and frozen, as text."""
    counts: dict[str, list[int]] = {}
    for column, params in enumerate((trained, frozen)):
        for name, leaf in flatten(params).items():
            part = f"{name.split('.')[0]}, LoRA" if ".lora." in name else name.split(".")[0]
            counts.setdefault(part, [0, 0])[column] += math.prod(leaf.shape)
    rows = [*sorted(counts.items()), ("all", [sum(c[i] for c in counts.values()) for i in (0, 1)])]
    lines = [f"{'':<24} {'trained':>15} {'frozen':>15}"]
    return "\n".join(lines + [f"{part:<24} {a:>15,} {b:>15,}" for part, (a, b) in rows])
