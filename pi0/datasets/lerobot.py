"""LeRobot video datasets, exact to the frame: NumPy out, no torch.

A dataset is a table of episodes, each of which says where its rows and its pictures lie. Only that table depends on
the dataset format's version; `LeRobotDataset` on top of it does not.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import av
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from av.video.reformatter import VideoReformatter

STATE, ACTION = "observation.state", "action"
VERSIONS = ("v3.0",)
MAX_OPEN_VIDEOS = 64  # per dataset; beyond it the one opened first is closed


class DatasetError(ValueError):
    """A dataset that is damaged or of an unknown kind; the message names the file, the episode and the frame."""


@dataclasses.dataclass(frozen=True)
class Clip:
    """Where one camera's pictures of an episode lie: from `start` seconds on in `file`."""

    file: Path
    start: float


@dataclasses.dataclass(frozen=True)
class Episode:
    """One episode: its number, frames, the file of its rows and their first `index`, and a clip for each camera."""

    index: int
    length: int
    data_file: Path
    first_index: int
    clips: dict[str, Clip]


class LeRobotDataset:
    """Random access by frame to the episodes of a LeRobot dataset, in the order chosen.

    `episodes` (default: all) and `cameras` (default: all video features, in full as `observation.images.<name>`)
    choose what is read; `action_horizon` T is the length of action chunks. Attributes: `fps`; `features`, as in
    `info.json`; `episodes`, the table of `Episode`; `cameras`; `tasks`, one text per task number.

    Raises DatasetError for damaged or missing files, NaN, and formats that are not supported.
    """

    def __init__(
        self,
        root: str | Path,
        *,
        action_horizon: int = 1,
        episodes: Sequence[int] | None = None,
        cameras: Sequence[str] | None = None,
    ):
        if action_horizon < 1:
            raise ValueError(f"action_horizon is {action_horizon}; a chunk has at least 1 action")
        self.root, self.action_horizon = Path(root), action_horizon
        info = _read_json(self.root / "meta" / "info.json")
        version = info.get("codebase_version")
        if version not in VERSIONS:
            raise DatasetError(f"{self.root}: dataset format {version}; supported are {', '.join(VERSIONS)}")
        self.fps: float = info["fps"]
        self.features: dict[str, Any] = info["features"]
        self.cameras = _choose(cameras, [k for k, f in self.features.items() if f["dtype"] == "video"], "camera")
        self.tasks = _tasks_v30(self.root)
        table = _episodes_v30(self.root, info, self.cameras)
        total = sum(episode.length for episode in table)
        if total != info["total_frames"]:
            raise DatasetError(f"{self.root}: the episodes have {total} frames, meta/info.json {info['total_frames']}")
        numbers = _choose(episodes, [episode.index for episode in table], "episode")
        by_number = {episode.index: episode for episode in table}
        self.episodes = [by_number[number] for number in numbers]
        self._rows = self._read_rows()
        lengths = [episode.length for episode in self.episodes]
        self._starts = np.concatenate([[0], np.cumsum(lengths)]).astype(int)
        self._videos: dict[tuple[int, Path], Video] = {}

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getitem__(self, i: int) -> dict[str, Any]:
        """Frame i of the chosen episodes, in LeRobot's feature names.

        `observation.images.<camera>` uint8 [H, W, 3]; `observation.state` float32 [S]; `action` float32 [T, A], which
        repeats the last action past the episode's end, where `action_is_pad` bool [T] is true; `task` str;
        `timestamp` in seconds; `index`, `episode_index` and `frame_index`. Raises IndexError beyond the frames.
        """
        if not 0 <= i < len(self):
            raise IndexError(f"frame {i} is not within 0 to {len(self) - 1}")
        position = int(np.searchsorted(self._starts, i, side="right")) - 1
        episode, frame = self.episodes[position], i - int(self._starts[position])
        return self._numbers(position, frame) | {c: self._picture(c, episode, frame) for c in self.cameras}

    def table(self, column: str) -> np.ndarray:
        """A column of numbers of all frames, [F, ...], without decoding any video."""
        if column not in self._rows:
            raise KeyError(f"no column {column!r}; there are {sorted(self._rows)}")
        return self._rows[column]

    def _numbers(self, position: int, frame: int) -> dict[str, Any]:
        start, end = self._starts[position : position + 2]
        row = start + frame
        chunk = row + np.arange(self.action_horizon)
        return {
            STATE: self._rows[STATE][row],
            ACTION: self._rows[ACTION][np.minimum(chunk, end - 1)],
            "action_is_pad": chunk >= end,
            "task": self.tasks[int(self._rows["task_index"][row])],
            "timestamp": float(self._rows["timestamp"][row]),
            **{name: int(self._rows[name][row]) for name in ("index", "episode_index", "frame_index")},
        }

    def _picture(self, camera: str, episode: Episode, frame: int) -> np.ndarray:
        clip = episode.clips[camera]
        key = (os.getpid(), clip.file)  # a forked process opens its own: it would share the parent's file position
        if key not in self._videos:
            while len(self._videos) >= MAX_OPEN_VIDEOS:
                self._videos.pop(next(iter(self._videos)))
            self._videos[key] = Video(clip.file, self.fps)
        try:
            return self._videos[key].frame(clip.start + frame / self.fps)
        except DatasetError as error:
            raise DatasetError(f"episode {episode.index}, frame {frame}: {error}") from error

    def _read_rows(self) -> dict[str, np.ndarray]:
        files: dict[Path, pa.Table] = {}
        parts: list[dict[str, np.ndarray]] = []
        for episode in self.episodes:
            if episode.data_file not in files:
                files = {episode.data_file: _read_parquet(episode.data_file)}
            parts.append(_episode_rows(files[episode.data_file], episode))
        return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


class Video:
    """A video file read by time. Sequential reads go on decoding; others seek to a keyframe and decode forward.

    The file is opened when first read, so a `Video` can be pickled and sent to another process.
    """

    def __init__(self, file: Path, fps: float):
        self.file, self.fps = file, fps
        self._container: Any = None
        self._frames: Any = None
        self._converter = VideoReformatter()  # kept: one per picture costs more than decoding it
        self._next_time = -np.inf  # the time that the decoder has come to

    def __reduce__(self) -> tuple[Any, ...]:
        return Video, (self.file, self.fps)

    def frame(self, time: float) -> np.ndarray:
        """The picture at `time` seconds, uint8 [H, W, 3]: the one within half a frame period of it.

        Stored times are rounded to the file's time base, and the time asked for is a sum of floats, so neither is
        exact; half a period still tells every frame from its neighbours. Raises DatasetError where there is none.
        """
        half = 0.5 / self.fps
        try:
            if not self._next_time - half <= time < self._next_time + 1.0:
                self._seek(time)
            for frame in self._frames:
                self._next_time = frame.time + 1 / self.fps
                if frame.time > time - half:
                    break
            else:
                raise DatasetError(f"{self.file} ends before {time:.3f} s (frame {time * self.fps:.0f})")
        except (OSError, av.FFmpegError) as error:
            raise DatasetError(f"{self.file} cannot be decoded at {time:.3f} s: {error}") from error
        if frame.time >= time + half:
            raise DatasetError(f"{self.file} has no frame at {time:.3f} s; the nearest is at {frame.time:.3f} s")
        return self._converter.reformat(frame, format="rgb24").to_ndarray()

    def _seek(self, time: float) -> None:
        """Go to the keyframe at or before `time`."""
        if self._container is None:
            self._container = av.open(str(self.file))
            # One thread: a forked process has none of the parent's threads, and would wait for them for ever.
            self._container.streams.video[0].codec_context.thread_count = 1
        stream = self._container.streams.video[0]
        target = max(time - 0.5 / self.fps, 0.0)  # so that a keyframe at `time` itself is not missed by rounding
        self._container.seek(int(target / stream.time_base), stream=stream, backward=True)
        self._frames = self._container.decode(stream)


def _episode_rows(rows: pa.Table, episode: Episode) -> dict[str, np.ndarray]:
    """The columns of one episode, checked. Raises DatasetError."""
    where = f"{episode.data_file}, episode {episode.index}"
    mine = rows.filter(pa.compute.equal(rows["episode_index"], episode.index))
    if len(mine) != episode.length:
        raise DatasetError(f"{where}: {len(mine)} rows, the episode table says {episode.length}")
    columns = {name: _column(mine, name, where) for name in (STATE, ACTION)}
    for name in ("timestamp", "frame_index", "episode_index", "index", "task_index"):
        columns[name] = mine[name].to_numpy()
    for name, first in (("frame_index", 0), ("index", episode.first_index)):
        wrong = np.flatnonzero(columns[name] != first + np.arange(episode.length))
        if len(wrong):
            found = columns[name][wrong[0]]
            raise DatasetError(f"{where}, frame {wrong[0]}: {name} is {found}, expected {first + wrong[0]}")
    return columns


def _column(rows: pa.Table, name: str, where: str) -> np.ndarray:
    """A column of vectors as float32 [F, D]."""
    if name not in rows.column_names:
        raise DatasetError(f"{where}: no column {name}; there are {rows.column_names}")
    values = np.stack(rows[name].to_numpy()).astype(np.float32)
    bad = np.argwhere(~np.isfinite(values))
    if len(bad):
        frame, dim = bad[0]
        raise DatasetError(f"{where}, frame {frame}: {name}[{dim}] is {values[frame, dim]}")
    return values


def _episodes_v30(root: Path, info: dict[str, Any], cameras: Sequence[str]) -> list[Episode]:
    """The episode table of format v3.0, where several episodes share a file."""
    files = sorted((root / "meta" / "episodes").glob("*/*.parquet"))
    if not files:
        raise DatasetError(f"{root}: no meta/episodes/*/*.parquet")
    episodes = []
    for row in pa.concat_tables([_read_parquet(f) for f in files], promote_options="default").to_pylist():

        def place(template: str, prefix: str, **names: str) -> Path:
            chunk, file = row[f"{prefix}/chunk_index"], row[f"{prefix}/file_index"]  # noqa: B023
            return root / template.format(chunk_index=chunk, file_index=file, **names)

        clips = {
            camera: Clip(
                place(info["video_path"], f"videos/{camera}", video_key=camera), row[f"videos/{camera}/from_timestamp"]
            )
            for camera in cameras
        }
        for camera in cameras:
            start, end = (row[f"videos/{camera}/{side}_timestamp"] for side in ("from", "to"))
            if abs((end - start) * info["fps"] - row["length"]) >= 0.5:  # else its last frames show the next episode
                raise DatasetError(
                    f"{clips[camera].file}, episode {row['episode_index']}: {start} to {end} s does not hold its "
                    f"{row['length']} frames at {info['fps']} per second"
                )
        missing = [str(clip.file) for clip in clips.values() if not clip.file.exists()]
        if missing:
            raise DatasetError(f"{root}: episode {row['episode_index']} needs the missing file {missing[0]}")
        data_file = place(info["data_path"], "data")
        episodes.append(Episode(row["episode_index"], row["length"], data_file, row["dataset_from_index"], clips))
    return sorted(episodes, key=lambda episode: episode.index)


def _tasks_v30(root: Path) -> dict[int, str]:
    rows = _read_parquet(root / "meta" / "tasks.parquet").to_pydict()
    texts = next(rows[name] for name in ("task", "__index_level_0__") if name in rows)
    return dict(zip(rows["task_index"], texts, strict=True))


def _read_json(file: Path) -> dict[str, Any]:
    if not file.exists():
        raise DatasetError(f"{file.parent.parent} is not a LeRobot dataset: it has no {file.parent.name}/{file.name}")
    try:
        return json.loads(file.read_text())
    except ValueError as error:
        raise DatasetError(f"{file} is not JSON: {error}") from error


def _read_parquet(file: Path) -> pa.Table:
    if not file.exists():
        raise DatasetError(f"the file {file} is missing")
    try:
        return pq.read_table(file)
    except (OSError, pa.ArrowInvalid) as error:
        raise DatasetError(f"{file} cannot be read: {error}") from error


def _choose(chosen: Sequence[Any] | None, known: list[Any], what: str) -> list[Any]:
    """`chosen`, or all that are known. Raises DatasetError for unknown or repeated ones."""
    if chosen is None:
        return known
    unknown = [c for c in chosen if c not in known]
    if unknown or len(set(chosen)) != len(chosen) or (not chosen and what == "episode"):
        problem = f"no {what} {unknown}" if unknown else f"{what}s {list(chosen)} are none or repeat"
        raise DatasetError(f"{problem}; there are {known}")
    return list(chosen)
