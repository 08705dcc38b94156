"""What openpi and LeRobot keep beside the weights. `lerobot_policies/` was written by LeRobot 0.6.1 itself."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from convert.checkpoints import open_checkpoint
from convert.conversion import convert
from convert.formats.safetensors import read_safetensors
from convert.inspection import inspect
from convert.lerobot_export import variants_of, write_lerobot
from convert.sidecars import read_assets, read_model
from pi0.assets import Assets, AssetsError
from pi0.parameters import LayoutError
from pi0.robots.normalize import NormStats, save_norm_stats
from pi0.variants import get_variant
from tests.convert.test_checkpoints import OF_PI0, random_checkpoint, write

POLICIES = Path(__file__).parent / "lerobot_policies"
KINDS = ("pi0", "pi05")


@pytest.mark.parametrize("kind", KINDS)
def test_a_policy_of_lerobot_is_read(kind: str):
    model = read_model(POLICIES / kind, kind)
    released = get_variant(kind)
    expected = dataclasses.replace(released, image_keys=("top", "wrist"), action_horizon=20, action_dim=16)
    assert model == expected.with_runtime(dtype="float32")  # as LeRobot computes it
    assets = read_assets(POLICIES / kind, model)
    mode = {"pi0": "mean_std", "pi05": "quantiles"}[kind]
    assert assets.normalization == {"state": mode, "actions": mode, "eps": 1e-8}
    assert assets.tokenizer is not None and assets.tokenizer["source"].startswith("gs://big_vision/")
    state, actions = assets.norm_stats["state"], assets.norm_stats["actions"]
    np.testing.assert_array_equal(state.mean, np.arange(4) + 1.5)
    np.testing.assert_array_equal(actions.q99, np.arange(4) + 12.5)


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_written_is_what_lerobot_writes(kind: str, tmp_path):
    """Field by field, but for what we leave at its default."""
    model = read_model(POLICIES / kind, kind)
    write_lerobot(tmp_path, read_assets(POLICIES / kind, model), np.dtype(np.float32))
    ours, theirs = (json.loads((f / "config.json").read_text()) for f in (tmp_path, POLICIES / kind))
    assert theirs.pop("n_action_steps") == 10 and ours.pop("n_action_steps") == 20  # not in our config
    assert ours.items() <= theirs.items()
    for name in ("policy_preprocessor", "policy_postprocessor"):
        ours, theirs = (json.loads((f / f"{name}.json").read_text()) for f in (tmp_path, POLICIES / kind))
        wanted = theirs["steps"]
        assert [s["registry_name"] for s in ours["steps"]] == [s["registry_name"] for s in wanted]
        for one, other in zip(ours["steps"], wanted, strict=True):
            assert one["config"] == other["config"]
            if "state_file" in other:
                a, b = (
                    read_safetensors(tmp_path / one["state_file"]),
                    read_safetensors(POLICIES / kind / other["state_file"]),
                )
                assert a.keys() == b.keys()
                for tensor in a:
                    np.testing.assert_array_equal(a[tensor].read(()), b[tensor].read(()))


def test_a_policy_converts_with_what_lies_beside_it(tmp_path):
    """Norm stats, tokenizer and sizes come along, there and back."""
    checkpoint = random_checkpoint()
    folder = write(checkpoint, tmp_path / "lerobot", "lerobot")
    shutil.rmtree(folder / "assets")  # as LeRobot would have written it
    assert inspect(folder).problems and "--model" in inspect(folder).problems[0]  # LeRobot has no name for its sizes
    converted = convert(folder, tmp_path / "out", to="pi0_jax", config=checkpoint.assets.model)
    assert converted.assets.asset_id == "lerobot"
    assert converted.assets.normalization == {"state": "mean_std", "actions": "mean_std", "eps": 1e-6}
    for key, stats in checkpoint.assets.norm_stats.items():
        np.testing.assert_allclose(converted.assets.norm_stats[key].mean, stats.mean, rtol=1e-6)  # float32 there
    assert (tmp_path / "out" / "assets" / "lerobot" / "norm_stats.json").exists()


def test_openpi_norm_stats_come_along(tmp_path):
    """A release has several; the one that is asked for is the checkpoint's, and all are copied."""
    stats = random_checkpoint().assets.norm_stats
    source = write(random_checkpoint(), tmp_path / "source", "openpi_jax")
    shutil.rmtree(source / "assets")
    for asset_id in ("droid", "physical-intelligence/libero"):
        (source / "assets" / asset_id).mkdir(parents=True)
        save_norm_stats(source / "assets" / asset_id / "norm_stats.json", stats)
    options = {"to": "pi0_torch", "config": get_variant("tiny")}
    assert convert(source, tmp_path / "a", **options).assets.norm_stats is None
    for folder in (source, tmp_path / "a"):
        chosen = convert(folder, tmp_path / "b", asset_id="physical-intelligence/libero", overwrite=True, **options)
        assert chosen.assets.asset_id == "physical-intelligence/libero" and chosen.assets.normalization == "zscore"
        assert sorted(chosen.norm_stats) == ["droid", "physical-intelligence/libero"]
    with pytest.raises(LayoutError, match=r"no norm stats 'aloha'; it has droid, physical"):
        convert(source, tmp_path / "c", asset_id="aloha", **options)
    assert not (tmp_path / "c").exists()
    shutil.rmtree(source / "assets" / "droid")
    assert open_checkpoint(source, get_variant("tiny")).assets.asset_id == "physical-intelligence/libero"


def test_openpi_pytorch_config_gives_the_sizes(tmp_path):
    (tmp_path / "config.json").write_text(
        json.dumps(
            {
                "action_dim": 32,
                "action_horizon": 10,
                "paligemma_variant": "gemma_2b",
                "action_expert_variant": "gemma_300m",
                "precision": "bfloat16",
            }
        )
    )
    assert read_model(tmp_path, "pi05") == get_variant("pi05", action_horizon=10)
    from convert.sidecars import write_openpi

    write_openpi(tmp_path, Assets(get_variant("pi05", action_horizon=7)), np.dtype(np.float32))
    assert read_model(tmp_path, "pi05").action_horizon == 7


def test_the_training_config_travels(tmp_path):
    checkpoint = random_checkpoint()
    checkpoint = dataclasses.replace(checkpoint, assets=dataclasses.replace(checkpoint.assets, training={"steps": 7}))
    for layout in OF_PI0:
        assert open_checkpoint(write(checkpoint, tmp_path / layout, layout)).assets.training == {"steps": 7}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"type": "pi05"}, "its tensors are those of a pi0"),
        ({"paligemma_variant": "gemma_7b"}, "gemma_7b"),
        ({"chunk_size": None}, "action_horizon"),
    ],
)
def test_a_config_that_contradicts_is_refused(change: dict, message: str, tmp_path):
    values = json.loads((POLICIES / "pi0" / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(values | change))
    with pytest.raises(ValueError, match=message):
        read_model(tmp_path, "pi0")


def test_a_config_that_is_no_object_is_refused(tmp_path):
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(AssetsError, match=r"config\.json holds list"):
        read_model(tmp_path, "pi0")


def test_unknown_normalization_is_refused(tmp_path):
    shutil.copytree(POLICIES / "pi0", tmp_path / "x")
    file = tmp_path / "x" / "policy_preprocessor.json"
    file.write_text(file.read_text().replace("MEAN_STD", "MAD"))
    with pytest.raises(LayoutError, match="MAD"):
        read_assets(tmp_path / "x", get_variant("pi0"))
    ours = dataclasses.replace(random_checkpoint().assets, normalization="quantile01")
    with pytest.raises(LayoutError, match="quantile01"):
        write_lerobot(tmp_path, ours, np.dtype(np.float32))


def test_z_scores_need_no_quantiles():
    stats = NormStats(np.zeros(2), np.ones(2))
    np.testing.assert_allclose(stats.apply(np.ones(2), "zscore"), 1, rtol=1e-5)
    with pytest.raises(ValueError, match="q01"):
        stats.apply(np.ones(2), "quantile")


def test_sizes_without_a_name_elsewhere():
    assert variants_of(get_variant("tiny")) is None
    assert variants_of(get_variant("pi0"))["action_expert_variant"] == "gemma_300m"
