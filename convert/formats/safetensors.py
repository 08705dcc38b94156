"""Read and write safetensors files, streaming and with bfloat16, which their NumPy library does not support."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import ml_dtypes
import numpy as np

from convert.tensors import CheckpointError, Index, Tensor, contiguous, mapped, pieces
from pi0.reading import MAX_JSON, parse_json, read_json, require_regular
from pi0.storage import below, file_size, is_bucket, read_range, requests

_CODES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}


def read_safetensors(file: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file, memory-mapped, or of one in a bucket read there.

    Raises CheckpointError for a damaged file, and ConnectionError for one in a bucket that cannot be reached.
    """
    try:
        with requests(f"cannot read {file}"):
            require_regular(file)
        size = file_size(file)
        (length,) = struct.unpack("<Q", read_range(file, 0, min(8, size)))
        header = parse_json(read_range(file, 8, min(8 + length, size, 9 + MAX_JSON)), f"its header of {length:,} bytes")
        header.pop("__metadata__", None)
        entries = {name: _entry(name, **entry) for name, entry in header.items()}
    except ConnectionError:  # which says nothing about the file
        raise
    except (OSError, struct.error, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{file} is not a safetensors file, or is damaged: {error}") from error
    end = 8 + length
    for begin, size_of, name in sorted((b, math.prod(s) * d.itemsize, n) for n, (d, s, b) in entries.items()):
        if 8 + length + begin != end:
            raise CheckpointError(f"{file} is damaged: {name} does not start where the tensor before it ends")
        end += size_of
    if size != end:
        raise CheckpointError(f"{file} has {size} bytes, its header says {end}; is the file truncated?")
    lazily = _ranged if is_bucket(file) else mapped
    return {name: lazily(file, *entry[:2], 8 + length + entry[2]) for name, entry in entries.items()}


def _ranged(file: Path, dtype: np.dtype, shape: tuple[int, ...], start: int) -> Tensor:
    """An array in a file of a bucket: of a part, the rows of the first axis are read that have it."""

    def read(index: Index) -> np.ndarray:
        rows, rest = range(shape[0]) if shape else range(1), index
        if index and isinstance(index[0], slice) and len(range(shape[0])[index[0]]) > 0:
            first = range(shape[0])[index[0]]
            rows = range(min(first), max(first) + 1)
            rest = (slice(None, None, first.step), *index[1:])
        elif index and not isinstance(index[0], slice):
            row = rows[index[0]]
            rows, rest = range(row, row + 1), (0, *index[1:])
        row_size = math.prod(shape[1:]) * dtype.itemsize
        content = read_range(file, start + rows.start * row_size, start + rows.stop * row_size)
        return np.frombuffer(content, dtype).reshape((len(rows), *shape[1:]) if shape else ())[rest]

    return Tensor(shape, dtype, read, anyhow=True)


def read_sharded(index: Path) -> dict[str, Tensor]:
    """The tensors of the shards listed in a `model.safetensors.index.json`. Raises CheckpointError."""
    listed = read_json(index, error=CheckpointError).get("weight_map")
    if not isinstance(listed, dict) or not all(isinstance(shard, str) for shard in listed.values()):
        raise CheckpointError(f"{index} has no weight_map of tensor names and files")
    try:
        shards = {name: read_safetensors(below(index.parent, name)) for name in sorted(set(listed.values()))}
    except ValueError as error:
        raise CheckpointError(f"{index} cannot be read: {error}; are all of its files there?") from error
    found = [(name, shard) for shard, tensors in shards.items() for name in tensors]
    wrong = sorted({name for name, _ in set(found) ^ set(listed.items())})
    if wrong:
        raise CheckpointError(f"{index} and its files disagree on {wrong[:5]}; do they belong to one checkpoint?")
    return {name: shards[shard][name] for name, shard in found}


def _entry(name: str, dtype: str, shape: list[int], data_offsets: list[int]) -> tuple[np.dtype, tuple[int, ...], int]:
    """Dtype, shape and first byte of a tensor. Raises ValueError or TypeError for an invalid entry."""
    if dtype not in _CODES:
        raise ValueError(f"{name} has dtype {dtype}; known are {', '.join(_CODES)}")
    begin, end = data_offsets
    if not all(type(n) is int and 0 <= n < 2**60 for n in (*shape, begin, end)) or math.prod(shape) >= 2**60:
        raise ValueError(f"{name} has shape {shape} and offsets {data_offsets}; expected whole numbers")
    if end - begin != math.prod(shape) * _CODES[dtype].itemsize:
        raise ValueError(f"{name} has {end - begin} bytes, which do not fit {shape} {dtype}")
    return _CODES[dtype], tuple(shape), begin


def write_safetensors(file: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write a safetensors file, one tensor at a time in the given order; deterministic."""
    codes = {dtype: code for code, dtype in _CODES.items()}
    header: dict[str, object] = {"__metadata__": dict(metadata or {})}
    offset = 0
    for name, tensor in tensors.items():
        end = offset + tensor.size
        header[name] = {"dtype": codes[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [offset, end]}
        offset = end
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    with file.open("wb") as stream, ThreadPoolExecutor(1) as writer:  # writes one piece while the next is read
        writing = writer.submit(stream.write, struct.pack("<Q", len(encoded)) + encoded)
        for tensor in tensors.values():
            for part in pieces(tensor):
                piece = contiguous(tensor.read(part)).reshape(-1).view(np.uint8).data
                writing.result()
                writing = writer.submit(stream.write, piece)
        writing.result()
