"""The tables of a LeRobot dataset, in formats v2.1 and v3.0: `info.json`, episodes, tasks and subtasks."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
import re
import string
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pi0.datasets.base import Episode
from pi0.datasets.errors import DataError
from pi0.datasets.json_lines import parse_json, read_jsonl
from pi0.reading import MAX_JSON, read_bytes, require_regular
from pi0.storage import below

MAX_VALUES = 2**28  # in the columns read of one Parquet file: default of `read_parquet`
MAX_ROWS = 2**24  # of episodes, tasks or subtasks
MAX_SIZE = 2**20  # numbers in a vector of one frame


@dataclasses.dataclass(frozen=True)
class VideoSegment:
    """The part of a video that shows an episode: from `start` to `end` seconds in `file` (infinity: its end)."""

    file: Path
    start: float
    end: float


@dataclasses.dataclass(frozen=True)
class LeRobotEpisode(Episode):
    """An episode with the `index` of its first frame in the dataset, and a video segment for each video column.

    Where the episode table does not say a segment, the DataError of that is in its place.
    """

    first_index: int
    videos: dict[str, VideoSegment | DataError]

    def segment(self, video: str) -> VideoSegment | None:
        """The segment of a video column, None for another column. Raises DataError."""
        found = self.videos.get(video)
        if isinstance(found, DataError):
            raise found
        return found


def whole(value: Any) -> bool:
    """Whether it is a whole number; also a float, as pandas writes columns in which a number is missing."""
    return finite(value) and value == int(value)


def finite(value: Any) -> bool:
    """Whether it is a number, of a size that float64 has exactly."""
    return type(value) in (int, float) and abs(value) < 2**53


EXPECTED: dict[Callable[[Any], bool], str] = {whole: "a whole number", finite: "a finite number"}


def take(row: Any, file: Path, fields: Mapping[str, Any], where: str = "") -> list[Any]:
    """The values of a row's fields, each of its type, or whole numbers as int. Raises DataError naming the field."""
    if not isinstance(row, Mapping):
        raise DataError(f"{where}is {row!r:.80}; expected an object with {list(fields)}", file)
    missing = [name for name in fields if row.get(name) is None]
    if missing:
        raise DataError(f"{where}lacks {'one of ' if where else ''}{missing}", file)
    for name, check in fields.items():
        if not (isinstance(row[name], check) if isinstance(check, type) else check(row[name])):
            expected = check.__name__ if isinstance(check, type) else EXPECTED[check]
            raise DataError(f"{where}{name} is {row[name]!r:.80}; expected {expected}", file)
    return [int(row[name]) if check is whole else row[name] for name, check in fields.items()]


def take_rows(table: pa.Table, file: Path, fields: Mapping[str, Any], where: str = "") -> list[Any]:
    """The values that `take` returns of each row of a table, or the DataError that it raises; `where` has {}."""
    columns = [_numbers(table[name], check is whole) for name, check in fields.items()]
    if all(column is not None for column in columns):  # most are: without a step for each row
        return list(zip(*columns, strict=True))
    rows: list[Any] = []
    for i, row in enumerate(table.select(list(fields)).to_pylist()):
        try:
            rows.append(take(row, file, fields, where.format(i)))
        except DataError as error:
            rows.append(error)
    return rows


def _numbers(column: pa.ChunkedArray, of_whole: bool) -> list[Any] | None:
    """A column of finite numbers, or of whole ones as int; None where one is something else."""
    floats = pa.types.is_floating(column.type)
    if column.null_count or not (floats or pa.types.is_integer(column.type)):
        return None
    values = column.to_numpy()
    wrong = ~((values > -(2**53)) & (values < 2**53))
    if wrong.any() or (of_whole and floats and (values != np.floor(values)).any()):
        return None
    return (values.astype(np.int64) if of_whole else values).tolist()


def read_info(root: Path) -> dict[str, Any]:
    """`meta/info.json` of a supported version. Raises DataError."""
    file = root / "meta" / "info.json"
    if not file.exists():
        raise DataError(f"{root} is not a LeRobot dataset: it has no meta/info.json")
    info = parse_json(read_bytes(file, limit=MAX_JSON, error=DataError), file, "it")
    version = info.get("codebase_version") if isinstance(info, dict) else None
    if not isinstance(version, str) or version not in VERSIONS:
        how = {"v2.0": "v21.convert_dataset_v20_to_v21", "v1.6": "v2.convert_dataset_v1_to_v2"}.get(str(version))
        advice = "convert it with LeRobot" + (f" 0.3.3: `python -m lerobot.datasets.{how}`" if how else "")
        raise DataError(f"dataset format {version!s:.80}; supported are {', '.join(VERSIONS)}: {advice}", file)
    needed: dict[str, Any] = {"fps": finite, "features": dict, "total_frames": whole, "data_path": str}
    needed |= {"chunks_size": whole} if version == "v2.1" else {}
    features = info.get("features")
    for name, feature in features.items() if isinstance(features, dict) else ():
        (dtype,) = take(feature, file, {"dtype": str}, f"features[{name!r}] ")
        needed |= {"video_path": str} if dtype == "video" else {}
        for key in ("info", "video_info"):
            if not isinstance(feature.get(key) or {}, dict):
                raise DataError(f"features[{name!r}] {key} is {feature[key]!r:.80}; expected an object", file)
    values = dict(zip(needed, take(info, file, needed), strict=True))
    for name in ("fps", "chunks_size"):
        if values.get(name, 1) <= 0:
            raise DataError(f"{name} is {values[name]}; expected a positive number", file)
    return info | values


def vector_size(info: dict[str, Any], column: str, root: Path) -> int:
    """The dimensions of a column of states or actions. Raises DataError unless it has vectors of numbers."""
    shape, file = info["features"][column].get("shape"), root / "meta" / "info.json"
    if not isinstance(shape, list) or not all(type(size) is int and 0 < size <= MAX_SIZE for size in shape):
        raise DataError(f"features[{column!r}] shape is {shape!r:.80}; expected [dimensions]", file)
    if len(shape) > 1:
        raise DataError(f"features[{column!r}] shape is {shape}; a state or action is a vector, not an array", file)
    return shape[0] if shape else 1


def read_episodes(root: Path, info: dict[str, Any], videos: Sequence[str]) -> Iterator[LeRobotEpisode]:
    """The episodes of a dataset in order. Raises DataError."""
    return VERSIONS[info["codebase_version"]][0](root, info, videos)


def read_texts(root: Path, info: dict[str, Any], what: str) -> dict[int, str]:
    """The texts of tasks or subtasks by number; no subtasks where there is no file of them. Raises DataError."""
    read, suffix = VERSIONS[info["codebase_version"]][1:]
    file = root / "meta" / f"{what}s.{suffix}"
    return {} if what == "subtask" and not file.exists() else read(file, what)


def read_parquet(
    file: Path, columns: list[str] | None = None, max_rows: int = MAX_ROWS, max_values: int = MAX_VALUES
) -> pa.Table:
    """The columns of a Parquet file; texts stay in a dictionary (see `texts_of`), as a small file may repeat long ones.

    Raises DataError, also for more rows or values, before they are read.
    """
    if not file.exists():
        raise DataError("the file is missing", file)
    require_regular(file, DataError)
    try:
        schema = pq.read_schema(file)
        texts = [field.name for field in schema if pa.types.is_string(field.type)]
        with pq.ParquetFile(file, read_dictionary=texts) as parquet:
            known, meta = schema.names, parquet.metadata
            missing = [column for column in columns or () if column not in known]
            if missing or len(set(known)) < len(known):
                raise DataError(f"no columns {missing}, or one twice; there are {known}", file)
            if meta.num_rows > max_rows:
                raise DataError(f"has {meta.num_rows} rows; expected at most {max_rows}, as meta/info.json says", file)
            groups, read = map(meta.row_group, range(meta.num_row_groups)), tuple(columns or known)
            chunks = [group.column(i) for group in groups for i in range(group.num_columns)]
            values = sum(c.num_values for c in chunks if c.path_in_schema.startswith(read))
            if values > max_values:
                raise DataError(f"has {values} values; at most {max_values} are read", file)
            return parquet.read(columns=columns)
    except (OSError, ValueError, pa.ArrowException) as error:
        raise DataError(error.problem if isinstance(error, DataError) else f"cannot be read: {error}", file) from error


def texts_of(column: pa.ChunkedArray) -> list[Any]:
    """The values of a column, equal ones as one object. Raises ValueError for bytes that are not UTF-8."""
    encoded = column.dictionary_encode().combine_chunks()
    values = encoded.dictionary.to_pylist()
    return [None if i is None else values[i] for i in encoded.indices.to_pylist()]


def fill_path(root: Path, info: dict[str, Any], key: str, **fields: Any) -> Path:
    """The path below `root` of a template in info.json. Raises DataError.

    A field is filled as {name} or, a number, with up to two digits of width as {name:03d}: `str.format` would read
    attributes of what it is given, and any width.
    """
    return _fill_path(root, key, info[key], tuple(fields.items()))


@functools.lru_cache(2**16)  # it resolves links: slow, and many episodes share a file
def _fill_path(root: Path, key: str, template: str, values: tuple[tuple[str, Any], ...]) -> Path:
    file, fields, parts = root / "meta" / "info.json", dict(values), []
    try:
        for literal, name, spec, conversion in string.Formatter().parse(template):
            parts.append(literal)
            if name is None:
                continue
            form = r"(\d{0,2}d)?" if isinstance(fields.get(name), int) else ""
            if name not in fields or conversion or not re.fullmatch(form, spec or "", re.ASCII):
                raise ValueError(f"{{{name}{conversion and '!'}{spec and ':'}{spec}}} is not one of {sorted(fields)}")
            parts.append(format(fields[name], spec or ""))
        return below(root, "".join(parts))
    except ValueError as error:
        raise DataError(f"{key} {template!r:.200}: {error}", file) from error


def _texts(rows: Iterator[tuple[str, Any]], file: Path, what: str) -> dict[int, str]:
    return dict(take(row, file, {f"{what}_index": whole, what: str}, where) for where, row in rows)  # type: ignore[misc]


def _lines(file: Path) -> Iterator[tuple[str, Any]]:
    return ((f"line {line} ", row) for line, row in read_jsonl(file))


def _episodes_v21(root: Path, info: dict[str, Any], videos: Sequence[str]) -> Iterator[LeRobotEpisode]:
    """In v2.1 every episode has its own files."""
    file, first = root / "meta" / "episodes.jsonl", 0
    rows = [take(row, file, {"episode_index": whole, "length": whole}, where) for where, row in _lines(file)]
    for index, length in sorted(rows):
        names = {"episode_chunk": index // info["chunks_size"], "episode_index": index}
        files = {video: fill_path(root, info, "video_path", video_key=video, **names) for video in videos}
        segments: dict[str, Any] = {video: VideoSegment(path, 0.0, math.inf) for video, path in files.items()}
        yield LeRobotEpisode(index, length, fill_path(root, info, "data_path", **names), first, segments)
        first += length


def _episodes_v30(root: Path, info: dict[str, Any], videos: Sequence[str]) -> Iterator[LeRobotEpisode]:
    """In v3.0 several episodes share a file."""
    files = sorted((root / "meta" / "episodes").glob("*/*.parquet"))
    if not files:
        raise DataError("no *.parquet in any chunk", root / "meta" / "episodes")
    needed = dict.fromkeys(
        ("episode_index", "length", "dataset_from_index", "data/chunk_index", "data/file_index"), whole
    )
    place = {"chunk_index": whole, "file_index": whole, "from_timestamp": finite, "to_timestamp": finite}
    places = [{f"videos/{video}/{field}": check for field, check in place.items()} for video in videos]
    rows: list[tuple[Any, tuple[Any, ...]]] = []
    for file in files:
        table = read_parquet(file, [*needed, *itertools.chain(*places)], min(info["total_frames"], MAX_ROWS))
        own = take_rows(table, file, needed, "row {} ")
        for error in (found for found in own if isinstance(found, DataError)):
            raise error
        listed = [take_rows(table, file, fields) for fields in places]
        rows += zip(own, zip(*listed, strict=True) if listed else [()] * len(own), strict=True)
    for (index, length, first, chunk, part), found in sorted(rows, key=lambda one: one[0][0]):
        segments: dict[str, VideoSegment | DataError] = {}
        for video, values in zip(videos, found, strict=True):
            try:
                if isinstance(values, DataError):
                    raise values
                names = {"chunk_index": values[0], "file_index": values[1]}
                path = fill_path(root, info, "video_path", video_key=video, **names)
                segments[video] = VideoSegment(path, *values[2:])
            except DataError as error:
                segments[video] = DataError(error.problem, error.file, index)
        path = fill_path(root, info, "data_path", chunk_index=chunk, file_index=part)
        yield LeRobotEpisode(index, length, path, first, segments)


def _texts_v21(file: Path, what: str) -> dict[int, str]:
    return _texts(_lines(file), file, what)


def _texts_v30(file: Path, what: str) -> dict[int, str]:
    rows = read_parquet(file)
    text = next((name for name in (what, "__index_level_0__") if name in rows.column_names), None)
    if text is None or f"{what}_index" not in rows.column_names:
        raise DataError(f"no columns {what} and {what}_index; there are {sorted(rows.column_names)}", file)
    try:
        pairs = zip(rows[f"{what}_index"].to_pylist(), texts_of(rows[text]), strict=True)
    except (ValueError, KeyError, AttributeError, pa.ArrowException) as error:
        raise DataError(f"cannot be read: {error}", file) from error
    return _texts(((f"row {i} ", {f"{what}_index": n, what: t}) for i, (n, t) in enumerate(pairs)), file, what)


VERSIONS = {"v2.1": (_episodes_v21, _texts_v21, "jsonl"), "v3.0": (_episodes_v30, _texts_v30, "parquet")}
