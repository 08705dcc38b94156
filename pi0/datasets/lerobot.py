"""LeRobot datasets, exact to the frame: NumPy out, no torch.

A dataset is a table of episodes, each of which says where its rows and its pictures lie. Only that table depends on
the dataset format's version; `LeRobotDataset` on top of it does not.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pi0.datasets.cache import MEMORY, FrameCache, FrameMemory, open_cache
from pi0.datasets.errors import DataError
from pi0.datasets.video import StoredImages, Video
from pi0.fetch import fetch
from pi0.robots.transforms import resize_with_pad

if TYPE_CHECKING:
    from pi0.robots import Robot

STATE, ACTION = "observation.state", "action"
COUNTERS = ("timestamp", "frame_index", "episode_index", "index", "task_index")
SUBTASKS = ("subtask_index", "subtask", "language_persistent")  # the first that a dataset has
MAX_OPEN_FILES = 64  # of pictures, per dataset; beyond it the one used longest ago is closed


@dataclasses.dataclass(frozen=True)
class Clip:
    """Where one camera's pictures of an episode lie: from `start` to `end` seconds in `file` (infinity: its end)."""

    file: Path
    start: float
    end: float


@dataclasses.dataclass(frozen=True)
class Episode:
    """One episode: its number, frames, the file of its rows and their first `index`, and a clip for each video."""

    index: int
    length: int
    data_file: Path
    first_index: int
    clips: dict[str, Clip]


class LeRobotDataset:
    """Random access by frame to the episodes of a LeRobot dataset (v2.1 or v3.0), in the order chosen.

    `root` is a folder or an address that `pi0.fetch` knows, such as `hf://datasets/lerobot/pusht`. What is read:
    `episodes` (default: all), `cameras` (default: all features of colour video or images, in full as
    `observation.images.<name>`), and the columns of `states` and `actions`, the latter in chunks of `action_horizon` T.
    `image_size` (height, width) resizes pictures as `resize_with_pad` does. `cache` is a folder that `pi0-cache` filled
    for that size, or "memory": then each picture is decoded only once, and kept.

    With `skip_damaged`, episodes whose files or numbers are damaged are left out and listed in `skipped`; finding
    pictures that are there but cannot be decoded takes `pi0-check-data`.

    Attributes: `fps`; `features`, as in `info.json`; `episodes`, the table of `Episode` of those chosen, and
    `every_episode`; `starts`, the frame where each begins, and the end; `cameras`; `tasks` and `subtasks`, one text per
    number; `skipped`, a DataError for each problem; `decoded`, how many video frames were decoded so far, those on the
    way from keyframes included. Raises DataError for damaged or missing files, NaN, and formats not supported.
    """

    def __init__(
        self,
        root: str | Path,
        *,
        action_horizon: int = 1,
        episodes: Sequence[int] | None = None,
        cameras: Sequence[str] | None = None,
        states: Sequence[str] = (STATE,),
        actions: Sequence[str] = (ACTION,),
        image_size: tuple[int, int] | None = None,
        cache: str | Path | None = None,
        skip_damaged: bool = False,
    ):
        if action_horizon < 1:
            raise ValueError(f"action_horizon is {action_horizon}; a chunk has at least 1 action")
        self.root, self.action_horizon, self.image_size = fetch(root), action_horizon, image_size
        self._states, self._actions = tuple(states), tuple(actions)
        info = _read_info(self.root)
        self.fps: float = info["fps"]
        self.features: dict[str, Any] = info["features"]
        _choose([*self._states, *self._actions], list(self.features), "column")
        known = [name for name, feature in self.features.items() if _is_camera(feature)]
        self.cameras = _choose(cameras, known, "camera")
        videos = [name for name in known if self.features[name]["dtype"] == "video"]
        read_table, read_tasks = VERSIONS[info["codebase_version"]]
        self.every_episode = list(read_table(self.root, info, videos))
        self.tasks, self.subtasks = read_tasks(self.root, "task"), read_tasks(self.root, "subtask")
        by_number = {episode.index: episode for episode in self.every_episode}
        if len(by_number) != len(self.every_episode) or any(episode.length < 1 for episode in self.every_episode):
            raise DataError(
                "the table of episodes has a number twice, or an episode without frames", self.root / "meta"
            )
        total = sum(episode.length for episode in self.every_episode)
        if total != info["total_frames"]:
            problem = f"the episodes have {total} frames in all, total_frames is {info['total_frames']}"
            raise DataError(problem, self.root / "meta" / "info.json")
        numbers = _choose(episodes, list(by_number), "episode")
        self._files: dict[tuple[Any, ...], Any] = {}
        self.skipped: list[DataError] = []
        self.decoded = 0
        self._load([by_number[number] for number in numbers], skip_damaged)
        self._cached: Mapping[str, FrameCache | FrameMemory] = {}
        if cache == MEMORY:
            self._cached = {camera: FrameMemory() for camera in self.cameras}
        elif cache is not None and image_size is None:
            raise ValueError("a cache of pictures needs image_size, the size that it was filled for")
        elif cache is not None:
            self._cached = open_cache(self, Path(cache))

    def __len__(self) -> int:
        return int(self.starts[-1])

    def __getitem__(self, i: int) -> dict[str, Any]:
        """Frame i of the chosen episodes, in the dataset's feature names.

        `observation.images.<camera>` uint8 [H, W, 3], read-only where it comes from a cache; `observation.state`
        float32 [S]; `action` float32 [T, A], which repeats the last action past the episode's end, where
        `action_is_pad` bool [T] is true; `task` str; `subtask` str where the dataset has subtasks, empty for frames
        without one; `timestamp` in seconds; `index`, `episode_index` and `frame_index`. Raises IndexError beyond the
        frames, and DataError for a damaged one.
        """
        if not 0 <= i < len(self):
            raise IndexError(f"frame {i} is not within 0 to {len(self) - 1}")
        position = int(np.searchsorted(self.starts, i, side="right")) - 1
        frame = int(i) - int(self.starts[position])
        return self._numbers(position, frame) | {c: self.picture(c, position, frame) for c in self.cameras}

    def table(self, column: str) -> np.ndarray:
        """A column of numbers of all frames, [F, ...], without decoding any picture."""
        if column not in self._rows:
            raise KeyError(f"no column {column!r}; there are {sorted(self._rows)}")
        return self._rows[column]

    def picture(self, camera: str, position: int, frame: int) -> np.ndarray:
        """The picture [H, W, 3] of a frame of the episode `self.episodes[position]`. Raises DataError."""
        episode, cached = self.episodes[position], self._cached.get(camera)
        picture = None if cached is None else cached.read(episode.index, frame)
        if picture is None:
            picture = self._decode(camera, position, frame)
            if self.image_size is not None:
                picture = resize_with_pad(picture, *self.image_size)
            if cached is not None:
                cached.store(episode.index, frame, picture)
        return picture

    def _numbers(self, position: int, frame: int) -> dict[str, Any]:
        start, end = self.starts[position : position + 2]
        row = start + frame
        chunk = row + np.arange(self.action_horizon)
        inside = np.minimum(chunk, end - 1)
        item = {name: self._rows[name][row] for name in self._states}
        item |= {name: self._rows[name][inside] for name in self._actions}
        item |= {"action_is_pad": chunk >= end, "task": self.tasks[int(self._rows["task_index"][row])]}
        if "subtask" in self._rows:
            item["subtask"] = str(self._rows["subtask"][row])
        item["timestamp"] = float(self._rows["timestamp"][row])
        return item | {name: int(self._rows[name][row]) for name in ("index", "episode_index", "frame_index")}

    def _decode(self, camera: str, position: int, frame: int) -> np.ndarray:
        episode, clip = self.episodes[position], self.episodes[position].clips.get(camera)
        damaged = None  # which frame: none yet, as long as it is the whole file
        try:
            if clip is None:
                images, damaged = self._open(StoredImages, episode.data_file, camera), frame
                return images.frame(self._first_rows[position] + frame)
            video = self._open(Video, clip.file, self.fps)
            video.check(clip.start, clip.end, episode.length)
            damaged, before = frame, video.decoded
            picture = video.frame(clip.start + frame / self.fps)
            self.decoded += video.decoded - before
            return picture
        except DataError as error:
            damaged = damaged if error.frame is None else error.frame
            raise DataError(error.problem, error.file, episode.index, damaged) from error

    def _open(self, kind: Any, *arguments: Any) -> Any:
        """A file of pictures, opened once per process: a forked one would share its parent's place in the file."""
        key = (os.getpid(), kind, *arguments)
        file = self._files.pop(key, None) or kind(*arguments)
        while len(self._files) >= (MAX_OPEN_FILES if kind is Video else 4):  # images hold whole groups of rows
            self._files.pop(next(iter(self._files)))
        self._files[key] = file
        return file

    def _load(self, episodes: list[Episode], skip_damaged: bool) -> None:
        """Read the rows of episodes, and keep those that are whole."""
        self.episodes: list[Episode] = []
        self._first_rows: list[int] = []
        parts: list[dict[str, np.ndarray]] = []
        file, rows = None, pa.table({})
        for episode in episodes:
            problems: list[DataError] = []
            try:
                if episode.data_file != file:
                    file, rows = None, self._read_rows(episode.data_file)
                    file = episode.data_file
                first, part = self._episode_rows(rows, episode)
            except DataError as error:
                problems.append(DataError(error.problem, episode.data_file, episode.index, error.frame))
            problems += self._clip_problems(episode, thorough=skip_damaged)
            if problems and not skip_damaged:
                raise problems[0]
            self.skipped += problems
            if not problems:
                self.episodes.append(episode)
                self._first_rows.append(first)
                parts.append(part)
        self.starts = np.cumsum([0] + [episode.length for episode in self.episodes])
        self._rows = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]} if parts else {}

    def _clip_problems(self, episode: Episode, thorough: bool) -> Iterator[DataError]:
        """What is wrong with an episode's clips without decoding; `thorough` opens the videos."""
        for camera in self.cameras:
            clip = episode.clips.get(camera)
            if clip is None:
                continue
            duration = clip.end - clip.start
            if not clip.file.exists():
                yield DataError("the file is missing", clip.file, episode.index)
            elif math.isfinite(duration) and abs(duration * self.fps - episode.length) >= 0.5:
                problem = (
                    f"{clip.start} to {clip.end} s does not hold its {episode.length} frames at {self.fps} per second"
                )
                yield DataError(problem, clip.file, episode.index)  # its last would show the next episode
            elif thorough:
                try:
                    self._open(Video, clip.file, self.fps).check(clip.start, clip.end, episode.length)
                except DataError as error:
                    yield DataError(error.problem, error.file, episode.index, error.frame)

    def _read_rows(self, file: Path) -> pa.Table:
        """The columns of a data file that are read, without pictures."""
        subtasks = [name for name in SUBTASKS if name in self.features]
        return _read_parquet(file, [*self._states, *self._actions, *COUNTERS, *subtasks])

    def _episode_rows(self, rows: pa.Table, episode: Episode) -> tuple[int, dict[str, np.ndarray]]:
        """The file's row where an episode starts, and its columns, checked. Raises DataError without the place."""
        found = np.flatnonzero(rows["episode_index"].to_numpy() == episode.index)
        if len(found) != episode.length:
            raise DataError(f"{len(found)} rows, the episode table says {episode.length}")
        if found[-1] - found[0] != episode.length - 1:
            raise DataError("its rows are not together")
        mine, counted = rows.slice(found[0], episode.length), np.arange(episode.length)
        columns = {name: mine[name].to_numpy() for name in COUNTERS}
        for name, first in (("frame_index", 0), ("index", episode.first_index)):
            for frame in np.flatnonzero(columns[name] != first + counted)[:1]:
                raise DataError(f"{name} is {columns[name][frame]}, expected {first + frame}", frame=int(frame))
        for frame in np.flatnonzero(~(np.abs(columns["timestamp"] * self.fps - counted) < 0.5))[:1]:
            expected = f"{frame / self.fps:.3f} s at {self.fps} frames per second"
            raise DataError(f"timestamp is {columns['timestamp'][frame]:.3f} s, expected {expected}", frame=int(frame))
        columns |= {name: self._vectors(mine[name], name) for name in {*self._states, *self._actions}}
        _check_texts(columns["task_index"], self.tasks, "task")
        texts = _subtask_texts(mine, self.subtasks)
        return int(found[0]), columns if texts is None else columns | {"subtask": np.array(texts, object)}

    def _vectors(self, column: pa.ChunkedArray, name: str) -> np.ndarray:
        """A column of vectors, or of numbers, as float32 [F, D]. Raises DataError."""
        size = math.prod(self.features[name]["shape"])
        values: Any = column
        if pa.types.is_nested(column.type):
            lengths = pc.list_value_length(column).to_numpy(zero_copy_only=False)
            for frame in np.flatnonzero(lengths != size)[:1]:
                raise DataError(f"{name} has length {lengths[frame]}, info.json says {size}", frame=int(frame))
            values = pc.list_flatten(column)
        array = values.to_numpy(zero_copy_only=False).astype(np.float32).reshape(len(column), size)
        for frame, dim in np.argwhere(~np.isfinite(array))[:1]:
            raise DataError(f"{name}[{dim}] is {array[frame, dim]}", frame=int(frame))
        return array


def open_dataset(root: str | Path, robot: Robot, **options: Any) -> LeRobotDataset:
    """A LeRobotDataset of a robot's recordings: its cameras, and the columns that its state and actions are in.

    `options` are those of `LeRobotDataset`. Raises ValueError where the dataset is not the robot's.
    """
    root = fetch(root)
    features = _read_info(root)["features"]
    action = robot.action_key(features)
    if action is None:
        raise ValueError(f"{root} has no actions; it has {sorted(features)}")
    own = {"cameras": robot.camera_keys(features), "states": robot.state_keys(features), "actions": [action]}
    return LeRobotDataset(root, **own | options)


def episode_numbers(root: str | Path) -> list[int]:
    """The numbers of a dataset's episodes, without reading them."""
    root = fetch(root)
    info = _read_info(root)
    read_table, _ = VERSIONS[info["codebase_version"]]
    return [episode.index for episode in read_table(root, info, [])]


def _read_info(root: Path) -> dict[str, Any]:
    """`meta/info.json`, of a supported version. Raises DataError."""
    file = root / "meta" / "info.json"
    if not file.exists():
        raise DataError(f"{root} is not a LeRobot dataset: it has no meta/info.json")
    try:
        info = json.loads(file.read_text())
    except ValueError as error:
        raise DataError(f"is not JSON: {error}", file) from error
    version = info.get("codebase_version")
    if version not in VERSIONS:
        how = {"v2.0": "v21.convert_dataset_v20_to_v21", "v1.6": "v2.convert_dataset_v1_to_v2"}.get(version)
        advice = "convert it with LeRobot" + (f" 0.3.3: `python -m lerobot.datasets.{how}`" if how else "")
        raise DataError(f"dataset format {version}; supported are {', '.join(VERSIONS)}: {advice}", file)
    needed = ["fps", "features", "total_frames", "data_path"] + ["chunks_size"] * (version == "v2.1")
    needed += ["video_path"] * any(feature["dtype"] == "video" for feature in info.get("features", {}).values())
    missing = [key for key in needed if info.get(key) is None]
    if missing:
        raise DataError(f"lacks {missing}", file)
    return info


def _episodes_v21(root: Path, info: dict[str, Any], videos: Sequence[str]) -> Iterator[Episode]:
    """The episode table of format v2.1, where every episode has files of its own."""
    file, first = root / "meta" / "episodes.jsonl", 0
    for row in sorted(_read_jsonl(file, "episode_index", "length"), key=lambda row: row["episode_index"]):
        number = row["episode_index"]
        names = {"episode_chunk": number // info["chunks_size"], "episode_index": number}
        clips = {v: Clip(root / info["video_path"].format(video_key=v, **names), 0.0, math.inf) for v in videos}
        yield Episode(number, row["length"], root / info["data_path"].format(**names), first, clips)
        first += row["length"]


def _episodes_v30(root: Path, info: dict[str, Any], videos: Sequence[str]) -> Iterator[Episode]:
    """The episode table of format v3.0, where several episodes share a file."""
    files = sorted((root / "meta" / "episodes").glob("*/*.parquet"))
    if not files:
        raise DataError("no *.parquet in any chunk", root / "meta" / "episodes")
    columns = ["episode_index", "length", "dataset_from_index", "data/chunk_index", "data/file_index"]
    sides = ("chunk_index", "file_index", "from_timestamp", "to_timestamp")
    columns += [f"videos/{video}/{side}" for video in videos for side in sides]
    for row in sorted(
        (row for file in files for row in _read_parquet(file, columns).to_pylist()), key=lambda r: r["episode_index"]
    ):
        clips = {}
        for video in videos:
            chunk, number, start, end = (row[f"videos/{video}/{side}"] for side in sides)
            path = info["video_path"].format(video_key=video, chunk_index=chunk, file_index=number)
            clips[video] = Clip(root / path, start, end)
        chunk, number = row["data/chunk_index"], row["data/file_index"]
        data_file = root / info["data_path"].format(chunk_index=chunk, file_index=number)
        yield Episode(row["episode_index"], row["length"], data_file, row["dataset_from_index"], clips)


def _texts_v21(root: Path, kind: str) -> dict[int, str]:
    """Tasks or subtasks by number; no subtasks where there is no file of them."""
    file = root / "meta" / f"{kind}s.jsonl"
    if kind == "subtask" and not file.exists():
        return {}
    return {row[f"{kind}_index"]: row[kind] for row in _read_jsonl(file, f"{kind}_index", kind)}


def _texts_v30(root: Path, kind: str) -> dict[int, str]:
    """Tasks or subtasks by number; no subtasks where there is no file of them."""
    file = root / "meta" / f"{kind}s.parquet"
    if kind == "subtask" and not file.exists():
        return {}
    rows = _read_parquet(file).to_pydict()
    texts = next((rows[name] for name in (kind, "__index_level_0__") if name in rows), None)
    if texts is None or f"{kind}_index" not in rows:
        raise DataError(f"no columns {kind} and {kind}_index; there are {sorted(rows)}", file)
    return dict(zip(rows[f"{kind}_index"], texts, strict=True))


VERSIONS = {"v2.1": (_episodes_v21, _texts_v21), "v3.0": (_episodes_v30, _texts_v30)}


def _check_texts(numbers: np.ndarray, texts: dict[int, str], kind: str) -> None:
    for frame in np.flatnonzero(~np.isin(numbers, list(texts)))[:1]:
        problem = f"{kind}_index is {numbers[frame]}, a {kind} that meta/{kind}s does not have; it has {sorted(texts)}"
        raise DataError(problem, frame=int(frame))


def _subtask_texts(rows: pa.Table, texts: dict[int, str]) -> list[str] | None:
    """Each frame's subtask, however the dataset says it, empty where it has none. Raises DataError for unknown ones.

    LeRobot 0.4 and 0.5 number them (-1: none); 0.6 lists what was said when, and the last before a frame counts.
    """
    if "subtask_index" in rows.column_names:
        numbers, texts = rows["subtask_index"].to_numpy(), {-1: ""} | texts
        _check_texts(numbers, texts, "subtask")
        return [texts[int(number)] for number in numbers]
    if "subtask" in rows.column_names:
        return [text or "" for text in rows["subtask"].to_pylist()]
    if "language_persistent" in rows.column_names:
        found = []
        for time, every in zip(rows["timestamp"].to_pylist(), rows["language_persistent"].to_pylist(), strict=True):
            said = [s for s in every or () if s["style"] == "subtask" and s["timestamp"] <= time]
            found.append(max(said, key=lambda s: s["timestamp"])["content"] or "" if said else "")
        return found
    return None


def _is_camera(feature: dict[str, Any]) -> bool:
    """Whether a feature is colour pictures; depth maps as video are not."""
    about = feature.get("info") or feature.get("video_info") or {}
    return feature["dtype"] in ("video", "image") and not about.get("video.is_depth_map", False)


def _read_jsonl(file: Path, *keys: str) -> list[dict[str, Any]]:
    if not file.exists():
        raise DataError("the file is missing", file)
    rows = []
    for number, line in enumerate(file.read_text().splitlines(), start=1):
        try:
            rows.append(json.loads(line))
        except ValueError as error:
            raise DataError(f"line {number} is not JSON: {error}", file) from error
        if any(key not in rows[-1] for key in keys):
            raise DataError(f"line {number} lacks one of {list(keys)}", file)
    return rows


def _read_parquet(file: Path, columns: list[str] | None = None) -> pa.Table:
    if not file.exists():
        raise DataError("the file is missing", file)
    try:
        known = pq.read_schema(file).names
        missing = [column for column in columns or () if column not in known]
        if missing:
            raise DataError(f"no columns {missing}; there are {known}", file)
        return pq.read_table(file, columns=columns)
    except (OSError, pa.ArrowInvalid) as error:
        raise DataError(f"cannot be read: {error}", file) from error


def _choose(chosen: Sequence[Any] | None, known: list[Any], what: str) -> list[Any]:
    """`chosen`, or all that are known. Raises DataError for unknown or repeated ones."""
    if chosen is None:
        return known
    unknown = [c for c in chosen if c not in known]
    if unknown or len(set(chosen)) != len(chosen) or (not chosen and what == "episode"):
        problem = f"no {what} {unknown}" if unknown else f"{what}s {list(chosen)} are none or repeat"
        raise DataError(f"{problem}; there are {known}")
    return list(chosen)
