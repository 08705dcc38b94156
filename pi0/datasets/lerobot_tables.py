"""The tables of a LeRobot dataset, in formats v2.1 and v3.0: `info.json`, episodes, tasks and subtasks."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pi0.datasets.base import Episode, read_jsonl
from pi0.datasets.errors import DataError


@dataclasses.dataclass(frozen=True)
class VideoSegment:
    """The part of a video that shows an episode: from `start` to `end` seconds in `file` (infinity: its end)."""

    file: Path
    start: float
    end: float


@dataclasses.dataclass(frozen=True)
class LeRobotEpisode(Episode):
    """An episode with the `index` of its first frame in the dataset, and a video segment for each video column."""

    first_index: int
    videos: dict[str, VideoSegment]


def read_info(root: Path) -> dict[str, Any]:
    """`meta/info.json` of a supported version. Raises DataError."""
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


def read_episodes(root: Path, info: dict[str, Any], videos: Sequence[str]) -> Iterator[LeRobotEpisode]:
    """The episodes of a dataset in order. Raises DataError."""
    return VERSIONS[info["codebase_version"]][0](root, info, videos)


def read_texts(root: Path, info: dict[str, Any], what: str) -> dict[int, str]:
    """The texts of tasks or subtasks by number; no subtasks where there is no file of them. Raises DataError."""
    read, suffix = VERSIONS[info["codebase_version"]][1:]
    file = root / "meta" / f"{what}s.{suffix}"
    return {} if what == "subtask" and not file.exists() else read(file, what)


def read_parquet(file: Path, columns: list[str] | None = None) -> pa.Table:
    """The columns of a Parquet file. Raises DataError."""
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


def _read_rows(file: Path, *keys: str) -> list[dict[str, Any]]:
    rows = []
    for line, row in read_jsonl(file):
        if any(key not in row for key in keys):
            raise DataError(f"line {line} lacks one of {list(keys)}", file)
        rows.append(row)
    return rows


def _episodes_v21(root: Path, info: dict[str, Any], videos: Sequence[str]) -> Iterator[LeRobotEpisode]:
    """In v2.1 every episode has its own files."""
    rows, first = _read_rows(root / "meta" / "episodes.jsonl", "episode_index", "length"), 0
    for row in sorted(rows, key=lambda row: row["episode_index"]):
        number, length = row["episode_index"], row["length"]
        names = {"episode_chunk": number // info["chunks_size"], "episode_index": number}
        files = {video: root / info["video_path"].format(video_key=video, **names) for video in videos}
        segments = {video: VideoSegment(file, 0.0, math.inf) for video, file in files.items()}
        yield LeRobotEpisode(number, length, root / info["data_path"].format(**names), first, segments)
        first += length


def _episodes_v30(root: Path, info: dict[str, Any], videos: Sequence[str]) -> Iterator[LeRobotEpisode]:
    """In v3.0 several episodes share a file."""
    files = sorted((root / "meta" / "episodes").glob("*/*.parquet"))
    if not files:
        raise DataError("no *.parquet in any chunk", root / "meta" / "episodes")
    columns = ["episode_index", "length", "dataset_from_index", "data/chunk_index", "data/file_index"]
    place = ("chunk_index", "file_index", "from_timestamp", "to_timestamp")
    columns += [f"videos/{video}/{field}" for video in videos for field in place]
    rows = [row for file in files for row in read_parquet(file, columns).to_pylist()]
    for row in sorted(rows, key=lambda row: row["episode_index"]):
        segments = {}
        for video in videos:
            chunk, number, start, end = (row[f"videos/{video}/{field}"] for field in place)
            path = info["video_path"].format(video_key=video, chunk_index=chunk, file_index=number)
            segments[video] = VideoSegment(root / path, start, end)
        chunk, number = row["data/chunk_index"], row["data/file_index"]
        file = root / info["data_path"].format(chunk_index=chunk, file_index=number)
        yield LeRobotEpisode(row["episode_index"], row["length"], file, row["dataset_from_index"], segments)


def _texts_v21(file: Path, what: str) -> dict[int, str]:
    return {row[f"{what}_index"]: row[what] for row in _read_rows(file, f"{what}_index", what)}


def _texts_v30(file: Path, what: str) -> dict[int, str]:
    rows = read_parquet(file).to_pydict()
    texts = next((rows[name] for name in (what, "__index_level_0__") if name in rows), None)
    if texts is None or f"{what}_index" not in rows:
        raise DataError(f"no columns {what} and {what}_index; there are {sorted(rows)}", file)
    return dict(zip(rows[f"{what}_index"], texts, strict=True))


VERSIONS = {"v2.1": (_episodes_v21, _texts_v21, "jsonl"), "v3.0": (_episodes_v30, _texts_v30, "parquet")}
