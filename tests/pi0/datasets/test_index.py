"""The index of a large dataset: the same dataset as without it, not read again, never stale."""

from __future__ import annotations

import os
import pickle
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pi0.datasets import index
from pi0.datasets.base import Dataset
from pi0.datasets.errors import DataError
from pi0.datasets.lerobot import LeRobotDataset
from pi0.datasets.registry import episode_numbers
from pi0.datasets.rlds import RLDSDataset
from pi0.robots.registry import make_robot

HERE = Path(__file__).parents[2] / "datasets"
DROID = {"states": ("observation/joint_position",), "actions": ("action",)}
DATASETS: dict[str, tuple[type[Dataset], Any, dict[str, Any]]] = {
    "metaworld_v30": (LeRobotDataset, "bundled://metaworld_v30", {}),
    "metaworld_v21_images": (LeRobotDataset, HERE / "metaworld_v21_images", {}),
    "metaworld_v21": (LeRobotDataset, HERE / "metaworld_v21", {"skip_damaged": True}),
    "rlds": (RLDSDataset, HERE / "rlds/rlds_array_record", DROID),
}


@pytest.fixture
def every_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also small datasets have an index, in a cache of the test's own."""
    monkeypatch.setattr(index, "MIN_FRAMES", 1)
    monkeypatch.setenv("PI0_CACHE", str(tmp_path / "cache"))


def not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    for format in (LeRobotDataset, RLDSDataset):
        for name in ("read_columns", "read_many"):
            monkeypatch.setattr(format, name, lambda *_: pytest.fail("read an episode"))


def same(a: dict[str, Any], b: dict[str, Any]) -> None:
    assert a.keys() == b.keys()
    for key in a:
        np.testing.assert_array_equal(a[key], b[key])


@pytest.mark.parametrize("name", DATASETS)
def test_the_same_dataset(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    format, root, options = DATASETS[name]
    options = {"action_horizon": 7} | options
    plain = format(root, **options)
    numbers = [episode.index for episode in plain.episodes]
    chosen = [numbers[-1], numbers[0]]
    part = format(root, episodes=chosen, **options)
    monkeypatch.setattr(index, "MIN_FRAMES", 1)
    monkeypatch.setenv("PI0_CACHE", str(tmp_path / "cache"))
    first = format(root, **options)
    assert isinstance(first.episodes, index.IndexedEpisodes)
    not_read(monkeypatch)
    for expected, found in ((plain, format(root, **options)), (part, format(root, episodes=chosen, **options))):
        found = pickle.loads(pickle.dumps(found))
        assert list(found.episodes) == list(expected.episodes) and len(found) == len(expected)
        assert [str(p) for p in found.skipped] == [str(p) for p in expected.skipped] or expected is part
        for i in (0, 1, 38, 41, len(expected) - 1):
            same(found[i], expected[i])
        for column in set(expected._columns) - {"task_index"}:  # RLDS numbers texts as they come
            np.testing.assert_array_equal(np.asarray(found.table(column)), expected.table(column))
    assert episode_numbers(root, "rlds" if format is RLDSDataset else "lerobot") == [
        e.index for e in plain.every_episode
    ]


def test_only_a_large_one_has_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("PI0_CACHE", str(tmp_path / "cache"))
    LeRobotDataset("bundled://metaworld_v30")
    assert not (tmp_path / "cache").exists()


@pytest.mark.usefixtures("every_size")
def test_never_stale(tmp_path: Path):
    root = Path(shutil.copytree(HERE / "metaworld_v21_images", tmp_path / "dataset"))
    LeRobotDataset(root)
    assert index.find_index(root, None) is not None
    file = root / "data/chunk-000/episode_000000.parquet"
    os.utime(file, ns=(0, file.stat().st_mtime_ns + 1))
    assert index.find_index(root, None) is None
    file.unlink()
    with pytest.raises(DataError, match="episode 0: the file is missing"):
        LeRobotDataset(root)
    assert len(LeRobotDataset(root, episodes=[1])), "damage of another episode does not matter"
    with pytest.raises(DataError, match="episode 0: the file is missing"):
        LeRobotDataset(root)


@pytest.mark.usefixtures("every_size")
def test_a_damaged_index_is_made_anew(tmp_path: Path):
    before = LeRobotDataset("bundled://metaworld_v30")
    folder = before._index.folder  # type: ignore[union-attr]
    (folder / "lengths.npy").write_bytes(b"damaged")
    shutil.rmtree(folder)
    same(LeRobotDataset("bundled://metaworld_v30")[3], before[3])


@pytest.mark.usefixtures("every_size")
def test_where_nothing_can_be_written(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "index").write_text("a file")
    dataset = LeRobotDataset("bundled://metaworld_v30")
    assert len(dataset) and "cannot write an index" in caplog.text
    assert make_robot("metaworld").action_keys(dataset.features)
