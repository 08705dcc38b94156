"""`Dataset`, the protocol of a dataset format, with what all formats share: chunks, caches, tables and checks."""

from __future__ import annotations

import abc
import dataclasses
import hashlib
import itertools
import logging
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np

from pi0.datasets import index
from pi0.datasets.errors import DataError
from pi0.datasets.frames import MEMORY, FrameCache, FrameMemory
from pi0.datasets.images import MAX_PIXELS
from pi0.fetch import fetch
from pi0.robots.transforms import resize_with_pad

STATE, ACTION = "observation.state", "action"
CACHE_REVISION = 1  # of the files of a cache: raise it when decoding or resizing changes

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Episode:
    """An episode: its number, its length in frames, and the file that has its rows."""

    index: int
    length: int
    file: Path


class Contents(NamedTuple):
    """A dataset without its rows. `episodes` may be read lazily.

    `features` describes columns as LeRobot's `info.json`: {"dtype": "float32", or "image" for a camera, "shape":
    [dims], "names": of the dimensions, optional}.
    """

    fps: float
    features: dict[str, dict[str, Any]]
    episodes: Iterable[Episode]


class Dataset(Protocol):
    """Random access by frame to recorded episodes, in the order chosen.

    A format inherits this class, implements `contents`, `read_columns` and `decode`, and overrides what differs.
    `root` is a folder or an address of `pi0.fetch`, such as `hf://datasets/lerobot/pusht`. What is read: `episodes`
    (default: all), `cameras` (default: all image columns), and the columns of `states` and `actions`, the latter in
    chunks of `action_horizon` T. `image_size` (height, width) resizes images as `resize_with_pad` does. `cache` is a
    folder that `pi0-cache` filled for that size, or "memory": then each image is decoded only once. With
    `skip_damaged`, episodes whose files or numbers are damaged are left out and listed in `skipped`; detecting images
    that cannot be decoded takes `pi0-check-data`. Recorded images of more than `max_pixels` are refused before they are
    decoded. Threads may share a dataset.

    Attributes: `fps`, frames per second; `features`, as in `Contents`; `episodes`, those that are read, and
    `every_episode`; `starts` [E + 1], the first frame of each episode, and the number of frames; `cameras`, the
    columns of images; `skipped`, a DataError for each problem. Raises DataError for damaged recordings.
    """

    root: Path
    fps: float
    features: dict[str, dict[str, Any]]
    action_horizon: int
    image_size: tuple[int, int] | None
    max_pixels: int
    cameras: list[str]
    states: tuple[str, ...]
    actions: tuple[str, ...]
    every_episode: Sequence[Any]
    episodes: Sequence[Any]
    starts: np.ndarray
    skipped: list[DataError]
    tasks: dict[int, str]
    instructions: dict[int, tuple[str, ...]]  # of a task that has several, the same in other words
    _columns: Mapping[str, Any]
    _index: index.Index | None
    _cached: Mapping[str, FrameCache | FrameMemory]

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
        max_pixels: int = MAX_PIXELS,
    ):
        if action_horizon < 1:
            raise ValueError(f"action_horizon is {action_horizon}; a chunk has at least 1 action")
        self.root, self.action_horizon, self.image_size = self.locate(root), action_horizon, image_size
        self.states, self.actions, self.max_pixels = tuple(states), tuple(actions), max_pixels
        self.fps, self.features, listed = self.contents(self.root)
        if not 0 < self.fps < math.inf:
            raise DataError(f"fps is {self.fps}; expected a positive number", self.root)
        _choose([*self.states, *self.actions], list(self.features), "column")
        self.cameras = _choose(cameras, [name for name, f in self.features.items() if is_camera(f)], "camera")
        self._index = None
        self.tasks, self.instructions = {}, {}
        if not self._read_by_index(episodes, skip_damaged):
            self._read_all(listed, episodes, skip_damaged)
        self._cached = {}
        if cache == MEMORY:
            self._cached = {camera: FrameMemory() for camera in self.cameras}
        elif cache is not None and image_size is None:
            raise ValueError("a cache of images needs image_size, the size that it was filled for")
        elif cache is not None:
            if "://" in str(cache):
                raise ValueError(
                    f"cache {cache}: raw frames are mapped into memory, so they need a folder of this machine; in a "
                    'bucket, make a dataset of the format "arrayrecord": pi0-cache --to arrayrecord --out gs://…'
                )
            self._cached = self._open_cache(Path(cache))

    @classmethod
    def locate(cls, root: str | Path) -> Path:
        """The path of a dataset, given its folder or address: on this machine, unless a format reads in a bucket."""
        return fetch(root)

    @classmethod
    def stored_size(cls, root: Path) -> tuple[int, int] | None:
        """The size that images were resized to before they were stored; None where they are as recorded."""
        return None

    @classmethod
    def episode_numbers(cls, root: Path) -> list[int]:
        """The numbers of all episodes, without reading them."""
        found = index.find_index(root, None)
        return [e.index for e in cls.contents(root).episodes] if found is None else found.numbers.tolist()

    @classmethod
    @abc.abstractmethod
    def contents(cls, root: Path) -> Contents:
        """Frame rate, features and episodes of the dataset in a folder. Raises DataError."""

    @abc.abstractmethod
    def read_columns(self, episode: Any) -> Mapping[str, Any]:
        """The columns of numbers [F, ...] of an episode, at least `self.states` and `self.actions`.

        Optional are `timestamp` in seconds, `index` (of the frame, over all episodes), `task_index` (see `task`),
        `success` bool of the episode, and `subtask`, texts that are empty for frames without one. Raises DataError.
        """

    @abc.abstractmethod
    def decode(self, camera: str, position: int, frame: int) -> np.ndarray:
        """The image uint8 [H, W, 3] of a frame of `self.episodes[position]`, as recorded. Raises DataError."""

    def read_many(self, episodes: Sequence[Any]) -> dict[str, np.ndarray] | None:
        """The columns of all episodes of a file at once, as `_checked` returns them, where nothing is wrong in them.

        None where a format cannot, or something may be wrong: then each episode is read by itself. Arrays are [F, ...]
        over the frames F of all episodes.
        """
        return None

    @classmethod
    def pack_episode(cls, episode: Any, root: Path) -> dict[str, Any] | None:
        """An episode as JSON values, for the index of a large dataset; None where a format has no index."""
        if type(episode) is not Episode or not episode.file.is_relative_to(root):
            return None
        return {"index": episode.index, "length": episode.length, "file": str(episode.file.relative_to(root))}

    @classmethod
    def unpack_episode(cls, values: dict[str, Any], root: Path) -> Any:
        """The episode that `pack_episode` made the values of."""
        return Episode(values["index"], values["length"], root / values["file"])

    def prepare(self) -> None:
        """Read what else the format needs, such as `tasks`, before any episode is read."""

    def check_episode(self, episode: Any, thorough: bool) -> Iterable[DataError]:
        """The problems of an episode's image files, without decoding; `thorough` may open them."""
        return ()

    def image_source(self, camera: str, episode: Any) -> tuple[Path, Any]:
        """The file that has a camera's images of an episode, and their place in it, as plain values."""
        return episode.file, None

    def __len__(self) -> int:
        return int(self.starts[-1])

    def __getitem__(self, i: int) -> dict[str, Any]:
        """Frame i of the chosen episodes, by column.

        Cameras uint8 [H, W, 3], read-only where they come from a cache; states float32 [D]; actions float32 [T, D],
        which repeat the last action past the episode's end, where `action_is_pad` bool [T] is true; `timestamp` in
        seconds; `episode_index` and `frame_index`; and `task`, `tasks` (the instruction in several wordings),
        `subtask` and `index` where the dataset has them. Raises
        IndexError beyond the frames, and DataError for a damaged one, or where all episodes are left out as damaged.
        """
        return self.item(i)

    def fetch(self, frames: Sequence[int]) -> dict[int, bytes]:
        """What frames are decoded from, by frame, where a format reads many faster than one by one."""
        return {}

    def item(self, i: int, stored: bytes | None = None) -> dict[str, Any]:
        """Frame i as `__getitem__` returns it, decoded from what `fetch` returned for it, if anything.

        Raises IndexError beyond the frames, and DataError for a damaged one, or where all episodes are damaged.
        """
        if self.skipped and not self.episodes:
            first = self.skipped[0]
            raise DataError(
                f"all episodes are damaged; the first: {first.problem}", first.file, first.episode, first.frame
            )
        if not 0 <= i < len(self):
            raise IndexError(f"frame {i} is not within 0 to {len(self) - 1}")
        i = int(i)
        position = int(np.searchsorted(self.starts, i, side="right")) - 1
        start, end = self.starts[position : position + 2]
        chunk = i + np.arange(self.action_horizon)
        item: dict[str, Any] = {name: self._columns[name][i] for name in self.states}
        item |= {name: self._columns[name][np.minimum(chunk, end - 1)] for name in self.actions}
        item |= {"action_is_pad": chunk >= end, "timestamp": float(self._columns["timestamp"][i])}
        if self.tasks or self.instructions:
            number = int(self._columns["task_index"][i])
            item |= {"task": self.tasks[number]} if self.tasks else {}
            item |= {"tasks": texts} if (texts := self.instructions.get(number, ())) else {}
        item |= {"subtask": str(self._columns["subtask"][i])} if "subtask" in self._columns else {}
        counters = [name for name in ("index", "episode_index", "frame_index") if name in self._columns]
        item |= {name: int(self._columns[name][i]) for name in counters}
        return item | self.images(position, i - int(start), stored)

    def images(self, position: int, frame: int, stored: bytes | None = None) -> dict[str, np.ndarray]:
        """The images of all cameras of a frame of `self.episodes[position]`."""
        return {camera: self.image(camera, position, frame) for camera in self.cameras}

    def table(self, column: str) -> np.ndarray:
        """A column of numbers of all frames, [F, ...], without decoding any image. Raises KeyError."""
        if column not in self._columns:
            raise KeyError(f"no column {column!r}; there are {sorted(self._columns)}")
        return self._columns[column]

    @property
    def column_names(self) -> list[str]:
        """The columns of numbers, and of texts, that `table` has."""
        return list(self._columns)

    def task(self, i: int) -> str:
        """The instruction of frame i, empty where the dataset has none."""
        return self.tasks[self._task_index(i)] if self.tasks else ""

    def _task_index(self, i: int) -> int:
        return int(self._columns["task_index"][i])

    def dimension_names(self, column: str) -> list[str]:
        """The names of a column's dimensions, empty where the recording does not have them."""
        names = self.features[column].get("names")
        if isinstance(names, Mapping) and len(names) == 1:  # such as {"motors": [...]}
            (names,) = names.values()
        return names if isinstance(names, list) and all(isinstance(name, str) for name in names) else []

    def image(self, camera: str, position: int, frame: int) -> np.ndarray:
        """The image [H, W, 3] of a frame of `self.episodes[position]`, from the cache if there. Raises DataError."""
        episode, cached = self.episodes[position], self._cached.get(camera)
        image = None if cached is None else cached.read(episode.index, frame)
        if image is None:
            image = self.decode(camera, position, frame)
            if self.image_size is not None:
                image = resize_with_pad(image, *self.image_size)
            if cached is not None:
                cached.store(episode.index, frame, image)
        return image

    def cache_name(self, camera: str) -> str:
        """The name of a camera's folder in a cache: a hash of the episodes, and of size and time of their files."""
        parts: list[object] = [CACHE_REVISION, self.image_size, self.fps, camera]
        if self._index is not None:
            parts.append(self._index.about["content"])
            return hashlib.sha256(repr(parts).encode()).hexdigest()[:32]
        files: set[Path] = set()
        for episode in self.every_episode:
            file, place = self.image_source(camera, episode)
            files.add(file)
            parts.append((episode.index, episode.length, file.relative_to(self.root).as_posix(), place))
        for file in sorted(files):
            stat = file.stat() if file.exists() else None
            parts.append(stat and (stat.st_size, stat.st_mtime_ns))
        return hashlib.sha256(repr(parts).encode()).hexdigest()[:32]

    def _open_cache(self, folder: Path) -> dict[str, FrameCache]:
        """The complete caches in a folder by camera; the other cameras are decoded, which is logged."""
        found = {camera: folder / self.cache_name(camera) for camera in self.cameras}
        missing = [camera for camera, path in found.items() if not path.exists()]
        if missing:
            logger.warning("%s has no images of %s of %s: decoding them", folder, missing, self.root)
        return {camera: FrameCache(path) for camera, path in found.items() if path.exists()}

    def _read_all(self, listed: Iterable[Any], chosen: Sequence[int] | None, skip_damaged: bool) -> None:
        """Read all that there is of the chosen episodes; of a large dataset, by an index that is made now."""
        self.every_episode = list(listed)
        by_number = {episode.index: episode for episode in self.every_episode}
        if len(by_number) != len(self.every_episode) or any(episode.length < 1 for episode in self.every_episode):
            raise DataError("the table of episodes has a number twice, or an episode without frames", self.root)
        self.prepare()
        numbers = _choose(chosen, list(by_number), "episode")
        total = sum(episode.length for episode in self.every_episode)
        if index.MIN_FRAMES <= total <= index.MAX_FRAMES and self._write_index(skip_damaged):
            self._read_by_index(chosen, skip_damaged)
        else:
            self._read([by_number[number] for number in numbers], skip_damaged)

    def _index_columns(self, skip_damaged: bool) -> list[Any]:
        kind = type(self)
        return [kind.__module__, kind.__qualname__, self.states, self.actions, self.cameras, skip_damaged]

    def _write_index(self, skip_damaged: bool) -> bool:
        """Write the index of all episodes, and return whether that was possible."""
        if not self.root.is_dir() or self.pack_episode(self.every_episode[0], self.root) is None:
            return False
        about: dict[str, Any] = {"problems": []}

        def parts() -> Iterator[tuple[int, int, Mapping[str, np.ndarray]]]:
            start = 0
            for group, part, problems in self._parts(self.every_episode, skip_damaged):
                end = start + sum(episode.length for episode in group)
                about["problems"] += [
                    (p.problem, None if p.file is None else str(p.file), group[0].index, p.frame) for p in problems
                ]
                if part is not None:
                    yield start, end, part
                start = end
            about["tasks"], about["instructions"] = list(self.tasks.items()), list(self.instructions.items())

        packed = (self.pack_episode(episode, self.root) or {} for episode in self.every_episode)
        try:
            index.write_index(self.root, self._index_columns(skip_damaged), self.every_episode, packed, parts(), about)
        except OSError as error:
            logger.warning("cannot write an index of %s, so it is read anew each time: %s", self.root, error)
            return False
        return True

    def _find_index(self, skip_damaged: bool) -> index.Index | None:
        return index.find_index(self.root, self._index_columns(skip_damaged))

    def _read_by_index(self, chosen: Sequence[int] | None, skip_damaged: bool) -> bool:
        """Take columns and episodes of the index, and return whether there is one."""
        found = self._find_index(skip_damaged)
        if found is None:
            return False
        everything = np.arange(len(found.numbers))
        self.every_episode = index.IndexedEpisodes(found, everything, type(self), self.root)
        self.tasks = {int(n): text for n, text in found.about["tasks"]}
        self.instructions = {int(n): tuple(texts) for n, texts in found.about["instructions"]}
        self._index = found
        self.prepare()
        numbers = np.asarray(_choose(chosen, found.numbers.tolist(), "episode"), np.int64)
        order = np.argsort(found.numbers, kind="stable")
        positions, problems = order[np.searchsorted(found.numbers, numbers, sorter=order)], found.problems()
        self.skipped = [p for number in numbers[np.isin(numbers, list(problems))] for p in problems[int(number)]]
        if self.skipped and not skip_damaged:
            raise self.skipped[0]
        positions = positions[~np.isin(numbers, list(problems))]
        self.episodes = index.IndexedEpisodes(found, positions, type(self), self.root)
        self._columns = index.IndexedColumns(found, positions)
        self.starts = np.concatenate([[0], np.cumsum(found.lengths[positions])])
        return True

    def _parts(
        self, episodes: Sequence[Any], skip_damaged: bool
    ) -> Iterator[tuple[Sequence[Any], dict[str, np.ndarray] | None, list[DataError]]]:
        """The checked columns of episodes, several at a time where `read_many` can, and their problems."""
        for _, group in itertools.groupby(episodes, lambda episode: episode.file):
            together = list(group)
            part = self.read_many(together)
            for some in [together] if part is not None else ([episode] for episode in together):
                problems: list[DataError] = []
                own = part
                if own is None:
                    try:
                        own = self._checked(some[0], self.read_columns(some[0]))
                    except DataError as error:
                        problems.append(DataError(error.problem, some[0].file, some[0].index, error.frame))
                found = {episode.index: list(self.check_episode(episode, skip_damaged)) for episode in some}
                if len(some) == 1 or not any(found.values()):
                    problems += found[some[0].index]
                    yield some, None if problems else own, problems
                    continue
                start = 0
                for episode in some:
                    rows = slice(start, start + episode.length)
                    own_part = {name: column[rows] for name, column in (own or {}).items()}
                    yield [episode], None if found[episode.index] else own_part, found[episode.index]
                    start += episode.length

    def _read(self, episodes: Sequence[Any], skip_damaged: bool) -> None:
        """Read the columns of episodes, and keep the undamaged ones."""
        self.episodes: list[Any] = []
        self.skipped = []
        parts: list[dict[str, np.ndarray]] = []
        for group, part, problems in self._parts(episodes, skip_damaged):
            if problems and not skip_damaged:
                raise problems[0]
            self.skipped += problems
            if part is not None:
                self.episodes += group
                parts.append(part)
        self.starts = np.cumsum([0] + [episode.length for episode in self.episodes])
        self._columns = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]} if parts else {}

    def _checked(self, episode: Any, columns: Mapping[str, Any]) -> dict[str, np.ndarray]:
        """An episode's columns, states and actions as finite float32 [F, D]. Raises DataError."""
        frames = np.arange(episode.length)
        arrays = {"frame_index": frames, "timestamp": frames / self.fps, "task_index": np.zeros_like(frames)}
        arrays |= {"episode_index": np.full_like(frames, episode.index)}
        arrays |= {name: np.asarray(column) for name, column in columns.items()}
        for name, array in arrays.items():
            if array.shape[:1] != (episode.length,):
                raise DataError(f"{name} has {array.size and len(array)} rows, the episode has {episode.length}")
        for name in (*self.states, *self.actions):
            if arrays[name].ndim > 2:
                raise DataError(f"{name} has shape {list(arrays[name].shape[1:])}; a state or action is a vector")
            try:
                arrays[name] = arrays[name].astype(np.float32, copy=False).reshape(episode.length, -1)
            except (TypeError, ValueError) as error:
                raise DataError(f"{name} is not numbers: {error}") from error
            for frame, dim in np.argwhere(~np.isfinite(arrays[name]))[:1]:
                raise DataError(f"{name}[{dim}] is {arrays[name][frame, dim]}", frame=int(frame))
        return arrays


def is_camera(feature: Mapping[str, Any]) -> bool:
    """Whether a feature is color images; depth maps are not."""
    places = (feature, feature.get("info") or {}, feature.get("video_info") or {})
    depth = any(place.get(key) for place in places for key in ("is_depth_map", "video.is_depth_map"))
    return feature["dtype"] in ("video", "image") and not depth


def _choose(chosen: Sequence[Any] | None, known: list[Any], what: str) -> list[Any]:
    """`chosen`, or all known ones. Raises DataError for unknown or repeated ones."""
    if chosen is None:
        return known
    unknown = sorted(set(chosen) - set(known), key=list(chosen).index)
    if unknown or len(set(chosen)) != len(chosen) or (not chosen and what == "episode"):
        problem = f"no {what} {unknown}" if unknown else f"{what}s {list(chosen)} are none or repeat"
        raise DataError(f"{problem}; there are {known}")
    return list(chosen)
