"""The LeRobot dataset format, v2.1 and v3.0, exact to the frame, without torch."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pi0.datasets.base import Contents, Dataset, is_camera
from pi0.datasets.errors import DataError
from pi0.datasets.lerobot_tables import LeRobotEpisode, read_episodes, read_info, read_parquet, read_texts
from pi0.datasets.video import EncodedImages, Video

COUNTERS = ("timestamp", "frame_index", "episode_index", "index", "task_index")
SUBTASKS = ("subtask_index", "subtask", "language_persistent")  # the first that a dataset has
MAX_OPEN_FILES = 64  # image files per dataset; beyond it the least recently used one is closed


class LeRobotDataset(Dataset):
    """A LeRobot dataset; see `Dataset` for options and attributes.

    Cameras are named in full, as `observation.images.<name>`. `tasks` and `subtasks` have one text per number;
    `decoded` counts the video frames decoded so far, those between a keyframe and the requested frame included.
    """

    subtasks: dict[int, str]
    decoded: int
    _files: dict[tuple[Any, ...], Any]
    _first_rows: dict[int, int]  # by episode: the row of its first frame in its file
    _rows: tuple[Path | None, pa.Table]  # the file read last

    @classmethod
    def contents(cls, root: Path) -> Contents:
        info = read_info(root)
        features = info["features"]
        videos = [name for name, f in features.items() if f["dtype"] == "video" and is_camera(f)]
        return Contents(info["fps"], features, read_episodes(root, info, videos))

    def prepare(self) -> None:
        info, total = read_info(self.root), sum(episode.length for episode in self.every_episode)
        self.tasks, self.subtasks = (read_texts(self.root, info, what) for what in ("task", "subtask"))
        if total != info["total_frames"]:
            problem = f"the episodes have {total} frames in all, total_frames is {info['total_frames']}"
            raise DataError(problem, self.root / "meta" / "info.json")
        self.decoded, self._files, self._first_rows, self._rows = 0, {}, {}, (None, pa.table({}))

    def image_source(self, camera: str, episode: LeRobotEpisode) -> tuple[Path, Any]:
        segment = episode.videos.get(camera)
        return (episode.file, episode.first_index) if segment is None else (segment.file, (segment.start, segment.end))

    def decode(self, camera: str, position: int, frame: int) -> np.ndarray:
        episode: LeRobotEpisode = self.episodes[position]
        segment, damaged = episode.videos.get(camera), None  # the frame; None while the whole file is
        try:
            if segment is None:
                images, damaged = self._open(EncodedImages, episode.file, camera), frame
                return images.frame(self._first_rows[episode.index] + frame)
            video = self._open(Video, segment.file, self.fps)
            video.check(segment.start, segment.end, episode.length)
            damaged, before = frame, video.decoded
            image = video.frame(segment.start + frame / self.fps)
            self.decoded += video.decoded - before
            return image
        except DataError as error:
            damaged = damaged if error.frame is None else error.frame
            raise DataError(error.problem, error.file, episode.index, damaged) from error

    def check_episode(self, episode: LeRobotEpisode, thorough: bool) -> Iterator[DataError]:
        """The problems of an episode's videos, without decoding; `thorough` reads their indices."""
        for camera in self.cameras:
            segment = episode.videos.get(camera)
            if segment is None:
                continue
            start, end = segment.start, segment.end
            if not segment.file.exists():
                yield DataError("the file is missing", segment.file, episode.index)
            elif math.isfinite(end - start) and abs((end - start) * self.fps - episode.length) >= 0.5:
                problem = f"{start} to {end} s does not hold its {episode.length} frames at {self.fps} per second"
                yield DataError(problem, segment.file, episode.index)  # its last would show the next episode
            elif thorough:
                try:
                    self._open(Video, segment.file, self.fps).check(start, end, episode.length)
                except DataError as error:
                    yield DataError(error.problem, error.file, episode.index, error.frame)

    def read_columns(self, episode: LeRobotEpisode) -> dict[str, Any]:
        """Raises DataError where counters, timestamps, lengths or task numbers are not as expected."""
        if self._rows[0] != episode.file:
            self._rows = None, self._rows[1]
            subtasks = [name for name in SUBTASKS if name in self.features]
            self._rows = episode.file, read_parquet(episode.file, [*self.states, *self.actions, *COUNTERS, *subtasks])
        table = self._rows[1]
        found = np.flatnonzero(table["episode_index"].to_numpy() == episode.index)
        if len(found) != episode.length:
            raise DataError(f"{len(found)} rows, the episode table says {episode.length}")
        if found[-1] - found[0] != episode.length - 1:
            raise DataError("its rows are not together")
        self._first_rows[episode.index] = int(found[0])
        rows, counted = table.slice(found[0], episode.length), np.arange(episode.length)
        columns = {name: rows[name].to_numpy() for name in COUNTERS}
        for name, first in (("frame_index", 0), ("index", episode.first_index)):
            for frame in np.flatnonzero(columns[name] != first + counted)[:1]:
                raise DataError(f"{name} is {columns[name][frame]}, expected {first + frame}", frame=int(frame))
        for frame in np.flatnonzero(~(np.abs(columns["timestamp"] * self.fps - counted) < 0.5))[:1]:
            expected = f"{frame / self.fps:.3f} s at {self.fps} frames per second"
            raise DataError(f"timestamp is {columns['timestamp'][frame]:.3f} s, expected {expected}", frame=int(frame))
        columns |= {name: self._vectors(rows[name], name) for name in {*self.states, *self.actions}}
        _check_texts(columns["task_index"], self.tasks, "task")
        texts = _subtask_texts(rows, self.subtasks)
        return columns if texts is None else columns | {"subtask": np.array(texts, object)}

    def _read(self, episodes: Sequence[Any], skip_damaged: bool) -> None:
        super()._read(episodes, skip_damaged)
        self._rows = None, pa.table({})  # worker processes get no copy

    def _vectors(self, column: pa.ChunkedArray, name: str) -> np.ndarray:
        """A column of vectors, or of numbers, as float32 [F, D]. Raises DataError."""
        size = math.prod(self.features[name]["shape"])
        values: Any = column
        if pa.types.is_nested(column.type):
            lengths = pc.list_value_length(column).to_numpy(zero_copy_only=False)
            for frame in np.flatnonzero(lengths != size)[:1]:
                raise DataError(f"{name} has length {lengths[frame]}, info.json says {size}", frame=int(frame))
            values = pc.list_flatten(column)
        return values.to_numpy(zero_copy_only=False).astype(np.float32).reshape(len(column), size)

    def _open(self, reader: Any, *arguments: Any) -> Any:
        """An image file, opened once per process: a forked process would share its parent's file position."""
        key = (os.getpid(), reader, *arguments)
        file = self._files.pop(key, None) or reader(*arguments)
        while len(self._files) >= (MAX_OPEN_FILES if reader is Video else 4):  # EncodedImages keep whole row groups
            self._files.pop(next(iter(self._files)))
        self._files[key] = file
        return file


def _check_texts(numbers: np.ndarray, texts: dict[int, str], what: str) -> None:
    for frame in np.flatnonzero(~np.isin(numbers, list(texts)))[:1]:
        problem = f"{what}_index is {numbers[frame]}, a {what} that meta/{what}s does not have; it has {sorted(texts)}"
        raise DataError(problem, frame=int(frame))


def _subtask_texts(rows: pa.Table, texts: dict[int, str]) -> list[str] | None:
    """Each frame's subtask, empty where it has none, or None for a dataset without any. Raises DataError.

    LeRobot 0.4 and 0.5 number them (-1: none); 0.6 lists texts with timestamps, of which the last before a frame holds.
    """
    if "subtask_index" in rows.column_names:
        numbers, texts = rows["subtask_index"].to_numpy(), {-1: ""} | texts
        _check_texts(numbers, texts, "subtask")
        return [texts[int(number)] for number in numbers]
    if "subtask" in rows.column_names:
        return [text or "" for text in rows["subtask"].to_pylist()]
    if "language_persistent" in rows.column_names:
        found = []
        for time, listed in zip(rows["timestamp"].to_pylist(), rows["language_persistent"].to_pylist(), strict=True):
            begun = [s for s in listed or () if s["style"] == "subtask" and s["timestamp"] <= time]
            found.append(max(begun, key=lambda s: s["timestamp"])["content"] or "" if begun else "")
        return found
    return None
