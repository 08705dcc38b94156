from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pi0.datasets.check import find_damage
from pi0.datasets.lerobot import LeRobotDataset
from pi0.datasets.writer import DatasetWriter

FEATURES: dict[str, Any] = {
    "observation.state": {"dtype": "float32", "shape": [3], "names": ["x", "y", "z"]},
    "observation.images.top": {"dtype": "video", "shape": [16, 24, 3]},
    "action": {"dtype": "float32", "shape": [2]},
    "reward": {"dtype": "float32", "shape": [1]},
}


def frame(seed: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {
        "observation.state": rng.normal(size=3),
        "observation.images.top": rng.integers(0, 256, (16, 24, 3)).astype(np.uint8),
        "action": rng.normal(size=2).astype(np.float32),
        "reward": np.float32(seed),
    }


def write(writer: DatasetWriter, first: int, count: int, task: str) -> int:
    episode = writer.begin()
    for i in range(count):
        episode.add(frame(first + i), task)
    return episode.save()


def test_what_is_written_is_read(tmp_path: Path):
    """In two runs, the second of which continues; images bit for bit."""
    with DatasetWriter(tmp_path / "data", fps=12.5, features=FEATURES, codec="lossless") as writer:
        assert write(writer, 0, 15, "stack the cups") == 0
        open_one = writer.begin()
        open_one.add(frame(99), "never saved")
    options: dict[str, Any] = {"fps": 12.5, "features": FEATURES, "codec": "lossless", "resume": True}
    with DatasetWriter(tmp_path / "data", **options) as writer:
        assert write(writer, 15, 4, "räum auf") == 1 and write(writer, 19, 1, "stack the cups") == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data"]
    assert find_damage(tmp_path / "data") == []
    dataset = LeRobotDataset(tmp_path / "data", states=["observation.state", "reward"])
    assert [e.length for e in dataset.episodes] == [15, 4, 1] and dataset.fps == 12.5
    for i in range(20):
        expected = frame(i)
        np.testing.assert_array_equal(dataset[i]["observation.images.top"], expected["observation.images.top"])
        np.testing.assert_array_equal(dataset[i]["observation.state"], expected["observation.state"].astype(np.float32))
        assert dataset[i]["reward"] == i
    assert [dataset.task(i) for i in (0, 15, 19)] == ["stack the cups", "räum auf", "stack the cups"]
    import json

    stats = json.loads((tmp_path / "data" / "meta" / "stats.json").read_text())
    states = np.stack([frame(i)["observation.state"] for i in range(20)])
    np.testing.assert_allclose(
        stats["observation.state"]["std"], states.std(0), rtol=1e-6
    )  # states are kept in float32
    assert stats["observation.state"]["count"] == [20]
    assert np.shape(stats["observation.images.top"]["mean"]) == (3, 1, 1)


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="how threads are scheduled is seen on Linux alone")
def test_no_thread_becomes_a_real_time_one(tmp_path: Path):
    """SVT-AV1 would make them so where root runs it."""
    video = FEATURES | {"observation.images.top": {"dtype": "video", "shape": [64, 64, 3]}}
    with DatasetWriter(tmp_path / "data", fps=10, features=video, codec="av1") as writer:
        episode = writer.begin()
        episode.add(frame(0) | {"observation.images.top": np.zeros((64, 64, 3), np.uint8)}, "stack the cups")
        threads = [int(name) for name in os.listdir("/proc/self/task")]
        assert len(threads) > 3 and {os.sched_getscheduler(thread) for thread in threads} == {os.SCHED_OTHER}


def test_a_damaged_frame_adds_nothing(tmp_path: Path):
    writer = DatasetWriter(tmp_path / "data", fps=10, features=FEATURES)
    episode = writer.begin()
    for change, named in [
        ({"action": np.zeros(3)}, r"action is \[3\]; expected \[2\]"),
        ({"action": np.array([0, np.nan])}, "action has nan"),
        ({"observation.images.top": np.zeros((16, 24, 3))}, "float64; an image is uint8"),
        ({"more": 1}, "more"),
    ]:
        with pytest.raises(ValueError, match=named):
            episode.add(frame(0) | change, "x")
    assert episode.length == 0
    with pytest.raises(ValueError, match="at least one frame"):
        episode.save()
    writer.close()


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"fps": 0}, "fps is 0"),
        ({"codec": "gif"}, "unknown codec 'gif'"),
        ({"features": {}}, "at least one feature"),
        ({"features": {"../x": {"dtype": "float32", "shape": [1]}}}, "cannot have the name"),
        ({"features": {"x": {"dtype": "object", "shape": [1]}}}, "expected a vector of"),
        ({"features": {"x": {"dtype": "video", "shape": [4, 4]}}}, "a video has"),
    ],
)
def test_wrong_options(options: dict[str, Any], named: str, tmp_path: Path):
    with pytest.raises(ValueError, match=named):
        DatasetWriter(tmp_path / "data", **{"fps": 10, "features": FEATURES, **options})
    assert not (tmp_path / "data").exists()


def test_other_folders_are_left_alone(tmp_path: Path):
    (tmp_path / "mine.txt").write_text("")
    with pytest.raises(FileExistsError, match="not empty"):
        DatasetWriter(tmp_path, fps=10, features=FEATURES)
    with DatasetWriter(tmp_path / "data", fps=10, features=FEATURES) as writer:
        write(writer, 0, 2, "x")
    with pytest.raises(ValueError, match="other features"):
        DatasetWriter(tmp_path / "data", fps=20, features=FEATURES, resume=True)


def test_a_crash_before_info_json_is_put_right(tmp_path: Path):
    with DatasetWriter(tmp_path / "data", fps=10, features=FEATURES) as writer:
        write(writer, 0, 3, "x")
        before = (tmp_path / "data" / "meta" / "info.json").read_text()
        write(writer, 3, 2, "x")
    (tmp_path / "data" / "meta" / "info.json").write_text(before)
    DatasetWriter(tmp_path / "data", fps=10, features=FEATURES, resume=True).close()
    assert [e.length for e in LeRobotDataset(tmp_path / "data").episodes] == [3, 2]
