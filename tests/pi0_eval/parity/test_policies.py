"""What parity compares of two policies around their models: settings, norm stats, normalization."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest

from pi0.assets import Assets
from pi0.robots.normalize import NormStats
from pi0.variants import get_variant
from pi0_eval.parity.inputs import Inputs
from pi0_eval.parity.policies import policy_rows
from pi0_eval.parity.report import Row

CONFIG = get_variant("tiny")
STATS = {
    key: NormStats.from_data(np.random.default_rng(i).normal(i, 2, (50, CONFIG.action_dim)))
    for i, key in enumerate(("state", "actions"))
}
TOKENIZER = {"kind": "sentencepiece", "source": "/a/tokenizer.model", "sha256": "1" * 64}
POLICY = Assets(CONFIG, STATS, "robot", "quantile", TOKENIZER, robot="aloha")


def rows(b: Assets, a: Assets = POLICY) -> dict[str, Row]:
    before, after = policy_rows(a, b, Inputs.random(CONFIG))
    return {row.stage: row for row in [*before, *after]}


def changed(key: str, name: str, change: Any) -> Assets:
    """POLICY with other norm stats."""
    values = change(getattr(STATS[key], name).copy())
    return dataclasses.replace(POLICY, norm_stats=STATS | {key: dataclasses.replace(STATS[key], **{name: values})})


def test_the_same_policy():
    stored = {key: dataclasses.replace(s, q01=s.q01.astype(np.float32)) for key, s in STATS.items()}  # as LeRobot does
    same = dataclasses.replace(POLICY, norm_stats=stored, tokenizer=TOKENIZER | {"source": "/b/tokenizer.model"})
    found = rows(same)
    assert list(found) == ["settings", "normalized state", "unnormalized actions"]
    assert all(row.passed for row in found.values())


@pytest.mark.parametrize("key", ["state", "actions"])
def test_other_stats_are_named(key: str):
    stage = "normalized state" if key == "state" else "unnormalized actions"
    other = rows(changed(key, "q99", lambda x: x + 1e-6 * (np.arange(len(x)) == 2)))[stage]
    assert not other.passed and other.detail.startswith(f"{key}.q99[2]: ")
    assert all(row.passed for row in rows(changed(key, "std", lambda x: 2 * x)).values())  # quantiles do not use it


@pytest.mark.parametrize(
    "mode", ["zscore", "quantiles", "quantile01", {"state": "min_max", "actions": "quantile", "eps": 1e-8}]
)
def test_other_formulas_are_named(mode: Any):
    found = rows(dataclasses.replace(POLICY, normalization=mode))["normalized state"]
    assert not found.passed and found.detail.startswith("normalization of state: quantile (eps 1e-08) against ")


def test_missing_stats():
    weights = dataclasses.replace(POLICY, norm_stats=None, asset_id=None)
    lost = rows(weights)
    assert lost["normalized state"].detail == "B has no norm stats of state" and not lost["unnormalized actions"].passed
    assert list(rows(POLICY, weights)) == ["settings"]  # what A does not say is not compared
    short = {key: NormStats(s.mean[:-1], s.std[:-1]) for key, s in STATS.items()}
    zscore = dataclasses.replace(POLICY, normalization="zscore")
    row = rows(dataclasses.replace(zscore, norm_stats=short), zscore)["normalized state"]
    assert row.detail == "norm stats of state have 7 against 6 dimensions"
    padded = {key: NormStats(np.pad(s.mean, (0, 3)), np.pad(s.std, (0, 3))) for key, s in STATS.items()}
    assert all(row.passed for row in rows(dataclasses.replace(zscore, norm_stats=padded), zscore).values())


def test_other_settings_are_named():
    other = dataclasses.replace(POLICY, robot="droid", tokenizer=TOKENIZER | {"sha256": "2" * 64})
    row = rows(other)["settings"]
    assert not row.passed and "robot: 'aloha' against 'droid'; tokenizer: " in row.detail
    assert rows(dataclasses.replace(POLICY, robot=None))["settings"].passed
    assert "settings" not in rows(Assets(CONFIG), Assets(CONFIG))
    assert rows(Assets(CONFIG, state_in_prompt=False), Assets(CONFIG))["settings"].detail
