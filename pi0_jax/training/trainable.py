"""What trains and what is frozen: parameters by our dotted names, split by a pattern and joined again."""

from __future__ import annotations

import math
import re
from typing import Any

from pi0.config import ModelConfig
from pi0_jax.loading import flatten, unflatten

EVERYTHING_BUT_LORA = r"^({experts})\.(?!.*\.lora\.)"


def freeze_pattern(model: ModelConfig, freeze: str) -> str:
    """The pattern (a regular expression, searched in dotted names) of the parameters that a config freezes.

    `freeze` is such a pattern, "" for nothing, or "lora": all of the experts that have low-rank updates but these, as
    openpi's `get_freeze_filter` (the vision tower and the projections train on). Raises ValueError for "lora" in a
    model without, and for what is no pattern.
    """
    if freeze == "lora":
        experts = [name for name in ("paligemma", "action_expert") if getattr(getattr(model, name), "lora_rank", None)]
        if not experts:
            raise ValueError("freeze is 'lora', but neither expert of the model has a lora_rank")
        return EVERYTHING_BUT_LORA.format(experts="|".join(experts))
    try:
        re.compile(freeze)
    except re.error as error:
        raise ValueError(f"freeze is {freeze!r}, which is no regular expression: {error}") from error
    return freeze


def split(params: dict[str, Any], pattern: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Nested parameters as (those that train, those that are frozen). Raises ValueError where nothing trains."""
    flat = flatten(params)
    frozen = {name for name in flat if pattern and re.search(pattern, name)}
    if len(frozen) == len(flat):
        raise ValueError(f"the pattern {pattern!r} freezes every parameter")
    if pattern and not frozen:
        raise ValueError(f"the pattern {pattern!r} freezes no parameter; names are like {next(iter(flat))}")
    trains = {name: value for name, value in flat.items() if name not in frozen}
    return unflatten(trains), unflatten({name: flat[name] for name in frozen})


def join(trains: dict[str, Any], frozen: dict[str, Any]) -> dict[str, Any]:
    """The inverse of `split`."""
    return unflatten(flatten(trains) | flatten(frozen))


def table(trains: dict[str, Any], frozen: dict[str, Any]) -> str:
    """How many parameters of each part train, for people."""
    counts: dict[str, list[int]] = {}
    for column, params in enumerate((trains, frozen)):
        for name, leaf in flatten(params).items():
            part = f"{name.split('.')[0]}, LoRA" if ".lora." in name else name.split(".")[0]
            counts.setdefault(part, [0, 0])[column] += math.prod(leaf.shape)
    rows = [*sorted(counts.items()), ("all", [sum(c[i] for c in counts.values()) for i in (0, 1)])]
    lines = [f"{'':<24} {'trains':>15} {'frozen':>15}"]
    return "\n".join(lines + [f"{part:<24} {a:>15,} {b:>15,}" for part, (a, b) in rows])
