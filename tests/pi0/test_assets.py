from __future__ import annotations

import json

import numpy as np
import pytest

import pi0
from pi0.assets import Assets, AssetsError
from pi0.config import ModelConfig
from pi0.normalize import NormStats

STATS = NormStats.from_data(np.random.default_rng(0).normal(size=(10, 3)))
ASSETS = Assets(ModelConfig.variant("tiny"), {"state": STATS, "actions": STATS}, "lab", "zscore", {"kind": "x"}, "r", 7)


@pytest.mark.parametrize("beside_weights", [False, True])
def test_there_and_back(beside_weights: bool, tmp_path):
    ASSETS.save(tmp_path / "assets", tmp_path if beside_weights else None)
    assert (tmp_path / "config.json").exists() == beside_weights
    assert (tmp_path / "assets" / "lab" / "norm_stats.json").exists()
    loaded = Assets.load(tmp_path)
    for field in ("model", "asset_id", "normalization", "tokenizer", "robot", "step"):
        assert getattr(loaded, field) == getattr(ASSETS, field)
    assert loaded.version == pi0.__version__
    np.testing.assert_array_equal(loaded.norm_stats["actions"].std, STATS.std)


def test_no_config_of_ours(tmp_path):
    assert Assets.load(tmp_path) is None
    (tmp_path / "config.json").write_text('{"type": "pi0"}')  # LeRobot's, say
    assert Assets.load(tmp_path) is None


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "not JSON"),
        (json.dumps({"format": "pi0", "version": "9"}), "no field 'model'.*version 9"),
        (json.dumps({"format": "pi0", "model": {}, "colour": 1}), "unknown fields.*colour"),
        (json.dumps({"format": "pi0", "model": {"kind": "pi0"}}), "lacks the fields"),
    ],
)
def test_bad_configs(text: str, said: str, tmp_path):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ValueError, match=said):
        Assets.load(tmp_path)


def test_stats_need_a_name(tmp_path):
    with pytest.raises(AssetsError, match="asset_id"):
        Assets(ASSETS.model, ASSETS.norm_stats).save(tmp_path)
