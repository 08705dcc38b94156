"""Datasets that others wrote: wrong types, hostile paths and sizes end in a DataError with file and field."""

from __future__ import annotations

import concurrent.futures
import io
import json
import os
import pickle
import shutil
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import av
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from pi0.datasets.annotations import AnnotatedDataset
from pi0.datasets.check import find_damage
from pi0.datasets.errors import DataError
from pi0.datasets.images import read_image
from pi0.datasets.json_lines import read_jsonl
from pi0.datasets.lerobot import LeRobotDataset
from pi0.datasets.lerobot_tables import fill_path, read_parquet
from pi0.datasets.video import EncodedImages, Video
from pi0.sample import METAWORLD
from tests.pi0.datasets.test_lerobot import RECORDINGS, edit_info
from tests.pi0.datasets.test_video import write_video

CAMERA = "observation.images.corner"
EPISODES, DATA = "meta/episodes/chunk-000/file-000.parquet", "data/chunk-000/file-000.parquet"


@pytest.fixture
def v30(tmp_path: Path) -> Path:
    return Path(shutil.copytree(METAWORLD, tmp_path / "dataset"))


@pytest.fixture
def v21(tmp_path: Path) -> Path:
    return Path(shutil.copytree(RECORDINGS["metaworld_v21_images"], tmp_path / "dataset"))


def feature(root: Path, name: str, **changes: Any) -> None:
    """Change the entries of a feature in info.json; None removes one."""
    features = json.loads((root / "meta/info.json").read_text())["features"]
    changed = features.get(name, {"dtype": "float32", "shape": [1], "names": None}) | changes
    edit_info(root, features=features | {name: {k: v for k, v in changed.items() if v is not None}})


def column(root: Path, file: str, name: str, values: Callable[[list[Any]], Any]) -> None:
    """Replace a column of a Parquet file."""
    table = pq.read_table(root / file)
    new = values(table[name].to_pylist())
    pq.write_table(table.set_column(table.column_names.index(name), name, pa.array(new)), root / file)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda root: edit_info(root, fps="10"), "fps is '10'; expected a finite number"),
        (lambda root: edit_info(root, fps=0), "fps is 0; expected a positive number"),
        (lambda root: edit_info(root, fps=-20), "fps is -20; expected a positive number"),
        (lambda root: edit_info(root, fps=float("nan")), "fps is nan; expected a finite number"),
        (lambda root: edit_info(root, fps=True), "fps is True"),
        (lambda root: edit_info(root, total_frames=2**70), "total_frames is 1180591620717411303424; expected a whole"),
        (
            lambda root: edit_info(root, total_frames=2**40),
            "the episodes have 1165 frames in all, total_frames is",
        ),
        (lambda root: edit_info(root, features=[]), "features is []; expected dict"),
        (lambda root: edit_info(root, codebase_version=["v3.0"]), "supported are v2.1, v3.0"),
        (lambda root: edit_info(root, data_path=5), "data_path is 5; expected str"),
        (lambda root: feature(root, "extra", dtype=None), "features['extra'] lacks one of ['dtype']"),
        (lambda root: feature(root, "action", shape=None), "features['action'] shape is None; expected [dimensions]"),
        (lambda root: feature(root, "action", shape=[2, 2]), "a state or action is a vector, not an array"),
        (lambda root: feature(root, "action", shape=[2**40]), "features['action'] shape is [1099511627776]"),
        (lambda root: feature(root, CAMERA, info=5), "info is 5; expected an object"),
        (lambda root: (root / "meta/info.json").write_text("[" * 100_000), "is not JSON"),
        (lambda root: (root / "meta/info.json").write_text("5"), "dataset format None"),
        (lambda root: (root / "meta/info.json").write_bytes(b'{"a": "\xff"}'), "is not UTF-8"),
    ],
)
def test_info_of_wrong_types(change: Callable[[Path], Any], problem: str, v30: Path):
    change(v30)
    with pytest.raises(DataError) as raised:
        LeRobotDataset(v30, skip_damaged=True)
    assert problem in str(raised.value) and str(raised.value).startswith(str(v30 / "meta/info.json"))
    assert [str(p) for p in find_damage(v30)] == [str(raised.value)]  # what pi0-check-data lists


@pytest.mark.parametrize(
    ("file", "name", "values", "problem"),
    [
        (EPISODES, "length", lambda x: [*x[:-1], None], "row 15 lacks one of ['length']"),
        (
            EPISODES,
            "episode_index",
            lambda x: [str(i) for i in x],
            "row 0 episode_index is '0'; expected",
        ),
        (EPISODES, "data/chunk_index", lambda x: [0.5] * len(x), "data/chunk_index is 0.5; expected a whole number"),
        ("meta/tasks.parquet", "task_index", lambda x: [None] * len(x), "row 0 lacks one of ['task_index']"),
        ("meta/tasks.parquet", "__index_level_0__", lambda x: list(range(len(x))), "task is 0; expected str"),
    ],
)
def test_tables_of_wrong_types(file: str, name: str, values: Callable, problem: str, v30: Path):
    column(v30, file, name, values)
    with pytest.raises(DataError) as raised:
        LeRobotDataset(v30, skip_damaged=True)
    assert problem in str(raised.value) and str(v30 / file) in str(raised.value)


@pytest.mark.parametrize(
    ("name", "values", "problem"),
    [
        ("action", lambda x: [["a"] * 4] * len(x), "action is list<element: string>; expected 4 numbers in each row"),
        ("action", lambda x: [0.5] * len(x), "action is double; info.json says 4 numbers in each row"),
        ("action", lambda x: [[[0.0, 1.0], [0.0, 1.0]]] * len(x), "action has length 2, info.json says 4"),
        ("task_index", lambda x: [{"a": i} for i in x], "task_index is struct"),
        ("timestamp", lambda x: [[t, t] for t in x], "timestamp has length 2, info.json says 1"),
        ("timestamp", lambda x: [None] * len(x), "timestamp is null"),
    ],
)
def test_columns_of_wrong_types(name: str, values: Callable, problem: str, v30: Path):
    column(v30, DATA, name, values)
    with pytest.raises(DataError) as raised:
        LeRobotDataset(v30, cameras=[], episodes=[0])
    assert problem in str(raised.value) and str(raised.value).startswith(f"{v30 / DATA}, episode 0")
    left = LeRobotDataset(v30, cameras=[], episodes=[0], skip_damaged=True)
    assert len(left) == 0
    with pytest.raises(DataError, match="all episodes are damaged; the first: "):
        left[0]


def test_numbers_in_lists_of_one_and_whole_floats_are_read(v30: Path):
    expected = LeRobotDataset(METAWORLD, episodes=[3])[7]
    for name in ("timestamp", "frame_index", "episode_index", "index", "task_index"):
        column(v30, DATA, name, lambda x: [[value] for value in x])
    column(v30, EPISODES, f"videos/{CAMERA}/chunk_index", lambda x: [float(value) for value in x])
    column(v30, EPISODES, "length", lambda x: [float(value) for value in x])
    item = LeRobotDataset(v30, episodes=[3])[7]
    for key, value in expected.items():
        np.testing.assert_array_equal(item[key], value)


def test_one_episode_without_a_camera(v30: Path, tmp_path: Path):
    """Left out by `skip_damaged`, named by the check, and no matter where the camera is not read."""
    for field in ("chunk_index", "file_index", "from_timestamp", "to_timestamp"):
        column(v30, EPISODES, f"videos/{CAMERA}/{field}", lambda x: [x[0], None, *x[2:]])
    problem = f"{v30 / EPISODES}, episode 1: lacks ['videos/{CAMERA}/chunk_index'"
    with pytest.raises(DataError) as raised:
        LeRobotDataset(v30)
    assert str(raised.value).startswith(problem)
    kept = LeRobotDataset(v30, episodes=[0, 1, 2], skip_damaged=True, image_size=(8, 8), cache="memory")
    assert [e.index for e in kept.episodes] == [0, 2] and kept[60][CAMERA].shape == (8, 8, 3)
    assert kept.cache_name(CAMERA) != LeRobotDataset(METAWORLD, image_size=(8, 8)).cache_name(CAMERA)
    assert [str(p).startswith(problem) for p in find_damage(v30, episodes=[0, 1], decode=False)] == [True]
    other = LeRobotDataset(v30, cameras=["observation.images.wrist"])
    assert len(other.episodes) == 16


@pytest.mark.parametrize("separator", ["\u2028", "\u2029", "\x85", "\xa0", "\x0b", "\x0c", "\x1c", "\r"])
def test_lines_end_at_line_feeds_alone(separator: str, v21: Path, tmp_path: Path):
    text = f"open{separator}the drawer"
    ascii = separator < " "  # control characters are escaped in JSON
    tasks = [{"task_index": n, "task": text} for n in range(4)]
    lines = "\r\n".join(json.dumps(task, ensure_ascii=ascii) for task in tasks)
    (v21 / "meta/tasks.jsonl").write_bytes(lines.encode("utf-8"))
    assert LeRobotDataset(v21, episodes=[0])[0]["task"] == text
    row = {"episode": 0, "start_frame": 0, "end_frame": 3, "subtask": text}
    (tmp_path / "subtasks.jsonl").write_bytes(json.dumps(row, ensure_ascii=ascii).encode("utf-8"))
    annotated = AnnotatedDataset(LeRobotDataset(v21, episodes=[0]), tmp_path / "subtasks.jsonl")
    assert annotated[2]["subtask"] == text and annotated[3]["subtask"] == ""


def test_text_does_not_depend_on_the_locale(v21: Path):
    (v21 / "meta/tasks.jsonl").write_text('{"task_index": 0, "task": "öffne π"}', encoding="utf-8")
    code = (
        "from pi0.datasets.lerobot_tables import read_info, read_texts; from pathlib import Path; "
        f"root = Path({str(v21)!r}); print(ascii(read_texts(root, read_info(root), 'task')[0]))"
    )
    env = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PATH": "/usr/bin", "PYTHONPATH": "."}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=False)
    assert done.stdout.strip() == ascii("öffne π"), done.stderr


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        (b"5", "line 2 is 5; expected an object with ['task_index', 'task']"),
        (b'{"task_index": 1, "task": null}', "line 2 lacks one of ['task']"),
        (b'{"task_index": 1.5, "task": "x"}', "line 2 task_index is 1.5; expected a whole number"),
        (b'{"task_index": 1, "task": "\\ud800"}', "line 2 is not UTF-8"),
        (b'{"task_index": 1, "task": "\xff"}', "line 2 is not UTF-8"),
        (b"[" * 100_000, "line 2 is not JSON"),
        (b'{"task_index": 1, "task": "x", "more": ' + b"[" * 40 + b"]" * 40 + b"}", "nests more than"),
    ],
)
def test_lines_that_are_refused(line: bytes, problem: str, v21: Path):
    file = v21 / "meta/tasks.jsonl"
    file.write_bytes(b'{"task_index": 0, "task": "a \\ud83d\\ude00"}\n' + line + b"\n")  # a whole pair is a text
    with pytest.raises(DataError) as raised:
        LeRobotDataset(v21)
    assert problem in str(raised.value) and raised.value.file == file


@pytest.mark.parametrize(
    ("template", "problem"),
    [
        ("data/{episode_index.__class__}.parquet", "{episode_index.__class__}"),
        ("data/{episode_index[0]}.parquet", "{episode_index[0]}"),
        ("data/{episode_index:99999999d}.parquet", "{episode_index:99999999d}"),
        ("data/{episode_index:{episode_chunk}}.parquet", "is not one of"),
        ("data/{episode_index!r}.parquet", "is not one of"),
        ("data/{0}.parquet", "is not one of"),
        ("data/{secret}.parquet", "['episode_chunk', 'episode_index']"),
        ("data/{episode_index", "expected '}'"),
        ("/etc/passwd", "must be relative"),
        ("data/../../{episode_index}", "without '..'"),
        ("", "is not a path below"),
        ("data/\0", "is not a path below"),
    ],
)
def test_templates_that_are_refused(template: str, problem: str, v21: Path):
    edit_info(v21, data_path=template)
    with pytest.raises(DataError) as raised:
        LeRobotDataset(v21)
    assert problem in str(raised.value) and str(raised.value).startswith(f"{v21 / 'meta/info.json'}: data_path '")


def test_templates_that_are_filled(tmp_path: Path):
    info = {"path": "a {{x}}/{video_key}/{chunk_index:03d}-{chunk_index:2d}-{chunk_index:d}-{chunk_index}.mp4"}
    path = fill_path(tmp_path, info, "path", video_key="cam", chunk_index=7)
    assert path == tmp_path / "a {x}" / "cam" / "007- 7-7-7.mp4"
    with pytest.raises(DataError, match=r"without '\.\.'"):  # the name of a camera is not ours either
        fill_path(tmp_path, info, "path", video_key="../../x", chunk_index=7)


def test_a_link_that_leaves_the_dataset(v21: Path, tmp_path: Path):
    file = v21 / "data/chunk-000/episode_000000.parquet"
    file.rename(tmp_path / "outside.parquet")
    file.symlink_to(tmp_path / "outside.parquet")
    with pytest.raises(DataError, match=r"is a link to .*outside\.parquet"):
        LeRobotDataset(v21)


@pytest.mark.parametrize(
    "name", ["a#b", "a?b", "a%20b", "a%03d", "a|b", "a\\b", "a[b]", "a*b", "a:b", "x=1", "ä\u2028"]
)
def test_characters_of_folder_names(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    for recording in ("metaworld_v30", "metaworld_v21_images"):
        shutil.copytree(RECORDINGS[recording], Path(name) / recording)
        for root in (Path(name, recording), tmp_path / name / recording):
            assert LeRobotDataset(root, episodes=[0])[5][CAMERA].any()


def test_row_counts_beyond_info(v21: Path):
    """A few kilobytes that declare very many rows, as runs of one value."""
    file = v21 / "meta/x.parquet"
    pq.write_table(pa.table({"a": np.zeros(3_000_000, np.int8)}), file, compression="zstd")
    assert file.stat().st_size < 20_000
    with pytest.raises(DataError, match="has 3000000 rows; expected at most 130"):
        read_parquet(file, max_rows=130)
    with pytest.raises(DataError, match="has 3000000 values; at most 1000000 are read"):
        read_parquet(file, max_values=1_000_000)
    assert len(read_parquet(file)) == 3_000_000
    data = v21 / "data/chunk-000/episode_000001.parquet"
    pq.write_table(pa.concat_tables([pq.read_table(data)] * 2), data)
    with pytest.raises(DataError, match=r"episode_000001.parquet, episode 1: has 142 rows; expected at most 130"):
        LeRobotDataset(v21)


def test_repeated_bytes_are_not_expanded(tmp_path: Path):
    """2 GB of images that are one of 1 MB in the file, and 2 GB of texts."""
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (500, 600, 3), np.uint8))
    png = io.BytesIO()
    noise.save(png, "png")
    index = pa.array(np.zeros(2300, np.int32))
    images = pa.StructArray.from_arrays([pa.DictionaryArray.from_arrays(index, pa.array([png.getvalue()]))], ["bytes"])
    texts = pa.DictionaryArray.from_arrays(index, pa.array(["x" * 900_000]))
    file = tmp_path / "x.parquet"
    pq.write_table(pa.table({"cam": images, "text": texts}), file, dictionary_pagesize_limit=2**24)
    assert file.stat().st_size < 2_000_000
    before = pa.total_allocated_bytes()
    images_of = EncodedImages(file, "cam")
    np.testing.assert_array_equal(images_of.frame(2299), np.array(noise))
    table = read_parquet(file, ["text"])
    assert pa.total_allocated_bytes() - before < 50_000_000 and len(table) == 2300
    with pytest.raises(DataError, match=r"x\.parquet: row group 0 has .* bytes of cam; at most 1000 are read"):
        EncodedImages(file, "cam", max_bytes=1000).frame(0)


def test_image_sizes_are_checked_before_decoding():
    for root in (METAWORLD, RECORDINGS["metaworld_v21_images"]):
        dataset = LeRobotDataset(root, episodes=[0], max_pixels=1000)
        with pytest.raises(DataError, match=r"has \d+ x \d+ pixels; max_pixels is 1000") as raised:
            dataset[3]
        assert raised.value.episode == 0 and raised.value.file is not None


@pytest.mark.parametrize(
    ("size", "problem"), [(16_000, "has 16000 x 16000 pixels; max_pix"), (65_535, "cannot be decoded")]
)
def test_a_video_of_absurd_size(size: int, problem: str, tmp_path: Path):
    """The header's size is changed in place; the frames are what they were."""
    file = tmp_path / "x.mp4"
    write_gray(file, "yuv420p", np.uint8, "gray")
    content = file.read_bytes()
    place = content.index(struct.pack(">HH", 64, 64), content.index(b"stsd"))  # of width and height
    file.write_bytes(content[:place] + struct.pack(">HH", size, size) + content[place + 4 :])
    start = time.perf_counter()
    with pytest.raises(DataError, match=rf"x\.mp4: {problem}"):
        Video(file, 30).frame(0.0)
    assert time.perf_counter() - start < 5


def write_gray(file: Path, pixels: str, dtype: Any, format: str) -> None:
    """Three gray frames without loss, in MP4."""
    with av.open(str(file), "w") as container:
        stream = container.add_stream("ffv1", 30)
        stream.width = stream.height = 64
        stream.pix_fmt = pixels
        for _ in range(3):
            frame = av.VideoFrame.from_ndarray(np.full((64, 64), 200, dtype), format=format)
            container.mux(stream.encode(frame.reformat(format=pixels)))
        container.mux(stream.encode())


def test_a_video_of_depth_is_no_color(tmp_path: Path):
    write_gray(tmp_path / "x.mp4", "gray16le", np.uint16, "gray16le")
    with pytest.raises(DataError, match=r"x\.mp4: has mode gray16le: 16-bit or depth, not 8-bit colors"):
        Video(tmp_path / "x.mp4", 30).frame(0.0)
    write_gray(tmp_path / "y.mp4", "gray", np.uint8, "gray")
    assert np.abs(Video(tmp_path / "y.mp4", 30).frame(0.0).astype(int) - 200).max() <= 1


@pytest.mark.parametrize(
    "playlist", ["ffconcat version 1.0\nfile {video}\n", "#EXTM3U\n#EXTINF:10,\n{video}\n#EXT-X-ENDLIST\n"]
)
def test_a_video_that_names_other_files(playlist: str, tmp_path: Path):
    write_video(tmp_path / "other.mp4", 30, 5)
    (tmp_path / "x.mp4").write_text(playlist.format(video="other.mp4"))
    with pytest.raises(DataError, match=r"x\.mp4: cannot be opened"):
        Video(tmp_path / "x.mp4", 30).frame(0.0)


@pytest.mark.parametrize(
    "about", [{"info": {"is_depth_map": True}}, {"video_info": {"video.is_depth_map": True}}, {"is_depth_map": True}]
)
def test_depth_is_no_camera(about: dict[str, Any], v30: Path):
    feature(v30, CAMERA, **about)
    dataset = LeRobotDataset(v30, episodes=[0])
    assert dataset.cameras == ["observation.images.wrist"] and CAMERA not in dataset[0]
    with pytest.raises(DataError, match="no camera"):
        LeRobotDataset(v30, cameras=[CAMERA])


def test_long_episodes_take_no_memory_where_they_are_not_read(v21: Path, tmp_path: Path):
    """An episode that claims 2**50 frames is only refused when it is read; its annotations take none either."""
    rows = [{"episode_index": 0, "length": 59}, {"episode_index": 1, "length": 2**50}]
    (v21 / "meta/episodes.jsonl").write_text("\n".join(map(json.dumps, rows)))
    edit_info(v21, total_frames=2**50 + 59)
    line = {"episode": 1, "start_frame": 0, "end_frame": 2**49, "subtask": "wait"}
    (tmp_path / "subtasks.jsonl").write_text(json.dumps(line))
    dataset = AnnotatedDataset(LeRobotDataset(v21, episodes=[0]), tmp_path / "subtasks.jsonl")
    assert len(dataset) == 59 and dataset[3]["subtask"] == ""
    with pytest.raises(DataError, match="71 rows, the episode table says 1125899906842624"):
        LeRobotDataset(v21, episodes=[1])


@pytest.mark.parametrize("name", ["metaworld_v30", "metaworld_v21_images"])
def test_threads_share_a_dataset(name: str):
    """Videos, and row groups of images: in every thread the frames of one thread."""
    dataset = LeRobotDataset(RECORDINGS[name], episodes=[0, 1])
    order = [np.random.default_rng(seed).integers(0, len(dataset), 40).tolist() for seed in range(4)]
    expected = {i: dataset[i][CAMERA] for i in sorted({i for part in order for i in part})}
    start = threading.Barrier(4)

    def read(part: list[int]) -> bool:
        start.wait()
        return all(np.array_equal(dataset[i][CAMERA], expected[i]) for i in part)

    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        assert all(pool.map(read, order))
    again = pickle.loads(pickle.dumps(dataset))
    np.testing.assert_array_equal(again[order[0][0]][CAMERA], expected[order[0][0]])


def test_threads_that_end_leave_no_files_open(monkeypatch: pytest.MonkeyPatch):
    dataset, opened = LeRobotDataset(METAWORLD, episodes=[0], cameras=[CAMERA]), []
    original = LeRobotDataset._open
    import weakref

    def noted(self: LeRobotDataset, *arguments: Any) -> Any:
        file = original(self, *arguments)
        opened.append(weakref.ref(file))
        return file

    monkeypatch.setattr(LeRobotDataset, "_open", noted)
    for _ in range(3):
        thread = threading.Thread(target=lambda: dataset[0])
        thread.start()
        thread.join()
    assert len(opened) == 3 and not any(file() for file in opened)


def test_reading_lines_needs_little_memory(tmp_path: Path):
    (tmp_path / "x.jsonl").write_bytes(b'"' + b"x" * (17 << 20) + b'"\n')
    with pytest.raises(DataError, match=r"x\.jsonl: line 1 has more than"):
        list(read_jsonl(tmp_path / "x.jsonl"))


def test_pipes_and_devices(tmp_path: Path):
    """They have no end: opening one would wait forever."""
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "zero").symlink_to("/dev/zero")
    for file in (tmp_path / "pipe", tmp_path / "zero"):
        readers = {
            "table": lambda file=file: read_parquet(file),
            "lines": lambda file=file: list(read_jsonl(file)),
            "video": lambda file=file: Video(file, 10).frame(0.0),
            "images": lambda file=file: EncodedImages(file, "x").frame(0),
            "image": lambda file=file: read_image(file),
        }
        for read in readers.values():
            with pytest.raises(DataError, match=f"{file.name}.* is not a regular file"):
                read()
