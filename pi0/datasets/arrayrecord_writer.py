"""Write datasets of the format "arrayrecord", by several processes, a shard at a time; see `ArrayRecordDataset`."""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from pi0.datasets.arrayrecord import FORMAT, INFO, MAX_RECORD, PLACE, REVISION, read_info
from pi0.datasets.base import Dataset
from pi0.datasets.engine import require_all_episodes, run_tasks
from pi0.datasets.errors import DataError
from pi0.datasets.images import Encoding
from pi0.datasets.index import write_files
from pi0.datasets.records import array_record_writer, crc32c, encode_example, record_offsets
from pi0.storage import as_path, delete, digest, is_bucket, list_files, new_file, upload, write_text

SHARD_FRAMES = 4096  # or the one episode that is longer
UNFINISHED = "unfinished"  # a folder: what is being written, and the places of the records of each shard that is
PLAN = f"{UNFINISHED}/plan.json"
Shard = tuple[str, list[int]]  # its name, and the positions of its episodes


def build_records(
    dataset: Dataset, content: str, target: Path, encoding: Encoding, *, workers: int = 1, engine: str = "local"
) -> Path:
    """Write all frames of a dataset's episodes to the folder `target`, and return it.

    The dataset's `states` and `actions` are the columns, its `image_size` the images' size (None: as recorded), and
    `content` says what its recordings contain. What was interrupted goes on with the shards that are missing, and what
    is complete is left as it is. A task of `run_tasks` writes a shard; on several machines, `target` is a bucket or a
    folder that they share. Raises DataError for a damaged image, FileExistsError where `target` has something else, and
    ValueError for a dataset with only some of its undamaged episodes, or encoding "raw" at recorded sizes.
    """
    require_all_episodes(dataset)
    if encoding.name == "raw" and dataset.image_size is None:
        raise ValueError("raw images have no size of their own: give one, or another encoding")
    target = as_path(target)
    info = _describe(dataset, content, encoding)
    if not _begin(target, info):
        return target
    shards = _shards(dataset)
    with tempfile.TemporaryDirectory(prefix="pi0-") as temporary:
        local = Path(temporary, "index")
        with tqdm(total=len(dataset), desc="writing records", unit="frame", mininterval=1.0) as progress:
            places = run_tasks(
                _write_shard,
                (dataset, target, encoding),
                shards,
                workers=workers,
                engine=engine,
                progress=progress,
                amount=lambda shard: sum(dataset.episodes[p].length for p in shard[1]),
            )
            about: dict[str, Any] = {"problems": [], "tasks": list(dataset.tasks.items())}
            about["instructions"] = list(dataset.instructions.items())
            packed = (
                {"index": dataset.episodes[p].index, "length": dataset.episodes[p].length, "file": f"shards/{name}"}
                for name, positions in shards
                for p in positions
            )
            write_files(local, info["content"], dataset.episodes, packed, _parts(dataset, shards, places), about)
        files = {name: [file.size, digest(file.path, "sha256")] for name, file in list_files(local).items()}
        name = "index-" + hashlib.sha256(repr(sorted(files.items())).encode()).hexdigest()[:16]
        upload(local, target / name)
    write_text(target / INFO, json.dumps(info | {"index": name, "files": files}, indent=1))
    _clean(target, {name for name, _ in shards})
    return target


def _describe(dataset: Dataset, content: str, encoding: Encoding) -> dict[str, Any]:
    """What `meta/info.json` says, without the index."""
    columns = (*dataset.states, *dataset.actions)
    features = {name: _plain(dataset.features[name]) for name in (*dataset.cameras, *columns)}
    for name in columns:
        features[name] |= {"dtype": "float32", "shape": list(dataset.table(name).shape[1:])}
    for name in dataset.cameras:
        size = dataset.image_size
        features[name] |= {"dtype": "image"} | ({"shape": [*size, 3], "names": None} if size else {})
    info = {"format": FORMAT, "revision": REVISION, "fps": dataset.fps, "frames": len(dataset)}
    info |= {"size": dataset.image_size and list(dataset.image_size), "encoding": encoding.name, "features": features}
    episodes = [(episode.index, episode.length) for episode in dataset.episodes]
    everything = json.dumps([content, SHARD_FRAMES, info, episodes], sort_keys=True)
    return info | {"content": hashlib.sha256(everything.encode()).hexdigest()[:32]}


def _plain(feature: Mapping[str, Any]) -> dict[str, Any]:
    names = feature.get("names")
    return {"shape": [int(n) for n in feature["shape"]], "names": names if isinstance(names, list | dict) else None}


def _begin(target: Path, info: dict[str, Any]) -> bool:
    """Whether there is anything to write. Raises FileExistsError where other files are in the way."""
    if (target / INFO).exists():
        if read_info(target).get("content") != info["content"]:
            raise FileExistsError(
                f"{target} is made from other recordings, or in another size or encoding; choose another folder"
            )
        return False
    plan = json.dumps({"content": info["content"]})
    if (target / PLAN).exists():
        if (target / PLAN).read_text(encoding="utf-8") != plan:
            raise FileExistsError(
                f"{target} is unfinished, and was begun from other recordings, or in another size or encoding; choose "
                "another folder, or delete it"
            )
    elif target.exists() and next(iter(target.iterdir()), None) is not None:
        raise FileExistsError(f"{target} has other files; choose a new folder")
    else:
        write_text(target / PLAN, plan)
    return True


def _shards(dataset: Dataset) -> list[Shard]:
    groups: list[list[int]] = []
    frames = SHARD_FRAMES
    for position, episode in enumerate(dataset.episodes):
        if frames + episode.length > SHARD_FRAMES:
            groups.append([])
            frames = 0
        groups[-1].append(position)
        frames += episode.length
    return [(f"records-{i:05d}-of-{len(groups):05d}.array_record", group) for i, group in enumerate(groups)]


def _write_shard(shared: tuple[Dataset, Path, Encoding], shard: Shard) -> np.ndarray:
    """Write a shard that is not there yet, and return its places: offset, size and checksum int64 [F, 3]."""
    (dataset, target, encoding), (name, positions) = shared, shard
    file, mark = target / "shards" / name, target / UNFINISHED / f"{name}.npy"
    count = sum(dataset.episodes[position].length for position in positions)
    if mark.exists() and file.exists():
        with mark.open("rb") as stream:
            places = np.load(stream, allow_pickle=False)
        if places.shape == (count, 3) and places.dtype == np.int64:
            return places
    with new_file(file) as temporary:
        writer, written = array_record_writer(temporary), []
        try:
            for position in positions:
                for record in _records(dataset, position, encoding):
                    written.append((len(record), crc32c(record)))
                    writer.write(record)
        finally:
            writer.close()
        places = np.column_stack([record_offsets(temporary, written), np.array(written, np.int64)])
    with new_file(mark) as temporary, temporary.open("wb") as stream:
        np.save(stream, places)
    return places


def _records(dataset: Dataset, position: int, encoding: Encoding) -> Iterator[bytes]:
    """The record of each frame of an episode."""
    start = int(dataset.starts[position])
    for frame in range(dataset.episodes[position].length):
        i = start + frame
        features: dict[str, bytes | np.ndarray] = {}
        for name in dataset.column_names:
            value = dataset.table(name)[i]
            features[name] = value.encode("utf-8") if isinstance(value, str) else np.asarray(value)
        if dataset.tasks:
            features["task"] = dataset.task(i).encode("utf-8")
        for camera in dataset.cameras:
            features[camera] = encoding.encode(dataset.image(camera, position, frame))
        record = encode_example(features)
        if len(record) > MAX_RECORD:
            raise DataError(
                f"would make a record of {len(record):,} bytes; at most {MAX_RECORD:,} are read: choose a smaller size "
                "of images or another encoding",
                episode=dataset.episodes[position].index,
                frame=frame,
            )
        yield record


def _parts(
    dataset: Dataset, shards: list[Shard], places: Iterator[np.ndarray]
) -> Iterator[tuple[int, int, dict[str, np.ndarray]]]:
    """The columns of each shard's frames, with the places of their records."""
    for (_, positions), place in zip(shards, places, strict=True):
        start, end = int(dataset.starts[positions[0]]), int(dataset.starts[positions[-1] + 1])
        part = {name: np.asarray(dataset.table(name)[start:end]) for name in dataset.column_names}
        yield start, end, part | dict(zip(PLACE, place.T, strict=True))


def _clean(target: Path, shards: set[str]) -> None:
    """Delete what is not needed any more, and what killed processes left."""
    delete(target / UNFINISHED)
    for name, file in list_files(target / "shards").items() if not is_bucket(target) else ():
        if name not in shards:
            delete(file.path)
