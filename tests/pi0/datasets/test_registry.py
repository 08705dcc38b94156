"""A dataset format of another package, in everything that reads datasets."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

import pi0.datasets.cache
import pi0.datasets.check
import pi0.datasets.fit_fast
import pi0.datasets.statistics
from pi0.datasets.annotations import AnnotatedDataset
from pi0.datasets.base import Dataset
from pi0.datasets.cache import build_cache
from pi0.datasets.check import find_damage
from pi0.datasets.errors import DataError
from pi0.datasets.fit_fast import action_chunks
from pi0.datasets.lerobot import LeRobotDataset
from pi0.datasets.mixture import Mixture
from pi0.datasets.registry import episode_numbers, find_format, open_dataset
from pi0.datasets.statistics import dataset_statistics
from pi0.robots.metaworld import MetaWorld
from pi0.sample import METAWORLD
from pi0.tokenizers.fast import FASTTokenizer
from pi0_eval.replay import action_names, recorded_actions

FORMAT, SIZE, EPISODES = "tests.my_lab.datasets:NpzDataset", (12, 16), [3, 1]
COLUMNS = ("observation.state", "action", "observation.images.corner", "observation.images.wrist")


@pytest.fixture(scope="module")
def reference() -> Dataset:
    """Two bundled episodes, as LeRobot's format has them."""
    return LeRobotDataset(METAWORLD, action_horizon=6, episodes=EPISODES, image_size=SIZE)


@pytest.fixture
def root(reference: Dataset, tmp_path: Path) -> Path:
    """The same in npz files."""
    folder = tmp_path / "npz"
    folder.mkdir()
    for position, episode in enumerate(reference.episodes):
        frames = range(*reference.starts[position : position + 2].tolist())
        arrays = {name: reference.table(name)[frames] for name in COLUMNS[:2]}
        for camera in reference.cameras:
            arrays[camera] = np.stack([reference.image(camera, position, f) for f in range(len(frames))])
        np.savez(folder / f"episode_{episode.index}.npz", task=reference.task(frames[0]), **arrays)
    return folder


def open_npz(root: Path, **options: object) -> Dataset:
    return open_dataset(root, MetaWorld(), format=FORMAT, **{"action_horizon": 6, "episodes": EPISODES} | options)


def test_the_same_frames(reference: Dataset, root: Path):
    dataset = open_npz(root)
    assert len(dataset) == len(reference) and episode_numbers(root, FORMAT) == [1, 3]
    for i in (0, 7, int(dataset.starts[1]) - 1, int(dataset.starts[1]), len(dataset) - 1):
        item, expected = dataset[i], reference[i]
        assert item.keys() == expected.keys() - {"index"}
        assert np.float32(item.pop("timestamp")) == np.float32(expected["timestamp"])  # LeRobot stores float32
        for key in item:
            np.testing.assert_array_equal(item[key], expected[key])
    assert [dataset[i]["task"] for i in dataset.starts[:-1]] == [reference[i]["task"] for i in reference.starts[:-1]]


def test_what_reads_datasets(reference: Dataset, root: Path, tmp_path: Path):
    dataset, robot = open_npz(root), MetaWorld()
    np.testing.assert_array_equal(action_chunks(dataset, robot), action_chunks(reference, robot))
    ours, theirs = (dataset_statistics(d, robot) for d in (dataset, reference))
    np.testing.assert_array_equal(ours["actions"].counts, theirs["actions"].counts)
    np.testing.assert_array_equal(recorded_actions(dataset, robot), recorded_actions(reference, robot))
    assert action_names(dataset, robot) == [f"action[{i}]" for i in range(4)]
    assert Mixture([dataset, reference])[5]["observation.state"].shape == (4,)
    line = {"episode": 1, "start_frame": 2, "end_frame": 4, "subtask": "lift"}
    (tmp_path / "subtasks.jsonl").write_text(json.dumps(line))
    annotated = AnnotatedDataset(dataset, tmp_path / "subtasks.jsonl")
    assert annotated[int(dataset.starts[1]) + 3]["subtask"] == "lift" and annotated[0]["subtask"] == ""


def test_caches(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    small = open_npz(root, image_size=(6, 8))
    expected = small[9][COLUMNS[2]]
    folders = build_cache(find_format(FORMAT)(root, image_size=(6, 8)), tmp_path / "cache", workers=2)
    cached, memory = (open_npz(root, image_size=(6, 8), cache=cache) for cache in (tmp_path / "cache", "memory"))
    assert len(folders) == 2 and memory[9][COLUMNS[2]].any()
    monkeypatch.setattr("tests.my_lab.datasets.NpzDataset.decode", lambda *_: pytest.fail("decoded an image"))
    for dataset in (cached, memory):
        np.testing.assert_array_equal(dataset[9][COLUMNS[2]], expected)


def test_damage(root: Path):
    file = root / "episode_3.npz"
    arrays = dict(np.load(file))
    arrays["action"][5, 2] = np.nan
    np.savez(file, **arrays)
    assert [str(p) for p in find_damage(root, format=FORMAT)] == [f"{file}, episode 3, frame 5: action[2] is nan"]
    with pytest.raises(DataError, match="frame 5"):
        open_npz(root)
    assert [episode.index for episode in open_npz(root, skip_damaged=True).episodes] == [1]


def test_commands(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    own = [str(root), "--format", FORMAT]
    robot = ["--robot", "metaworld", "--action-horizon", "6"]
    pi0.datasets.statistics.main([*own, *robot, "--out", str(tmp_path / "assets"), "--asset-id", "arm"])
    assert (tmp_path / "assets/arm/norm_stats.json").exists()
    pi0.datasets.fit_fast.main([*own, str(tmp_path / "fast"), *robot, "--vocab-size", "300", "--held-out", "1"])
    assert FASTTokenizer(tmp_path / "fast").time_horizon == 6
    pi0.datasets.cache.main([*own, "--size", "6x8", "--workers", "1", "--cache", str(tmp_path / "cache")])
    assert len(list((tmp_path / "cache").iterdir())) == 2
    pi0.datasets.check.main(own)
    assert "no damage found" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("hdf5", 'unknown dataset format .hdf5.; known are lerobot, rlds, arrayrecord, and "module:Name"'),
        ("tests.my_lab.datasets:Nothing", "cannot be imported"),
        ("pathlib:Path", "must be a subclass of pi0.datasets.base.Dataset"),
    ],
)
def test_unknown_formats(name: str, problem: str):
    with pytest.raises(ValueError, match=problem):
        open_dataset(METAWORLD, MetaWorld(), format=name)
