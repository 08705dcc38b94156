from __future__ import annotations

import os
import pickle
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pi0.datasets.cache import build_cache, main
from pi0.datasets.errors import DataError
from pi0.datasets.lerobot import LeRobotDataset
from pi0.robots.transforms import resize_with_pad

HERE = Path(__file__).parents[2] / "datasets"
SIZE, CAMERA = (24, 32), "observation.images.corner"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A copy of two short episodes."""
    return Path(shutil.copytree(HERE / "metaworld_v21_images", tmp_path / "dataset"))


def no_decoding(monkeypatch: pytest.MonkeyPatch) -> None:
    for reader in ("Video", "EncodedImages"):
        monkeypatch.setattr(f"pi0.datasets.video.{reader}.frame", lambda *_: pytest.fail("decoded an image"))


@pytest.mark.parametrize(("name", "workers"), [("metaworld_v30", 2), ("metaworld_v21_images", 1)])
def test_the_same_pictures(name: str, workers: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    root = "bundled://metaworld_v30" if name == "metaworld_v30" else HERE / name
    plain = LeRobotDataset(root, cameras=[CAMERA])
    folders = build_cache(LeRobotDataset(root, cameras=[CAMERA], image_size=SIZE), tmp_path, workers=workers)
    assert sorted(tmp_path.iterdir()) == sorted(folders), "something is left behind"
    frames = np.load(folders[0] / "frames.npy")
    assert frames.shape == (len(plain), *SIZE, 3) and frames.dtype == np.uint8
    indices = [0, 5, 58, 59, 100, len(plain) - 1]
    expected = [resize_with_pad(plain[i][CAMERA], *SIZE) for i in indices]
    no_decoding(monkeypatch)
    cached = LeRobotDataset(root, cameras=[CAMERA], image_size=SIZE, cache=tmp_path)
    np.testing.assert_array_equal([cached[i][CAMERA] for i in indices], expected)
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(cached))[59][CAMERA], expected[3])
    part = LeRobotDataset(root, cameras=[CAMERA], image_size=SIZE, cache=tmp_path, episodes=[1])
    np.testing.assert_array_equal(part[0][CAMERA], expected[3])


def test_stale_ones_are_not_used(root: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture):
    def open_it(size: tuple[int, int] = SIZE) -> LeRobotDataset:
        return LeRobotDataset(root, cameras=[CAMERA], image_size=size, cache=tmp_path / "cache")

    first = build_cache(LeRobotDataset(root, cameras=[CAMERA], image_size=SIZE), tmp_path / "cache")
    assert not open_it()[3][CAMERA].flags.writeable and not caplog.records
    assert open_it((16, 16))[3][CAMERA].shape == (16, 16, 3)
    assert "decoding them" in caplog.text
    file = root / "data/chunk-000/episode_000000.parquet"
    os.utime(file, ns=(0, file.stat().st_mtime_ns + 1))
    assert open_it()[3][CAMERA].flags.writeable, "found the cache of files that have changed"
    assert build_cache(open_it(), tmp_path / "cache") != first


def test_a_complete_one_is_kept(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    dataset = LeRobotDataset(root, image_size=SIZE)
    folders = build_cache(dataset, tmp_path / "cache")
    no_decoding(monkeypatch)
    assert build_cache(dataset, tmp_path / "cache") == folders


def test_nothing_is_left_of_an_interrupted_one(root: Path, tmp_path: Path):
    file = root / "data/chunk-000/episode_000001.parquet"
    file.write_bytes(file.read_bytes().replace(b"IDAT", b"XDAT"))
    with pytest.raises(DataError, match="episode 1, frame"):
        build_cache(LeRobotDataset(root, cameras=[CAMERA], image_size=SIZE), tmp_path / "cache", workers=2)
    assert not list((tmp_path / "cache").iterdir())


def test_damaged_episodes_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    root = Path(shutil.copytree(HERE / "metaworld_v21", tmp_path / "dataset"))  # lacks the videos of some episodes
    arguments = [str(root), "--size", "24x32", "--cache", str(tmp_path / "cache"), "--workers", "1"]
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 1 and "episode 2: the file is missing" in capsys.readouterr().err
    assert not (tmp_path / "cache").exists()
    main([*arguments, "--skip-damaged"])
    assert capsys.readouterr().out.count("left out: ") == 12
    no_decoding(monkeypatch)
    dataset = LeRobotDataset(root, image_size=SIZE, cache=tmp_path / "cache", skip_damaged=True)
    assert [episode.index for episode in dataset.episodes] == [0, 1, 3, 4, 5, 8, 10, 12, 13, 15]
    assert all(dataset[int(i)][CAMERA].any() for i in dataset.starts[:-1])


def test_in_memory(root: Path, monkeypatch: pytest.MonkeyPatch):
    dataset = LeRobotDataset(root, image_size=SIZE, cache="memory")
    expected = dataset[5][CAMERA]
    no_decoding(monkeypatch)
    assert dataset[5][CAMERA] is expected and not expected.flags.writeable
    assert pickle.loads(pickle.dumps(dataset))._cached[CAMERA].read(0, 5) is None


@pytest.mark.parametrize(
    ("options", "problem"), [({}, "image_size"), ({"image_size": SIZE, "episodes": [0]}, "all of its episodes")]
)
def test_refused(options: dict[str, Any], problem: str, root: Path, tmp_path: Path):
    with pytest.raises(ValueError, match=problem):
        build_cache(LeRobotDataset(root, **options), tmp_path / "cache")


def test_a_folder_needs_a_size(root: Path, tmp_path: Path):
    with pytest.raises(ValueError, match="needs image_size"):
        LeRobotDataset(root, cache=tmp_path)


def test_full_disk(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    usage = type(shutil.disk_usage(tmp_path))(100, 50, 50)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    with pytest.raises(OSError, match=r"0\.0 GB left"):
        build_cache(LeRobotDataset(root, image_size=SIZE), tmp_path / "cache")
    assert not list((tmp_path / "cache").iterdir())


@pytest.mark.parametrize("size", ["224", "0x4", "axb"])
def test_sizes(size: str, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit):
        main(["bundled://metaworld_v30", "--size", size])
    assert "HEIGHTxWIDTH" in capsys.readouterr().err
