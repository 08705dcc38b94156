"""`DatasetWriter`, LeRobot v3.0 datasets episode by episode: to collect demonstrations without LeRobot.

    with DatasetWriter("data/mine", fps=20, features=features, robot_type="so100") as writer:
        episode = writer.begin()
        for ...:
            frame = {"observation.state": state, "observation.images.top": image, "action": action}
            episode.add(frame, "stack the cups")
        episode.save()

Every episode has files of its own, which the format allows, so that what is written once is never touched again.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tempfile
import threading
from collections.abc import Mapping
from fractions import Fraction
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import av
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pi0.datasets.base import is_camera
from pi0.datasets.lerobot_tables import read_episodes, read_info, read_texts
from pi0.reading import read_json
from pi0.robots.robot import check_text
from pi0.storage import local_path, new_file, write_text

CHUNK = 1000  # files in a folder
DATA = "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet"
VIDEO = "videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4"
COUNTERS = {"timestamp": "float32", "frame_index": "int64", "episode_index": "int64", "index": "int64"}
COUNTERS |= {"task_index": "int64"}
DTYPES = ("float32", "float64", "int64", "bool")
TASKS = "/proc/self/task"  # of Linux: a process's threads
KEYFRAMES = "10"  # frames between keyframes: more are smaller, and slower to read at random
# encoder, pixel format, options
CODECS: dict[str, tuple[str, str, dict[str, str]]] = {
    "lossless": ("libx264rgb", "rgb24", {"crf": "0", "preset": "veryfast"}),
    "h264": ("libx264", "yuv420p", {"crf": "20", "preset": "veryfast"}),
    "av1": ("libsvtav1", "yuv420p", {"crf": "30", "preset": "10"}),
}


class DatasetWriter:
    """Writes a dataset to `root`, a new or empty folder, or with `resume` one that a DatasetWriter wrote before.

    `features` describes the columns as `info.json` does: {"observation.state": {"dtype": "float32", "shape": [D],
    "names": optional}, "observation.images.top": {"dtype": "video", "shape": [H, W, 3]}, "action": …}; dtypes of
    numbers are DTYPES. `codec` is one of CODECS: "lossless" (H.264 in RGB) keeps every bit of the images, "h264" and
    "av1" (LeRobot's) are many times smaller.

    An episode is in the dataset with all of its files or not at all: files are written elsewhere and moved in place,
    its row in the table of episodes and `info.json` last; what a crash between those two left is put right by `resume`.
    Several episodes may be open at a time, in several threads. Raises ValueError for features that are wrong or, with
    `resume`, not those of the dataset, and FileExistsError for a folder that has something else.
    """

    def __init__(
        self,
        root: str | Path,
        *,
        fps: float,
        features: Mapping[str, Mapping[str, Any]],
        robot_type: str | None = None,
        codec: str = "h264",
        resume: bool = False,
    ):
        if codec not in CODECS:
            raise ValueError(f"unknown codec {codec!r}; known are {', '.join(CODECS)}")
        if CODECS[codec][0] not in av.codecs_available:
            raise ValueError(f"codec {codec!r}: this PyAV has no {CODECS[codec][0]}")
        if isinstance(fps, bool) or not isinstance(fps, int | float) or not 0 < fps <= 1000:
            raise ValueError(f"fps is {fps!r}; expected a number from 0 to 1000")
        self.root, self.fps, self.codec = local_path(root), fps, codec
        self.features = _checked_features(features)
        self._lock, self._open = threading.RLock(), set[EpisodeWriter]()
        self._tasks: dict[str, int] = {}
        self._stats: dict[str, _Sums] = {name: _Sums() for name in self.features}
        self.episodes = self.frames = 0
        self.robot_type = robot_type
        if resume and (self.root / "meta" / "info.json").exists():
            self._resume()
        elif self.root.exists() and any(self.root.iterdir()):
            raise FileExistsError(f"{self.root} exists already and is not empty; choose another folder")
        (self.root / "meta").mkdir(parents=True, exist_ok=True)
        self._write_meta()

    def begin(self) -> EpisodeWriter:
        """A new episode, empty."""
        episode = EpisodeWriter(self)
        with self._lock:
            self._open.add(episode)
        return episode

    def close(self) -> None:
        """Discard the episodes that were not saved."""
        for episode in list(self._open):
            episode.discard()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self.close()

    def _resume(self) -> None:
        info = read_info(self.root)
        own = {name: feature for name, feature in info["features"].items() if name not in COUNTERS}
        changed = [n for n in {**own, **self.features} if _kind(own.get(n)) != _kind(self.features.get(n))]
        if info["codebase_version"] != "v3.0" or info["fps"] != self.fps or changed:
            raise ValueError(
                f"{self.root} has {info['codebase_version']}, {info['fps']} fps, and other features {changed}; choose "
                "another folder"
            )
        videos = [name for name, feature in own.items() if is_camera(feature)]
        episodes = list(read_episodes(self.root, info | {"total_frames": 2**24}, videos))
        if [e.index for e in episodes] != list(range(len(episodes))):
            raise ValueError(f"{self.root}: its episodes are not numbered from 0 on")
        self.episodes, self.frames = len(episodes), sum(e.length for e in episodes)
        self._tasks = {text: number for number, text in read_texts(self.root, info, "task").items()}
        stats = self.root / "meta" / "stats.json"
        for name, entry in (read_json(stats) if stats.exists() else {}).items():
            if name in self._stats:
                self._stats[name] = _Sums.of(entry)

    def _save(self, episode: EpisodeWriter) -> int:
        """Move an episode's files in place, and enter it."""
        with self._lock:
            number = self.episodes
            place = {"chunk_index": number // CHUNK, "file_index": number % CHUNK}
            for task in episode.tasks:
                self._tasks.setdefault(task, len(self._tasks))
            self._write_tasks()
            row: dict[str, Any] = {
                "episode_index": number,
                "tasks": list(dict.fromkeys(episode.tasks)),
                "length": episode.length,
                "data/chunk_index": place["chunk_index"],
                "data/file_index": place["file_index"],
                "dataset_from_index": self.frames,
                "dataset_to_index": self.frames + episode.length,
                "meta/episodes/chunk_index": place["chunk_index"],
                "meta/episodes/file_index": place["file_index"],
            }
            for name in episode.videos:
                self._move(episode.videos[name].file, VIDEO.format(video_key=name, **place))
                row |= {f"videos/{name}/{key}": value for key, value in place.items()}
                row |= {f"videos/{name}/from_timestamp": 0.0, f"videos/{name}/to_timestamp": episode.length / self.fps}
            self._move(self._write_rows(episode, number), DATA.format(**place))
            table = pa.table({name: pa.array([value]) for name, value in row.items()})
            file = episode.folder / "episode.parquet"
            pq.write_table(table, file)
            self._move(file, f"meta/episodes/chunk-{place['chunk_index']:03d}/file-{place['file_index']:03d}.parquet")
            self.episodes, self.frames = number + 1, self.frames + episode.length
            for name, sums in episode.sums.items():
                self._stats[name].merge(sums)
            self._write_meta()
            return number

    def _write_rows(self, episode: EpisodeWriter, number: int) -> Path:
        frames = np.arange(episode.length)
        columns: dict[str, pa.Array] = {}
        for name, values in episode.columns.items():
            array = np.stack(values)
            kind = pa.from_numpy_dtype(array.dtype)
            flat = pa.array(array.reshape(-1), kind)
            columns[name] = flat if array.shape[1] == 1 else pa.FixedSizeListArray.from_arrays(flat, array.shape[1])
        columns["timestamp"] = pa.array((frames / self.fps).astype(np.float32))
        columns |= {"frame_index": pa.array(frames), "episode_index": pa.array(np.full_like(frames, number))}
        columns["index"] = pa.array(frames + self.frames)
        columns["task_index"] = pa.array(np.array([self._tasks[task] for task in episode.tasks], np.int64))
        file = episode.folder / "rows.parquet"
        pq.write_table(pa.table(columns), file)
        return file

    def _move(self, file: Path, name: str) -> None:
        target = self.root / name
        target.parent.mkdir(parents=True, exist_ok=True)
        with file.open("rb") as stream:
            os.fsync(stream.fileno())
        os.replace(file, target)

    def _write_tasks(self) -> None:
        index = "__index_level_0__"  # as pandas writes an index without a name
        kinds = {"pandas_type": "int64", "numpy_type": "int64"}, {"pandas_type": "unicode", "numpy_type": "object"}
        pandas = {
            "index_columns": [index],
            "column_indexes": [
                {"name": None, "field_name": None, **kinds[1], "metadata": {"encoding": "UTF-8"}},
            ],
            "columns": [
                {"name": "task_index", "field_name": "task_index", **kinds[0], "metadata": None},
                {"name": None, "field_name": index, **kinds[1], "metadata": None},
            ],
        }
        table = pa.table({"task_index": pa.array(range(len(self._tasks)), pa.int64()), index: list(self._tasks)})
        table = table.replace_schema_metadata({"pandas": json.dumps(pandas)})
        with new_file(self.root / "meta" / "tasks.parquet") as file:
            pq.write_table(table, file)

    def _write_meta(self) -> None:
        if not self._tasks and not (self.root / "meta" / "tasks.parquet").exists():
            self._write_tasks()
        counters = {name: {"dtype": dtype, "shape": [1], "names": None} for name, dtype in COUNTERS.items()}
        info = {
            "codebase_version": "v3.0",
            "robot_type": self.robot_type,
            "total_episodes": self.episodes,
            "total_frames": self.frames,
            "total_tasks": len(self._tasks),
            "chunks_size": CHUNK,
            "data_files_size_in_mb": 100,
            "video_files_size_in_mb": 200,
            "fps": self.fps,
            "splits": {"train": f"0:{self.episodes}"},
            "data_path": DATA,
            "video_path": VIDEO,
            "features": {name: self._described(f) for name, f in self.features.items()} | counters,
        }
        stats = {name: sums.entry() for name, sums in self._stats.items() if sums.count}
        write_text(self.root / "meta" / "stats.json", json.dumps(stats, indent=4))
        write_text(self.root / "meta" / "info.json", json.dumps(info, indent=4))

    def _described(self, feature: dict[str, Any]) -> dict[str, Any]:
        if feature["dtype"] != "video":
            return feature
        height, width, channels = feature["shape"]
        codec, pixels, _ = CODECS[self.codec]
        described = {"video.height": height, "video.width": width, "video.channels": channels, "has_audio": False}
        described |= {"video.codec": "av1" if "av1" in codec else "h264", "video.fps": self.fps}
        described |= {"video.pix_fmt": "gbrp" if pixels == "rgb24" else pixels, "video.is_depth_map": False}
        return feature | {"names": ["height", "width", "channels"], "info": described}


class EpisodeWriter:
    """One episode: `add` its frames, then `save` or `discard` it. Made by `DatasetWriter.begin`."""

    def __init__(self, writer: DatasetWriter):
        self._writer, self.tasks, self.sums = writer, list[str](), {name: _Sums() for name in writer.features}
        self.folder = Path(tempfile.mkdtemp(prefix=f".{writer.root.name}.", dir=writer.root.parent))
        cameras = [name for name, feature in writer.features.items() if feature["dtype"] == "video"]
        self.videos = {name: _VideoFile(self.folder / f"{i}.mp4", writer, name) for i, name in enumerate(cameras)}
        self.columns: dict[str, list[np.ndarray]] = {n: [] for n in writer.features if n not in self.videos}

    @property
    def length(self) -> int:
        """The number of frames so far."""
        return len(self.tasks)

    def add(self, frame: Mapping[str, Any], task: str) -> None:
        """Add a frame: a value of every feature, images uint8 [H, W, 3]. Raises ValueError, and adds nothing then."""
        features = self._writer.features
        check_text(task, "the task")
        different = sorted(frame.keys() ^ features.keys())
        if different:
            raise ValueError(f"a frame has {sorted(frame)}; expected {sorted(features)}: see {different}")
        values = {name: _value(name, frame[name], feature) for name, feature in features.items()}
        for name, value in values.items():
            if name in self.videos:
                self.videos[name].add(value)
                self.sums[name].add(value[::4, ::4].reshape(-1, 3) / 255)
            else:
                self.columns[name].append(value)
                self.sums[name].add(value[None].astype(np.float64))
        self.tasks.append(task)

    def save(self) -> int:
        """Write the episode; returns its number. Raises ValueError for one without frames."""
        if not self.length:
            raise ValueError("an episode has at least one frame")
        try:
            for video in self.videos.values():
                video.close()
            return self._writer._save(self)
        finally:
            self.discard()

    def discard(self) -> None:
        """Leave the episode out."""
        for video in self.videos.values():
            with contextlib.suppress(OSError, av.FFmpegError):
                video.close()
        shutil.rmtree(self.folder, ignore_errors=True)
        with self._writer._lock:
            self._writer._open.discard(self)


class _VideoFile:
    """A video that is being written, opened with its first frame."""

    def __init__(self, file: Path, writer: DatasetWriter, name: str):
        self.file, self._writer = file, writer
        self._height, self._width, _ = writer.features[name]["shape"]
        self._container: Any = None

    def add(self, image: np.ndarray) -> None:
        codec, pixels, options = CODECS[self._writer.codec]
        if self._container is None:
            self._container = av.open(str(self.file), "w", options={"movflags": "+faststart"})
            rate = Fraction(self._writer.fps).limit_denominator(100_000)
            self._stream = self._container.add_stream(codec, rate=rate, options=options | {"g": KEYFRAMES})
            self._stream.width, self._stream.height, self._stream.pix_fmt = self._width, self._height, pixels
            self._stream.codec_context.thread_count = 1
            open_encoder(self._stream)
        frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(image), format="rgb24")
        for packet in self._stream.encode(frame):
            self._container.mux(packet)

    def close(self) -> None:
        if self._container is not None:
            container, self._container = self._container, None
            for packet in self._stream.encode():
                container.mux(packet)
            container.close()


def open_encoder(stream: Any) -> None:
    """Open the encoder of a PyAV stream, with threads scheduled as they were.

    SVT-AV1, run by root, makes its threads and the one that opens it real-time ones of the highest priority, which
    leave other programs next to nothing.
    """
    if not os.path.isdir(TASKS):
        stream.codec_context.open()
        return
    policy, parameters, before = os.sched_getscheduler(0), os.sched_getparam(0), set(os.listdir(TASKS))
    stream.codec_context.open()
    for thread in {*os.listdir(TASKS)} - before | {str(threading.get_native_id())}:
        with contextlib.suppress(ProcessLookupError):  # it has ended since
            if os.sched_getscheduler(int(thread)) != policy:
                os.sched_setscheduler(int(thread), policy, parameters)


class _Sums:
    """Count, sums and extremes of rows, from which LeRobot's statistics are made."""

    def __init__(self) -> None:
        self.count = 0

    @classmethod
    def of(cls, entry: Mapping[str, Any]) -> _Sums:
        """Those that `entry` was made of."""
        sums = cls()
        fields = {key: np.asarray(entry[key], np.float64).reshape(-1) for key in ("mean", "std", "min", "max")}
        sums.count, sums.shape = int(entry["count"][0]), np.shape(entry["mean"])
        sums.total, sums.low, sums.high = sums.count * fields["mean"], fields["min"], fields["max"]
        sums.squares = sums.count * (fields["std"] ** 2 + fields["mean"] ** 2)
        return sums

    def add(self, rows: np.ndarray) -> None:
        """Rows [N, D]."""
        one = _Sums()
        one.count, one.total, one.squares = len(rows), rows.sum(0), np.square(rows).sum(0)
        one.low, one.high = rows.min(0), rows.max(0)
        one.shape = rows.shape[1:] if len(rows) == 1 else (rows.shape[1], 1, 1)  # images: channels first
        self.merge(one)

    def merge(self, other: _Sums) -> None:
        """Add those of other rows."""
        if not other.count:
            return
        if not self.count:
            vars(self).update(vars(other))
            return
        self.count += other.count
        self.total, self.squares = self.total + other.total, self.squares + other.squares
        self.low, self.high = np.minimum(self.low, other.low), np.maximum(self.high, other.high)

    def entry(self) -> dict[str, Any]:
        """As in LeRobot's `stats.json`."""
        mean = self.total / self.count
        std = np.sqrt(np.maximum(self.squares / self.count - mean**2, 0))
        values = {"min": self.low, "max": self.high, "mean": mean, "std": std}
        return {k: v.reshape(self.shape).tolist() for k, v in values.items()} | {"count": [self.count]}

    total: np.ndarray
    squares: np.ndarray
    low: np.ndarray
    high: np.ndarray
    shape: tuple[int, ...]


def _kind(feature: Mapping[str, Any] | None) -> Any:
    return None if feature is None else (feature["dtype"], list(feature["shape"]))


def _checked_features(features: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {}
    for name, feature in features.items():
        shape, dtype = feature.get("shape"), feature.get("dtype")
        sizes = list(shape) if isinstance(shape, list | tuple) else []
        if name in COUNTERS or "/" in name or not name or name.startswith("."):
            raise ValueError(f"a feature cannot have the name {name!r}")
        if not sizes or not all(type(size) is int and 0 < size <= 2**16 for size in sizes):
            raise ValueError(f"features[{name!r}]: shape is {shape!r}; expected a list of sizes")
        if dtype == "video":
            if len(sizes) != 3 or sizes[2] != 3:
                raise ValueError(f"features[{name!r}]: shape is {shape!r}; a video has [height, width, 3]")
        elif dtype not in DTYPES or len(sizes) != 1:
            raise ValueError(f"features[{name!r}] is {dtype!r} {shape!r}; expected a vector of {DTYPES}, or a video")
        found[name] = {"dtype": dtype, "shape": sizes, "names": feature.get("names")}
    if not found:
        raise ValueError("a dataset has at least one feature")
    return found


def _value(name: str, value: Any, feature: Mapping[str, Any]) -> np.ndarray:
    array = np.asarray(value)
    shape = tuple(feature["shape"])
    if array.shape != shape and not (shape == (1,) and array.shape == ()):
        raise ValueError(f"{name} is {list(array.shape)}; expected {list(shape)}")
    if feature["dtype"] == "video":
        if array.dtype != np.uint8:
            raise ValueError(f"{name} is {array.dtype}; an image is uint8")
        return array
    if array.dtype.kind not in "biuf":
        raise ValueError(f"{name} is {array.dtype}; expected numbers")
    array = array.astype(feature["dtype"]).reshape(shape)
    if not np.isfinite(array).all():
        raise ValueError(f"{name} has {array[~np.isfinite(array)][0]}; expected finite numbers")
    return array
