from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

import pi0_jax.models  # noqa: F401  # registers Observation in JAX
from configs.metaworld_demo import get_config
from pi0.assets import AssetsError
from pi0.config import ModelConfig
from pi0.datasets.arrayrecord_writer import build_records
from pi0.datasets.batches import Batches
from pi0.datasets.errors import DataError
from pi0.datasets.identity import contents_of
from pi0.datasets.images import Encoding
from pi0.datasets.lerobot import LeRobotDataset
from pi0.robots.normalize import NormStats, save_norm_stats
from pi0.run_config import RunConfig
from pi0.storage import as_path, delete, move
from pi0.training.data import Loader, load_data
from pi0.training.draws import Batch
from pi0.variants import get_variant
from tests.bucket import Bucket
from tests.pi0.datasets.test_check import V21_DATA, encoded

ROOT = Path(__file__).parents[3]
IMAGES = ROOT / "tests" / "datasets" / "metaworld_v21_images"
MODEL = get_variant("tiny", max_token_len=16)


def small_config(model: ModelConfig = MODEL, **data: object) -> RunConfig:
    """Two episodes with pictures in their rows, augmented."""
    config = get_config("tiny")
    config.batch_size, config.model = 8, model.to_dict()
    config.data.update({"root": str(IMAGES), "validation_episodes": [], "augment": True} | data)
    return RunConfig.from_dict(config.to_dict())


def with_data(**data: object) -> RunConfig:
    """The tiny model on the bundled recordings, read otherwise."""
    config = get_config("tiny")
    config.model = MODEL.to_dict()
    config.data.update(data)
    return RunConfig.from_dict(config.to_dict())


def load(batches: Batches, count: int, *, start: int = 0, workers: int = 0, rows: slice = slice(None)) -> list[Batch]:
    """Some batches from a loader that is closed again."""
    with Loader(batches, MODEL, np.arange(8)[rows], jax.device_put, start=start, workers=workers) as loader:
        return [next(loader) for _ in range(count)]


def assert_same(a: object, b: object) -> None:
    jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.fixture(scope="module")
def batches() -> Batches:
    batches = load_data(small_config())[1]
    assert batches.augment_seed is not None  # what is hardest to repeat
    return batches


@pytest.fixture(scope="module")
def expected(batches: Batches) -> list[Batch]:
    """The first six batches: one more than four workers read at once, so each has to stand in its place."""
    return load(batches, 6)


@pytest.mark.parametrize("workers", [1, 4])
def test_any_number_of_workers(batches: Batches, expected: list[Batch], workers: int):
    assert_same(load(batches, 6, workers=workers), expected)


def test_two_hosts_have_the_batches_of_one(batches: Batches, expected: list[Batch]):
    hosts = [load(batches, 6, rows=rows) for rows in (slice(0, 4), slice(4, 8))]
    for first, second, whole in zip(*hosts, expected, strict=True):
        assert_same(jax.tree.map(lambda *parts: np.concatenate(parts), first, second), whole)


def digests(batches: list[Batch]) -> list[str]:
    leaves = [jax.tree.leaves(jax.device_get(batch)) for batch in batches]
    return [hashlib.sha256(b"".join(x.tobytes() for x in arrays)).hexdigest() for arrays in leaves]


def test_a_new_process_goes_on(expected: list[Batch]):
    """Started at step 4: the batches that the first process had there."""
    call = "digests(load(load_data(small_config())[1], 2, start=4))"
    script = f"from tests.pi0_jax.training.test_data import *\nprint(*{call})"
    result = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    assert result.stdout.split() == digests(expected)[4:]


def test_batches_lie_on_the_devices_and_waiting_is_measured(batches: Batches, expected: list[Batch]):
    with Loader(batches, MODEL, np.arange(8), jax.device_put) as loader:
        assert loader.waited == 0
        once = list(loader.one_pass())
        assert len(once) == len(batches) == -(-130 // 8)
        assert loader.waited > 0 and all(isinstance(x, jax.Array) for x in jax.tree.leaves(once))
    assert_same(once[:6], expected)


def test_damage_in_a_worker_is_named(tmp_path: Path):
    """What is found only by decoding: the loader raises it, instead of hanging or going on without."""
    root = Path(shutil.copytree(IMAGES, tmp_path / "dataset"))
    encoded(b"no picture")(root)
    _, batches, _ = load_data(small_config(root=str(root)))
    with pytest.raises(DataError, match="cannot be decoded") as found:
        load(batches, len(batches), workers=1)
    assert (found.value.episode, found.value.frame) == (1, 7)


def test_damaged_episodes_are_left_out_and_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    root = Path(shutil.copytree(IMAGES, tmp_path / "dataset"))
    (root / V21_DATA).unlink()
    with pytest.raises(DataError, match="episode 1: the file is missing"):
        load_data(small_config(root=str(root)))
    _, batches, _ = load_data(small_config(root=str(root), skip_damaged=True))
    assert len(batches.order) == 59 and "1 damaged episodes are left out" in capsys.readouterr().out


def test_validation_holds_episodes_out():
    """By number or by fraction; the same ones whenever the config is the same."""
    for validation in ([1], 0.5):
        _, batches, held_out = load_data(small_config(validation_episodes=validation))
        assert held_out is not None and held_out.augment_seed is None
        parts = [{e.index for e in b.order.datasets[0].episodes} for b in (batches, held_out)]
        assert sorted(map(len, parts)) == [1, 1] and parts[0] != parts[1]
    assert load_data(small_config())[2] is None


def test_one_camera():
    robot = {"name": "metaworld", "cameras": {"corner": "base_0_rgb"}}
    observation, _, _ = load(load_data(small_config(robot=robot))[1], 1)[0]
    assert observation.image_masks["base_0_rgb"].all() and not observation.image_masks["left_wrist_0_rgb"].any()


def test_a_mixture_shares_stats_by_asset_id():
    """Two parts of a dataset under one asset id have the stats of the whole, and under two their own."""
    parts = [{"validation_episodes": [1], "weight": 3}, {"validation_episodes": [0], "weight": 1}]
    whole, _, _ = load_data(small_config())
    assets, batches, held_out = load_data(small_config(mixture=parts))
    assert held_out is not None and len(held_out.order) == len(batches.order) == 130
    assert assets.norm_stats is not None and whole.norm_stats is not None
    for key, stats in whole.norm_stats.items():
        np.testing.assert_allclose(assets.norm_stats[key].mean, stats.mean, rtol=1e-12)  # merged: another rounding
        np.testing.assert_array_equal(assets.norm_stats[key].q99, stats.q99)
    drawn = [batches.order.locate(p)[0] for p in range(4096)]
    assert drawn.count(0) == 3 * 1024
    json.dumps(assets.training)
    parts[1]["asset_id"] = "other"
    apart, _, _ = load_data(small_config(mixture=parts))
    assert apart.asset_id == "metaworld" and apart.norm_stats is not None
    assert not np.array_equal(apart.norm_stats["state"].mean, whole.norm_stats["state"].mean)


@pytest.mark.parametrize(
    ("data", "said"),
    [
        ({"root": ""}, "data.root names no dataset"),
        ({"validation_episodes": [7]}, "validation episodes"),
        ({"validation_episodes": 1.5}, "validation fraction"),
        ({"mixture": [{"rooot": "x"}]}, r"mixture\[0\] has unknown fields \['rooot'\]"),
        ({"mixture": [{"weight": 1}, {}]}, "give all of them one, or none"),
        ({"mixture": [{}, {"norm_stats_from": "x"}]}, "norm stats of 'metaworld' from its episodes and from x"),
        ({"robot": "aloha"}, "Aloha: state is"),
    ],
)
def test_refused_at_the_start(data: dict[str, object], said: str):
    with pytest.raises(ValueError, match=said):
        load_data(small_config(**data))


def test_sizes_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match=r"longest of 2 training episodes has 71 frames.*action_horizon is 72"):
        load_data(small_config(get_variant("tiny", action_horizon=72)))
    with pytest.raises(ValueError, match="batch_size is 131; with 130 frames"):
        load_data(dataclasses.replace(small_config(), batch_size=131))


def test_a_robot_with_options_and_stats_of_a_base_checkpoint(tmp_path: Path):
    """Stats are those of relative actions, and the checkpoint says so in plain values; or they come from elsewhere."""
    plain, _, _ = load_data(with_data())
    robot = {
        "name": "generic",
        "cameras": {"corner": "base_0_rgb", "wrist": "left_wrist_0_rgb"},
        "state": [[0, 4]],
        "actions": [[0, 4]],
        "delta_dims": [3, -1],
        "delta": True,
    }
    relative, batches, _ = load_data(with_data(robot=robot))
    assert json.loads(json.dumps(relative.robot)) == robot
    assert batches.pipelines[0].robot.delta_mask == (True, True, True, False)
    before, after = plain.norm_stats["actions"].mean, relative.norm_stats["actions"].mean
    shift = np.append(plain.norm_stats["state"].mean[:3], 0)
    np.testing.assert_allclose(after, before - shift, atol=1e-12)  # sums of float32 values, in float64

    relative.save(tmp_path / "assets")
    again, _, _ = load_data(with_data(norm_stats_from=str(tmp_path)))
    np.testing.assert_array_equal(again.norm_stats["actions"].mean, after)


@pytest.mark.parametrize(
    ("dims", "normalization", "problem"),
    [
        (14, None, "have 14 dimensions, the robot has 4"),
        (2, None, "have 2 dimen"),
        (4, "quantile", "needs q01 and q99"),
    ],
)
def test_norm_stats_of_another_robot_are_not_trained_with(dims: int, normalization: str | None, problem: str, tmp_path):
    stats = {key: NormStats(np.ones(dims), np.ones(dims)) for key in ("state", "actions")}
    save_norm_stats(tmp_path / "assets" / "metaworld" / "norm_stats.json", stats)
    with pytest.raises(AssetsError, match=problem):
        load_data(with_data(norm_stats_from=str(tmp_path), normalization=normalization))


def test_a_loader_counts_examples_whose_text_is_cut():
    config = small_config()
    short = dataclasses.replace(config, model=dataclasses.replace(config.model, max_token_len=3))
    for run, cut in ((config, False), (short, True)):
        _, batches, _ = load_data(run)
        with Loader(batches, run.model, np.arange(2), lambda batch: batch) as loader:
            next(loader), next(loader)
            assert loader.read >= 4 and loader.truncated == (loader.read if cut else 0)


def test_records_in_a_bucket(bucket: Bucket, expected: list[Batch], tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The batches of the recordings, by any host and from any step on; each host reads its own rows alone."""
    monkeypatch.setenv("PI0_CACHE", str(tmp_path))
    monkeypatch.setattr("pi0.datasets.arrayrecord.MAX_GAP", 0)
    columns = ("observation.state", "action")
    dataset = LeRobotDataset(IMAGES, states=columns, actions=(), image_size=MODEL.image_resolution)
    root = str(build_records(dataset, "", as_path(f"{bucket.address}/records"), Encoding("png")))
    config = small_config(root=root, format="arrayrecord", cache="")
    _, batches, _ = load_data(config)
    assert_same(load(batches, 6, workers=2), expected)
    assert_same(load(batches, 2, start=4), expected[4:])
    assert_same(load(batches, 2, rows=slice(4, 8)), [jax.tree.map(lambda x: x[4:8], batch) for batch in expected[:2]])
    bucket.requests.clear()
    batches.fetch(3, np.arange(4, 8))
    ranges = [path for _, path in bucket.requests if "array_record" in path]
    assert len(ranges) == 4
    before, moved = contents_of(config.data), as_path(f"{bucket.address}/moved")
    move(as_path(root), moved)
    assert before == contents_of(dataclasses.replace(config.data, root=str(moved))) != contents_of(small_config().data)


def test_damage_in_a_bucket_is_named(bucket: Bucket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("PI0_CACHE", str(tmp_path))
    columns = ("observation.state", "action")
    dataset = LeRobotDataset(IMAGES, states=columns, actions=(), image_size=MODEL.image_resolution)
    root = build_records(dataset, "", as_path(f"{bucket.address}/records"), Encoding("jpeg:95"))
    _, batches, _ = load_data(small_config(root=str(root), format="arrayrecord", cache=""))
    (shard,) = (root / "shards").iterdir()
    content = shard.read_bytes()
    shard.write_bytes(content[: len(content) // 2])
    with pytest.raises(DataError, match=r"records-00000-of-00001.array_record, episode 1.*the file is truncated"):
        load(batches, len(batches), workers=1)
    delete(shard)
    with pytest.raises(DataError, match="the file is missing"):
        load(batches, 1)
