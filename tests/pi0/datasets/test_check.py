"""Every kind of damage: found by the check, named by file, episode and frame, raised when read, left out when asked."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import av
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pi0.datasets.check import find_damage, main
from pi0.datasets.errors import DataError
from pi0.datasets.lerobot import LeRobotDataset
from pi0.sample import METAWORLD
from tests.pi0.datasets.test_video import write_video

HERE = Path(__file__).parents[2] / "datasets"
V30_DATA, V21_DATA = "data/chunk-000/file-000.parquet", "data/chunk-000/episode_000001.parquet"
V30_VIDEO = "videos/observation.images.wrist/chunk-000/file-000.mp4"
V21_VIDEO = "videos/chunk-000/observation.images.wrist/episode_000001.mp4"
NAN = [0.0, float("nan"), 0.0, 0.0]
FIRST = 59  # frames of episode 0, so the row of the first frame of episode 1


def edit(root: Path, file: str, **changes: tuple[int, Any]) -> None:
    """Change one value of some columns of a Parquet file: `column=(row, value)`; `__` stands for a dot."""
    table = pq.read_table(root / file)
    for name, (row, value) in changes.items():
        index = table.column_names.index(name.replace("__", "."))
        column = table.column(index).to_pylist()
        column[row] = value
        kind = table.schema.field(index).type
        if isinstance(value, list) and len(value) != 4:
            kind = pa.list_(pa.float32())
        table = table.set_column(index, table.column_names[index], pa.array(column, kind))
    pq.write_table(table, root / file)


def end_early(root: Path) -> None:
    """The wrist's clip of episode 1 is three frames short: its last would show the next episode's first."""
    file = "meta/episodes/chunk-000/file-000.parquet"
    name = "videos/observation.images.wrist/to_timestamp"
    table = pq.read_table(root / file)
    ends = table[name].to_pylist()
    ends[1] -= 3 / 20
    pq.write_table(table.set_column(table.column_names.index(name), name, pa.array(ends)), root / file)


def truncate(root: Path, file: str, keep: float) -> None:
    data = (root / file).read_bytes()
    (root / file).write_bytes(data[: int(len(data) * keep)])


def scramble(root: Path, file: str, frame: int) -> None:
    """Overwrite one frame in a video; its index is left whole."""
    with av.open(str(root / file)) as container:
        entry = container.streams.video[0].index_entries[frame]
    data = bytearray((root / file).read_bytes())
    data[entry.pos : entry.pos + entry.size] = b"\xa5" * entry.size
    (root / file).write_bytes(data)


def encoded(value: bytes | None) -> Callable[[Path], None]:
    return lambda root: edit(root, V21_DATA, observation__images__wrist=(7, {"bytes": value, "path": "x.png"}))


# name: recording, what is done to it, and what is found: file, episode, frame, problem
DAMAGE: dict[str, tuple[str, Callable[[Path], Any], tuple[str, int, int | None, str]]] = {
    "NaN state": (
        "v30",
        lambda root: edit(root, V30_DATA, observation__state=(FIRST + 4, NAN)),
        (V30_DATA, 1, 4, "observation.state[1] is nan"),
    ),
    "NaN action": (
        "v21",
        lambda root: edit(root, V21_DATA, action=(4, NAN)),
        (V21_DATA, 1, 4, "action[1] is nan"),
    ),
    "state of another length": (
        "v21",
        lambda root: edit(root, V21_DATA, observation__state=(9, [0.0, 0.0])),
        (V21_DATA, 1, 9, "observation.state has length 2, info.json says 4"),
    ),
    "missing row, v30": (
        "v30",
        lambda root: edit(root, V30_DATA, episode_index=(FIRST + 4, 14)),
        (V30_DATA, 1, None, "87 rows, the episode table says 88"),
    ),
    "missing row, v21": (
        "v21",
        lambda root: pq.write_table(pq.read_table(root / V21_DATA).slice(0, 80), root / V21_DATA),
        (V21_DATA, 1, None, "80 rows, the episode table says 88"),
    ),
    "rows out of order": (
        "v30",
        lambda root: edit(root, V30_DATA, frame_index=(FIRST + 3, 7)),
        (V30_DATA, 1, 3, "frame_index is 7, expected 3"),
    ),
    "wrong timestamp": (
        "v30",
        lambda root: edit(root, V30_DATA, timestamp=(FIRST + 10, 0.53)),
        (V30_DATA, 1, 10, "timestamp is 0.530 s, expected 0.500 s at 20 frames per second"),
    ),
    "missing task": (
        "v21",
        lambda root: edit(root, V21_DATA, task_index=(5, 9)),
        (V21_DATA, 1, 5, "task_index is 9, a task that meta/tasks does not have; it has [0, 1, 2, 3]"),
    ),
    "missing data file": (
        "v21",
        lambda root: (root / V21_DATA).unlink(),
        (V21_DATA, 1, None, "the file is missing"),
    ),
    "truncated data file": (
        "v21",
        lambda root: truncate(root, V21_DATA, 0.9),
        (V21_DATA, 1, None, "cannot be read: "),
    ),
    "missing video": (
        "v21",
        lambda root: (root / V21_VIDEO).unlink(),
        (V21_VIDEO, 1, None, "the file is missing"),
    ),
    "truncated video, v30": (
        "v30",
        lambda root: truncate(root, V30_VIDEO, 0.1),
        (V30_VIDEO, 1, 64, "the file is cut off: it has 110507 bytes and this frame ends at "),
    ),
    "truncated video, v21": (
        "v21",
        lambda root: truncate(root, V21_VIDEO, 0.5),
        (V21_VIDEO, 1, None, "cannot be opened: "),
    ),
    "empty video": (
        "v21",
        lambda root: (root / V21_VIDEO).write_bytes(b""),
        (V21_VIDEO, 1, None, "cannot be opened: "),
    ),
    "video too short": (
        "v21",
        lambda root: write_video(root / V21_VIDEO, 20, 55),
        (V21_VIDEO, 1, 55, "the video has 55 frames for this episode, the episode table says 88"),
    ),
    "video too long": (
        "v21",
        lambda root: shutil.copy(str(root / V21_VIDEO).replace("_000001", "_000010"), root / V21_VIDEO),
        (V21_VIDEO, 1, 88, "the video has 92 frames for this episode, the episode table says 88"),
    ),
    "video of another rate": (
        "v21",
        lambda root: write_video(root / V21_VIDEO, 10, 88),
        (V21_VIDEO, 1, 1, "it is shown at 0.100 s, not at 0.050 s"),
    ),
    "clip too short": (
        "v30",
        end_early,
        (V30_VIDEO, 1, None, "2.95 to 7.2 s does not hold its 88 frames at 20 per second"),
    ),
    "undecodable video": (
        "v21",
        lambda root: scramble(root, V21_VIDEO, 46),
        (V21_VIDEO, 1, 46, "cannot be decoded at 2.300 s: "),
    ),
    "missing picture": (
        "v21_images",
        encoded(None),
        (V21_DATA, 1, 7, "row 7 has no bytes in observation.images.wrist"),
    ),
    "undecodable picture": (
        "v21_images",
        encoded(b"\x89PNG\r\n\x1a\n but no more"),
        (V21_DATA, 1, 7, "the image in row 7 of observation.images.wrist cannot be decoded"),
    ),
}
ONLY_DECODING = ("undecodable video", "missing picture", "undecodable picture")  # tells


@pytest.fixture
def make(tmp_path: Path) -> Callable[[str], Path]:
    """A copy to damage, by the name of a recording."""

    def copy(name: str) -> Path:
        source = METAWORLD if name == "v30" else HERE / f"metaworld_{name}"
        return Path(shutil.copytree(source, tmp_path / "dataset"))

    return copy


def read_all(root: Path) -> None:
    dataset = LeRobotDataset(root, episodes=[0, 1])
    for i in range(len(dataset)):
        dataset[i]


@pytest.mark.parametrize("name", DAMAGE)
def test_damage(name: str, make: Callable[[str], Path]):
    recording, damage, (file, episode, frame, problem) = DAMAGE[name]
    root = make(recording)
    damage(root)
    found = find_damage(root, episodes=[0, 1])
    assert [(p.file, p.episode, p.frame) for p in found] == [(root / file, episode, frame)]
    assert found[0].problem.startswith(problem)
    place = f"{root / file}, episode {episode}" + ("" if frame is None else f", frame {frame}")
    assert str(found[0]) == f"{place}: {found[0].problem}"

    with pytest.raises(DataError) as raised:
        read_all(root)
    assert str(raised.value) == str(found[0]), "reading says something else than the check"

    kept = LeRobotDataset(root, episodes=[0, 1], skip_damaged=True)
    if name in ONLY_DECODING:
        assert [e.index for e in kept.episodes] == [0, 1] and not kept.skipped
        assert not find_damage(root, episodes=[0, 1], decode=False)
    else:
        assert [e.index for e in kept.episodes] == [0] and len(kept) == FIRST == len(kept.table("action"))
        assert [str(p) for p in kept.skipped] == [str(found[0])]


@pytest.mark.parametrize("recording", ["v30", "v21", "v21_images"])
def test_undamaged(recording: str, make: Callable[[str], Path]):
    assert find_damage(make(recording), episodes=[0, 1]) == []


def test_all_problems_at_once_and_all_damaged(make: Callable[[str], Path]):
    root = make("v21")
    for episode in (0, 1):
        edit(root, f"data/chunk-000/episode_{episode:06d}.parquet", action=(4, NAN))
    (root / V21_VIDEO).unlink()
    assert [(p.episode, p.file) for p in find_damage(root, episodes=[0, 1])] == [
        (0, root / "data/chunk-000/episode_000000.parquet"),
        (1, root / V21_DATA),
        (1, root / V21_VIDEO),
    ]
    assert len(LeRobotDataset(root, episodes=[0, 1], skip_damaged=True)) == 0


@pytest.mark.parametrize(
    "file",
    [
        "meta/info.json",
        "meta/tasks.parquet",
        "meta/episodes/chunk-000/file-000.parquet",
        V30_DATA,
        V30_VIDEO,
    ],
)
def test_missing_file(file: str, make: Callable[[str], Path]):
    root = make("v30")
    (root / file).unlink()
    with pytest.raises(DataError, match=file.split("/chunk-000")[0]):
        LeRobotDataset(root)
    assert any(file.split("/chunk-000")[0] in str(problem) for problem in find_damage(root))


@pytest.mark.parametrize(
    ("file", "text", "problem"),
    [
        ("info.json", "{", "is not JSON"),
        ("info.json", '{"codebase_version": "v2.1", "fps": 20}', "lacks .*'features', 'total_frames', .*'chunks_size'"),
        ("episodes.jsonl", '{"episode_index": 0, "length": 59}\n' * 2, "has a number twice"),
        ("episodes.jsonl", '{"episode_index": 0, "length": 0}', "or an episode without frames"),
        ("tasks.jsonl", '{"task_index": 0}\n', "line 1 lacks one of"),
        ("episodes.jsonl", '{"episode_index": 0, "length": 59}\n{', "line 2 is not JSON"),
        ("episodes.jsonl", '{"episode_index": 0, "length": 59}\n', "info.json: the episodes have 59 frames in all"),
    ],
)
def test_damaged_metadata(file: str, text: str, problem: str, make: Callable[[str], Path]):
    root = make("v21")
    (root / "meta" / file).write_text(text)
    with pytest.raises(DataError, match=problem):
        LeRobotDataset(root, skip_damaged=True)


def test_command(make: Callable[[str], Path], capsys: pytest.CaptureFixture[str]):
    root = make("v21_images")
    main([str(root)])
    assert "no damage found" in capsys.readouterr().out
    edit(root, V21_DATA, action=(4, NAN))
    with pytest.raises(SystemExit) as stop:
        main([str(root)])
    lines = capsys.readouterr().out.splitlines()
    assert stop.value.code == 1 and len(lines) == 2
    assert lines[0].split() == ["episode", "frame", "file", "problem"]
    assert lines[1].split() == ["1", "4", str(root / V21_DATA), "action[1]", "is", "nan"]
    with pytest.raises(SystemExit) as stop:
        main([str(root / "gone")])
    assert stop.value.code == 1 and "no such file or folder" in capsys.readouterr().err
