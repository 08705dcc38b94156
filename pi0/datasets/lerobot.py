"""The LeRobot dataset format, v2.1 and v3.0, exact to the frame, without torch."""

from __future__ import annotations

import functools
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
from pi0.datasets.frames import OpenFiles
from pi0.datasets.lerobot_tables import (
    LeRobotEpisode,
    VideoSegment,
    read_episodes,
    read_info,
    read_parquet,
    read_texts,
    texts_of,
    vector_size,
)
from pi0.datasets.video import MAX_GROUP, EncodedImages, Video

COUNTERS = ("timestamp", "frame_index", "episode_index", "index", "task_index")
SUBTASKS = ("subtask_index", "subtask", "language_persistent")  # the first that a dataset has
MAX_OPEN_FILES = 64  # image files per dataset and thread; beyond it the least recently used one is closed


class LeRobotDataset(Dataset):
    """A LeRobot dataset; see `Dataset` for options and attributes.

    Cameras are named in full, as `observation.images.<name>`. `tasks` and `subtasks` have one text per number;
    `decoded` counts the video frames decoded so far, those between a keyframe and the requested frame included.
    `max_bytes` limits the images in a row group of a file, which is read as a whole: a subclass may raise it.
    """

    max_bytes = MAX_GROUP
    subtasks: dict[int, str]
    decoded: int
    _files: OpenFiles
    _sizes: dict[str, int]  # of states and actions, as info.json says
    _total: int
    _first_rows: dict[int, int]  # by episode: the row of its first frame in its file
    _rows: tuple[Path | None, pa.Table]  # the file read last

    @classmethod
    def contents(cls, root: Path) -> Contents:
        info = read_info(root)
        features = info["features"]
        videos = [name for name, f in features.items() if f["dtype"] == "video" and is_camera(f)]
        return Contents(info["fps"], features, read_episodes(root, info, videos))

    def prepare(self) -> None:
        info = read_info(self.root)
        if self._index is not None:
            total = int(self._index.first_rows[-1])
        else:
            total = sum(episode.length for episode in self.every_episode)
        self.tasks, self.subtasks = (read_texts(self.root, info, what) for what in ("task", "subtask"))
        if total != info["total_frames"]:
            problem = f"the episodes have {total} frames in all, total_frames is {info['total_frames']}"
            raise DataError(problem, self.root / "meta" / "info.json")
        self._sizes = {name: vector_size(info, name, self.root) for name in (*self.states, *self.actions)}
        self._total, self.decoded, self._files = total, 0, OpenFiles()
        self._first_rows, self._rows = {}, (None, pa.table({}))

    def image_source(self, camera: str, episode: LeRobotEpisode) -> tuple[Path, Any]:
        segment = episode.videos.get(camera)
        if isinstance(segment, DataError):
            return episode.file, str(segment.problem)
        return (episode.file, episode.first_index) if segment is None else (segment.file, (segment.start, segment.end))

    def decode(self, camera: str, position: int, frame: int) -> np.ndarray:
        episode: LeRobotEpisode = self.episodes[position]
        damaged = None  # the frame; None while the whole file is
        try:
            segment = episode.segment(camera)
            if segment is None:
                images, damaged = (
                    self._open(EncodedImages, episode.file, camera, self.max_pixels, self.max_bytes),
                    frame,
                )
                return images.frame(self._first_row(episode) + frame)
            video = self._open(Video, segment.file, self.fps, self.max_pixels)
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
            if isinstance(segment, DataError):
                yield segment
                continue
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
                    self._open(Video, segment.file, self.fps, self.max_pixels).check(start, end, episode.length)
                except DataError as error:
                    yield DataError(error.problem, error.file, episode.index, error.frame)

    def read_columns(self, episode: LeRobotEpisode) -> dict[str, Any]:
        """Raises DataError where counters, timestamps, lengths or task numbers are not as expected."""
        if self._rows[0] != episode.file:
            self._rows = None, self._rows[1]
            subtasks = [name for name in SUBTASKS if name in self.features]
            read = [*self.states, *self.actions, *COUNTERS, *subtasks]
            self._rows = episode.file, read_parquet(episode.file, read, max_rows=self._total)
        table = self._rows[1]
        found = np.flatnonzero(_flat(table["episode_index"], "episode_index") == episode.index)
        if len(found) != episode.length:
            raise DataError(f"{len(found)} rows, the episode table says {episode.length}")
        if found[-1] - found[0] != episode.length - 1:
            raise DataError("its rows are not together")
        rows, counted = table.slice(found[0], episode.length), np.arange(episode.length)
        columns: dict[str, Any] = {name: _flat(rows[name], name) for name in COUNTERS}
        for name, first in (("frame_index", 0), ("index", episode.first_index)):
            for frame in np.flatnonzero(columns[name] != first + counted)[:1]:
                raise DataError(f"{name} is {columns[name][frame]}, expected {first + frame}", frame=int(frame))
        for frame in np.flatnonzero(~(np.abs(columns["timestamp"] * self.fps - counted) < 0.5))[:1]:
            expected = f"{frame / self.fps:.3f} s at {self.fps} frames per second"
            raise DataError(f"timestamp is {columns['timestamp'][frame]:.3f} s, expected {expected}", frame=int(frame))
        for name, size in self._sizes.items():
            columns[name] = _flat(rows[name], name, size).astype(np.float32).reshape(episode.length, size)
        _check_texts(columns["task_index"], self.tasks, "task")
        texts = _subtask_texts(rows, self.subtasks, columns["timestamp"])
        return columns if texts is None else columns | {"subtask": np.array(texts, object)}

    def read_many(self, episodes: Sequence[LeRobotEpisode]) -> dict[str, np.ndarray] | None:
        """The columns [F, ...]; None where anything is not as expected: reading one by one says what."""
        subtasks = [name for name in SUBTASKS if name in self.features]
        try:
            read = [*self.states, *self.actions, *COUNTERS, *subtasks]
            rows = read_parquet(episodes[0].file, read, max_rows=self._total)
            columns: dict[str, Any] = {name: _flat(rows[name], name) for name in COUNTERS}
            lengths = np.array([episode.length for episode in episodes])
            if lengths.sum() != len(rows) or lengths.max() > len(rows):  # before anything of that length is made
                return None
            counted = np.arange(lengths.sum()) - np.repeat(np.cumsum(lengths) - lengths, lengths)
            first = np.repeat([episode.first_index for episode in episodes], lengths)
            numbers = np.repeat([episode.index for episode in episodes], lengths)
            right = {"episode_index": numbers, "frame_index": counted, "index": first + counted}
            if not all(np.array_equal(columns[name], expected) for name, expected in right.items()):
                return None
            if not (np.abs(columns["timestamp"] * self.fps - counted) < 0.5).all():
                return None
            for name, size in self._sizes.items():
                columns[name] = _flat(rows[name], name, size).astype(np.float32).reshape(len(counted), size)
                if not np.isfinite(columns[name]).all():
                    return None
            _check_texts(columns["task_index"], self.tasks, "task")
            texts = _subtask_texts(rows, self.subtasks, columns["timestamp"])
        except DataError:
            return None
        return columns if texts is None else columns | {"subtask": np.array(texts, object)}

    @classmethod
    def pack_episode(cls, episode: LeRobotEpisode, root: Path) -> dict[str, Any]:
        videos = {
            video: segment.problem
            if isinstance(segment, DataError)
            else [_name(segment.file, root), segment.start, segment.end]
            for video, segment in episode.videos.items()
        }
        return {
            "episode": [episode.index, episode.length, _name(episode.file, root), episode.first_index],
            "videos": videos,
        }

    @classmethod
    def unpack_episode(cls, values: dict[str, Any], root: Path) -> LeRobotEpisode:
        number, length, file, first = values["episode"]
        videos: dict[str, Any] = {
            video: DataError(found, episode=number)
            if isinstance(found, str)
            else VideoSegment(root / found[0], *found[1:])
            for video, found in values["videos"].items()
        }
        return LeRobotEpisode(number, length, root / file, first, videos)

    def _first_row(self, episode: LeRobotEpisode) -> int:
        """The row of an episode's first frame in its file."""
        if episode.index not in self._first_rows:
            numbers = _flat(read_parquet(episode.file, ["episode_index"])["episode_index"], "episode_index")
            found, rows = np.unique(numbers, return_index=True)
            self._first_rows |= dict(zip(found.tolist(), rows.tolist(), strict=True))
        return self._first_rows[episode.index]

    def _read(self, episodes: Sequence[Any], skip_damaged: bool) -> None:
        super()._read(episodes, skip_damaged)
        self._rows = None, pa.table({})  # worker processes get no copy

    def _open(self, reader: Any, *arguments: Any) -> Any:
        """An image file, opened once per thread and process: a fork would share its parent's file position."""
        key, files = (os.getpid(), reader, *arguments), self._files.by_key
        file = files.pop(key, None) or reader(*arguments)
        while len(files) >= (MAX_OPEN_FILES if reader is Video else 4):  # EncodedImages keep whole row groups
            files.pop(next(iter(files)))
        files[key] = file
        return file


@functools.lru_cache(2**10)  # many episodes share a file
def _name(file: Path, root: Path) -> str:
    return file.relative_to(root).as_posix()


def _flat(column: pa.ChunkedArray, name: str, size: int = 1) -> np.ndarray:
    """The numbers of a column, `size` in each row, as lists or plain: [F * size]. Raises DataError."""
    values: Any = column
    if any(is_type(column.type) for is_type in (pa.types.is_list, pa.types.is_large_list, pa.types.is_fixed_size_list)):
        lengths = pc.list_value_length(column).to_numpy(zero_copy_only=False)
        for frame in np.flatnonzero(lengths != size)[:1]:
            raise DataError(f"{name} has length {lengths[frame]}, info.json says {size}", frame=int(frame))
        values = pc.list_flatten(column)
    elif size != 1:
        raise DataError(f"{name} is {column.type}; info.json says {size} numbers in each row")
    if not (pa.types.is_integer(values.type) or pa.types.is_floating(values.type) or pa.types.is_boolean(values.type)):
        raise DataError(f"{name} is {column.type}; expected {size} numbers in each row")
    return values.to_numpy(zero_copy_only=False)


def _check_texts(numbers: np.ndarray, texts: dict[int, str], what: str) -> None:
    for frame in np.flatnonzero(~np.isin(numbers, list(texts)))[:1]:
        problem = f"{what}_index is {numbers[frame]}, a {what} that meta/{what}s does not have; it has {sorted(texts)}"
        raise DataError(problem, frame=int(frame))


def _subtask_texts(rows: pa.Table, texts: dict[int, str], times: np.ndarray) -> list[str] | None:
    """Each frame's subtask, empty where it has none, or None for a dataset without any. Raises DataError.

    LeRobot 0.4 and 0.5 number them (-1: none); 0.6 lists texts with timestamps, of which the last before a frame holds.
    """
    if "subtask_index" in rows.column_names:
        numbers, texts = _flat(rows["subtask_index"], "subtask_index"), {-1: ""} | texts
        _check_texts(numbers, texts, "subtask")
        return [texts[int(number)] for number in numbers]
    try:
        if "subtask" in rows.column_names:
            found = [text or "" for text in texts_of(rows["subtask"])]
        elif "language_persistent" in rows.column_names:
            found = []
            for time, listed in zip(times, rows["language_persistent"].to_pylist(), strict=True):
                begun = [s for s in listed or () if s["style"] == "subtask" and s["timestamp"] <= time]
                found.append(max(begun, key=lambda s: s["timestamp"])["content"] or "" if begun else "")
        else:
            return None
    except (AttributeError, KeyError, TypeError, ValueError, pa.ArrowException) as error:
        raise DataError(f"its subtasks are not as LeRobot writes them: {error!r}") from error
    for frame in (i for i, text in enumerate(found) if not isinstance(text, str)):
        raise DataError(f"its subtask is {found[frame]!r:.80}; expected text", frame=frame)
    return found
