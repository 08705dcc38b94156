from __future__ import annotations

import dataclasses
import json
import shutil

import numpy as np
import pytest

import pi0
from pi0.assets import Assets, AssetsError
from pi0.robots.normalize import NormStats
from pi0.tokenizers.fast import FASTTokenizer
from pi0.variants import get_variant

STATS = NormStats.from_data(np.random.default_rng(0).normal(size=(10, 3)))
ASSETS = Assets(get_variant("tiny"), {"state": STATS, "actions": STATS}, "lab", "zscore", {"kind": "x"}, "r", 7)


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


def test_the_action_tokenizer_travels_along(tmp_path):
    fast = FASTTokenizer.fit(list(np.random.default_rng(0).normal(size=(9, 4, 3))), vocab_size=260)
    fast.save(tmp_path / "fitted")
    assets = dataclasses.replace(ASSETS, action_tokenizer=fast.reference())
    assets.save(tmp_path / "run" / "assets")
    (tmp_path / "run").rename(tmp_path / "moved")
    shutil.rmtree(tmp_path / "fitted")
    loaded = Assets.load(tmp_path / "moved")
    assert FASTTokenizer.from_reference(loaded.action_tokenizer).sha256 == fast.sha256
    loaded.save(tmp_path / "moved" / "assets")
    loaded.save(tmp_path / "again" / "assets", tmp_path / "again")  # as a converted checkpoint
    again = Assets.load(tmp_path / "again").action_tokenizer
    assert again == fast.reference() | {"source": str(tmp_path / "again" / "assets" / "fast_tokenizer")}

    with pytest.raises(FileNotFoundError, match="fitted"):
        assets.save(tmp_path / "late")
    assert not (tmp_path / "late").exists()


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
        (json.dumps({"format": "pi0", "model": {"kind": "pi0"}}), "model lacks the fields"),
        (json.dumps({"format": "pi0", "model": ASSETS.model.to_dict() | {"action_dim": 0}}), r"model\.action_dim is 0"),
    ],
)
def test_bad_configs(text: str, said: str, tmp_path):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(AssetsError, match=rf"config\.json.*{said}"):
        Assets.load(tmp_path)


@pytest.mark.parametrize("lacking", ["asset_id", "norm_stats"])
def test_stats_and_their_name_go_together(lacking: str, tmp_path):
    with pytest.raises(AssetsError, match="asset_id"):
        dataclasses.replace(ASSETS, **{lacking: None}).save(tmp_path)
    assert not list(tmp_path.iterdir())


def test_an_asset_id_stays_below_its_folder(tmp_path):
    with pytest.raises(ValueError, match=r"'\.\./outside' is not a path below"):
        dataclasses.replace(ASSETS, asset_id="../outside").save(tmp_path / "assets")
    assert not list(tmp_path.iterdir())
    ASSETS.save(tmp_path / "assets")
    config = tmp_path / "assets" / "config.json"
    config.write_text(config.read_text().replace('"asset_id": "lab"', '"asset_id": "/etc"'))
    with pytest.raises(ValueError, match="'/etc' is not a path below"):
        Assets.load(tmp_path)


def test_stats_that_are_gone_are_missed(tmp_path):
    ASSETS.save(tmp_path / "assets")
    (tmp_path / "assets" / "lab" / "norm_stats.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"lab.norm_stats\.json"):
        Assets.load(tmp_path)
