"""RLDS datasets (DROID, Open X-Embodiment) as tensorflow-datasets writes them, without TensorFlow."""

from __future__ import annotations

import dataclasses
import itertools
import logging
import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from pi0.datasets.base import Contents, Dataset, Episode
from pi0.datasets.errors import DataError
from pi0.datasets.frames import OpenFiles
from pi0.datasets.images import read_image, read_jpeg
from pi0.datasets.records import Example, Place, read_record, read_records
from pi0.reading import read_json

SPLIT = "train"
FPS = {"droid": 15.0}  # by the first word of a dataset's name: its files do not say it
UNKNOWN_FPS = 10.0
MAX_STEPS = 2**20  # of an episode
MAX_OPEN = 4  # episodes of which a thread keeps the bytes
INSTRUCTION = re.compile(r"(natural_)?language_instruction(_\d+)?")
SHARD = re.compile(r"(?P<name>.+)-(?P<split>\w+)\.(tfrecord|array_record)-(?P<shard>\d{5})-of-(?P<shards>\d{5})")

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class RLDSEpisode(Episode):
    """An episode, and its record in the file."""

    place: Place


class RLDSDataset(Dataset):
    """An RLDS dataset: a folder with `features.json` and shards of its `train` split, TFRecord or ArrayRecord.

    Episodes are numbered as they are stored. Columns are the features of `steps`, nested names joined by "/", such as
    `observation/joint_position`; cameras are its images. Instructions are the texts named `language_instruction`,
    `language_instruction_2` and so on: `task` is the first that is not empty, `tasks` of an item all of them. `success`
    bool [F] is true where the episode's `file_path` has a folder `success`. An image is read with its episode, of
    which the last few are kept: for training at random, fill a cache (`pi0-cache`).
    """

    _files: OpenFiles

    @classmethod
    def contents(cls, root: Path) -> Contents:
        folder = _folder(root)
        steps = _steps(folder)
        features = {name: feature for name, feature in steps.items() if feature["dtype"] != "string"}
        name = folder.parent.name
        fps = next((fps for key, fps in FPS.items() if re.match(rf"{key}([^a-z]|$)", name)), None)
        if fps is None:
            logger.warning("%s does not say its frame rate: timestamps are at %g per second", folder, UNKNOWN_FPS)
        return Contents(fps or UNKNOWN_FPS, features, _episodes(folder, next(iter(steps)), steps))

    def prepare(self) -> None:
        self._files = OpenFiles()
        self._steps = _steps(_folder(self.root))
        self._numbers: dict[tuple[str, ...], int] = {}  # of instructions

    def read_columns(self, episode: RLDSEpisode) -> dict[str, Any]:
        example = self._example(episode)
        columns = {name: _values(example, name, self._steps[name], episode.length) for name in self._columns_read()}
        found_texts: list[str] = []
        for name in self._steps:
            if INSTRUCTION.fullmatch(name.rsplit("/", 1)[-1]) and self._steps[name]["dtype"] == "string":
                found = example.bytes_list(f"steps/{name}")
                found_texts += [_text(found[0])] if found else []
        texts = tuple(text for text in found_texts if text) or ("",)
        number = self._numbers.setdefault(texts, len(self._numbers))
        self.tasks[number], self.instructions[number] = texts[0], texts
        columns["task_index"] = np.full(episode.length, number)
        paths = [name for name in ("episode_metadata/file_path",) if name in example]
        if paths and (found := example.bytes_list(paths[0])):
            columns["success"] = np.full(episode.length, "success" in _text(found[0]).split("/"))
        return columns

    def decode(self, camera: str, position: int, frame: int) -> np.ndarray:
        episode: RLDSEpisode = self.episodes[position]
        try:
            images = self._example(episode).bytes_list(f"steps/{camera}")
            if len(images) != episode.length:
                raise DataError(f"{camera} has {len(images)} images, the episode has {episode.length} steps")
            image = bytes(images[frame])
            return (read_jpeg if image[:2] == b"\xff\xd8" else read_image)(image, self.max_pixels)
        except DataError as error:
            raise DataError(error.problem, episode.file, episode.index, frame) from error

    @classmethod
    def pack_episode(cls, episode: RLDSEpisode, root: Path) -> dict[str, Any]:
        file = episode.file.relative_to(root).as_posix()
        return {"episode": [episode.index, episode.length, file], "place": list(episode.place)}

    @classmethod
    def unpack_episode(cls, values: dict[str, Any], root: Path) -> RLDSEpisode:
        number, length, file = values["episode"]
        return RLDSEpisode(number, length, root / file, Place(*values["place"]))

    def _columns_read(self) -> list[str]:
        return [*self.states, *self.actions]

    def _example(self, episode: RLDSEpisode) -> Example:
        kept = self._files.by_key
        key = (episode.file, episode.place)
        example = kept.pop(key, None) or Example(read_record(episode.file, episode.place))
        while len(kept) >= MAX_OPEN:
            kept.pop(next(iter(kept)))
        kept[key] = example
        return example


def _folder(root: Path) -> Path:
    """The folder of `features.json`: the root, or its only version, or that of the only dataset in it."""
    found = [f.parent for depth in ("", "*/", "*/*/") for f in sorted(root.glob(f"{depth}features.json"))]
    if len(found) != 1:
        problem = f"has {len(found)} datasets, {[str(f) for f in found[:5]]}" if found else "has no features.json"
        raise DataError(f"{root} {problem}; give the folder of one version of an RLDS dataset")
    return found[0]


def _steps(folder: Path) -> dict[str, dict[str, Any]]:
    """The features of a step by name. Raises DataError."""
    file = folder / "features.json"
    try:
        top = read_json(file, error=DataError)["featuresDict"]["features"]
        steps = top["steps"]["sequence"]["feature"]
        return dict(sorted(_flatten(steps["featuresDict"]["features"], "")))
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        problem = error.problem if isinstance(error, DataError) else f"has no steps of an episode: {error!r}"
        raise DataError(problem, file) from error


def _flatten(features: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, dict[str, Any]]]:
    for name, feature in features.items():
        if "featuresDict" in feature:
            yield from _flatten(feature["featuresDict"]["features"], f"{prefix}{name}/")
            continue
        if "text" in feature:
            yield prefix + name, {"dtype": "string", "shape": []}
            continue
        kind = "image" if "image" in feature else "tensor"
        found = feature.get(kind)
        if found is None:
            continue  # of another kind, which is not read
        shape = [int(size) for size in found["shape"].get("dimensions", ())]
        if any(size < -1 for size in shape) or math.prod(abs(size) for size in shape) > 2**28:
            raise DataError(f"{prefix}{name} has shape {shape}")
        if kind == "image" and shape[-1:] == [3] and found.get("dtype", "uint8") == "uint8":
            yield prefix + name, {"dtype": "image", "shape": shape}
        elif kind == "tensor" and found.get("encoding", "none") == "none" and -1 not in shape:
            dtype = str(found["dtype"])
            yield prefix + name, {"dtype": dtype, "shape": shape}


def _episodes(folder: Path, first: str, steps: Mapping[str, Any]) -> Iterator[RLDSEpisode]:
    numbers = itertools.count()
    for file in _shards(folder):
        for place, record in read_records(file):
            try:
                length = _length(Example(record), steps)
            except DataError as error:
                raise DataError(f"record {place.number}: {error.problem}", file) from error
            yield RLDSEpisode(next(numbers), length, file, place)


def _shards(folder: Path) -> list[Path]:
    """The files of the split, all of which must be there. Raises DataError."""
    named = [(match, file) for file in sorted(folder.iterdir()) if (match := SHARD.fullmatch(file.name))]
    files = [(int(m["shard"]), int(m["shards"]), file) for m, file in named if m["split"] == SPLIT]
    if not files:
        splits = sorted({m["split"] for m, _ in named})
        raise DataError(f"no shards of the split {SPLIT!r}; there are splits {splits}", folder)
    missing = sorted(set(range(files[0][1])) - {shard for shard, _, _ in files})
    if missing or len({of for _, of, _ in files}) > 1 or len(files) != files[0][1]:
        raise DataError(f"lacks shards {missing[:5]} of {files[0][1]}, or has others too", folder)
    return [file for _, _, file in files]


def _length(example: Example, steps: Mapping[str, Any]) -> int:
    """The number of steps of an episode, by its first feature that has one value or more in each."""
    for name, feature in steps.items():
        if f"steps/{name}" not in example:
            continue
        if feature["dtype"] in ("string", "image"):
            count = len(example.bytes_list(f"steps/{name}"))
        elif size := math.prod(feature["shape"]):
            count = len(example.numbers(f"steps/{name}")) // size
        else:
            continue
        if not 0 < count <= MAX_STEPS:
            raise DataError(f"has {count} steps; expected 1 to {MAX_STEPS}")
        return count
    raise DataError("has none of the features of features.json")


def _values(example: Example, name: str, feature: Mapping[str, Any], length: int) -> np.ndarray:
    values, shape = example.numbers(f"steps/{name}"), feature["shape"]
    if len(values) != length * math.prod(shape):
        raise DataError(f"{name} has {len(values)} numbers; {length} steps of {shape} are expected")
    return values.astype(np.float64 if feature["dtype"] == "float64" else values.dtype).reshape(length, *shape)


def _text(value: memoryview) -> str:
    try:
        return bytes(value).decode("utf-8").strip()
    except UnicodeDecodeError as error:
        raise DataError(f"has a text that is not UTF-8: {error}") from error
