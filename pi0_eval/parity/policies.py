"""What of two policies stands around their models: settings, and normalization of state and actions."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from pi0.assets import Assets
from pi0.robots.normalize import PADDING, RANGES, REQUIRED, NormStats, modes_of
from pi0_eval.parity.inputs import Inputs
from pi0_eval.parity.report import PROOF, Row

SETTINGS = ("robot", "tokenizer", "action_tokenizer", "subtasks", "state_in_prompt")


def policy_rows(a: Assets, b: Assets, inputs: Inputs) -> tuple[list[Row], list[Row]]:
    """Rows before those of the models, settings and normalized state, and after them, unnormalized actions.

    Compared is what both checkpoints say, and norm stats that A has: where B has none, it does not run as a policy.
    """
    before = [row] if (row := _settings(a, b)) else []
    if not a.norm_stats:
        return before, []
    observed = np.asarray(inputs.observation.state, np.float64)
    return before + _normalization(a, b, "state", observed), _normalization(a, b, "actions", inputs.actions)


def _settings(a: Assets, b: Assets) -> Row | None:
    said = {name: (_said(getattr(a, name)), _said(getattr(b, name))) for name in SETTINGS}
    said = {name: pair for name, pair in said.items() if None not in pair}
    different = {name: pair for name, pair in said.items() if pair[0] != pair[1]}
    if not different and all(isinstance(pair[0], bool) for pair in said.values()):
        return None  # nothing but defaults
    share = len(different) / len(said)
    detail = "; ".join(f"{name}: {one!r} against {other!r}" for name, (one, other) in different.items())
    return Row("settings", share, 0.0, 0.0, share, 0.0, detail)


def _said(value: Any) -> Any:
    """A setting without the path of its files, which is another one in every checkpoint."""
    return {k: v for k, v in value.items() if k != "source"} if isinstance(value, Mapping) else value


def _normalization(a: Assets, b: Assets, key: str, normalized: np.ndarray) -> list[Row]:
    """How far apart two policies normalize the state, or unnormalize actions: none without A's stats of it."""
    stage = "normalized state" if key == "state" else "unnormalized actions"
    if a.norm_stats is None or key not in a.norm_stats:
        return []
    if b.norm_stats is None or key not in b.norm_stats:
        return [Row(stage, np.inf, 0.0, 0.0, np.inf, PROOF, f"B has no norm stats of {key}")]
    stats = [_stored(assets.norm_stats[key]) for assets in (a, b) if assets.norm_stats]
    dims = min(len(one.mean) for one in stats)
    for one in stats:
        if any(np.abs(x[dims:]).max(initial=0) > PADDING for x in (one.mean, one.std)):
            sizes = " against ".join(str(len(one.mean)) for one in stats)
            return [Row(stage, np.inf, 0.0, 0.0, np.inf, PROOF, f"norm stats of {key} have {sizes} dimensions")]
    (modes_a, eps_a), (modes_b, eps_b) = (modes_of(x.normalization or x.model.family.normalization) for x in (a, b))
    options = (modes_a[key], eps_a), (modes_b[key], eps_b)
    values = normalized[..., :dims]
    if key == "state":
        values = stats[0].invert(values, *options[0], exact=True)
    convert = NormStats.apply if key == "state" else NormStats.invert
    x, y = (convert(one, values, *option) for one, option in zip(stats, options, strict=True))
    error = float(np.linalg.norm(y - x) / max(np.linalg.norm(x), np.finfo(float).tiny))
    return [Row(stage, error, 0.0, 0.0, error, PROOF, "" if error <= PROOF else _difference(key, stats, options, dims))]


def _stored(stats: NormStats) -> NormStats:
    """The stats as float32, in which LeRobot's files have them."""
    return dataclasses.replace(stats, **{name: x.astype(np.float32) for name, x in stats.present().items()})


def _difference(key: str, stats: list[NormStats], options: tuple[tuple[str, float], ...], dims: int) -> str:
    """The mode, or else the first number of the stats that differs, by name."""
    if options[0] != options[1]:
        return (
            f"normalization of {key}: {options[0][0]} (eps {options[0][1]}) against {options[1][0]} ({options[1][1]})"
        )
    for name in RANGES.get(options[0][0], REQUIRED):
        x, y = (getattr(one, name)[:dims] for one in stats)
        if (x != y).any():
            dim = int(np.argmax(x != y))
            return f"{key}.{name}[{dim}]: {x[dim]:.7g} against {y[dim]:.7g}"
    return f"normalization of {key}"
