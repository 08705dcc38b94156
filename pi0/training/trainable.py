"""Trained and frozen parameters, by a pattern of their dotted names (`pi0.parameters`)."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping

NO_KERNEL = re.compile(r"(^|[._])(bias|scale|embedding)$")


def frozen_names(names: Collection[str], pattern: str) -> set[str]:
    """The names of frozen parameters: those in which `pattern` is found; "" freezes none.

    Raises ValueError for a pattern that is found in all or in none.
    """
    frozen = {name for name in names if pattern and re.search(pattern, name)}
    if len(frozen) == len(names):
        raise ValueError(f"the pattern {pattern!r} freezes every parameter")
    if pattern and not frozen:
        raise ValueError(f"the pattern {pattern!r} freezes no parameter; names are like {next(iter(names))}")
    return frozen


def is_kernel(name: str) -> bool:
    """Whether a parameter is a kernel or a low-rank update.

    Biases, scales of norms and embeddings are none (openpi `scripts/train.py`, `kernel_params`).
    """
    return not NO_KERNEL.search(name)


def table(trained: Mapping[str, tuple[int, ...]], frozen: Mapping[str, tuple[int, ...]]) -> str:
    """How many parameters of each part are trained and frozen, as text, from their shapes by name."""
    counts: dict[str, list[int]] = {}
    for column, shapes in enumerate((trained, frozen)):
        for name, shape in shapes.items():
            part = f"{name.split('.')[0]}, LoRA" if ".lora." in name else name.split(".")[0]
            counts.setdefault(part, [0, 0])[column] += math.prod(shape)
    rows = [*sorted(counts.items()), ("all", [sum(c[i] for c in counts.values()) for i in (0, 1)])]
    lines = [f"{'':<24} {'trained':>15} {'frozen':>15}"]
    return "\n".join(lines + [f"{part:<24} {a:>15,} {b:>15,}" for part, (a, b) in rows])
