"""The files that weights are kept in, tensor by tensor: Orbax through tensorstore, and safetensors. Needs no jax.

Nothing is read before it is asked for, and large tensors are written in pieces.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import struct
import zipfile
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import BinaryIO

import ml_dtypes
import numpy as np
import tensorstore as ts

from convert.layouts import Tensor


class CheckpointError(ValueError):
    """A file or folder that is no checkpoint, or a damaged one; the message names it."""


# A tensor larger than this many bytes is written slice by slice, and read chunk by chunk.
PIECE = 64 << 20
# As many bytes of a stored array are kept decoded while slices are read whose chunks hold more than the slice.
HELD = 5 << 29


def pieces(tensor: Tensor) -> list[tuple[slice, ...]]:
    """What to read one after the other to have all of a tensor: slices of its first axis where it is large."""
    if tensor.size <= PIECE or not tensor.sliced:
        return [()]
    rows = max(PIECE * tensor.shape[0] // tensor.size, 1)
    return [(slice(i, min(i + rows, tensor.shape[0])),) for i in range(0, tensor.shape[0], rows)]


def _contiguous(array: np.ndarray, side: int = 64) -> np.ndarray:
    """The array in C order. Transposed matrices are copied in squares that fit the cache, which NumPy does not."""
    if array.flags.c_contiguous or array.ndim < 2 or array.size < PIECE >> 8 or array.strides[-1] == array.itemsize:
        return np.ascontiguousarray(array)
    out = np.empty(array.shape, array.dtype)
    bits = np.dtype(f"u{array.itemsize}")  # NumPy copies bfloat16 by a call for each value
    source, target = array.view(bits), out.view(bits)
    rows, columns = (range(0, size, side) for size in array.shape[-2:])
    for index in np.ndindex(array.shape[:-2]):
        for i, j in itertools.product(rows, columns):
            square = (*index, slice(i, i + side), slice(j, j + side))
            target[square] = source[square]
    return out


# ---- Orbax ----------------------------------------------------------------------------------------------------------


def read_orbax(folder: Path, dtype: np.dtype | None = None) -> dict[str, Tensor]:
    """The arrays of an Orbax PyTree checkpoint, by their key paths joined with slashes, as `dtype` where it is given.

    A root key `params` and leaves `value` (openpi's released and training styles) are left out of the names. Raises
    CheckpointError where the folder is not an Orbax checkpoint or lacks a file.
    """
    metadata, paths = orbax_paths(folder)
    spec = {
        "driver": "zarr3" if metadata.get("use_zarr3") else "zarr",
        # Where every part was stored, a missing one is damage; tensorstore would read it as zeros.
        "fill_missing_data_reads": not metadata.get("store_array_data_equal_to_fill_value"),
    }
    stored = {name: _open_array(folder, spec, ".".join(path)) for name, path in _strip(paths).items()}
    held = _Held()
    return {name: _array_tensor(future, folder, name, held, dtype) for name, future in stored.items()}


def orbax_paths(folder: Path) -> tuple[dict, list[tuple[str, ...]]]:
    """An Orbax checkpoint's metadata, and the key paths in it."""
    metadata_file = folder / "_METADATA"
    if not metadata_file.exists():
        raise CheckpointError(f"{folder} is not an Orbax checkpoint: it has no _METADATA file")
    try:
        metadata = json.loads(metadata_file.read_text())
        entries = metadata["tree_metadata"].values()
        # Empty nodes, such as those of an optimizer's state, are listed too; nothing is stored for them.
        entries = [e for e in entries if not e["value_metadata"].get("skip_deserialize")]
        return metadata, [tuple(k["key"] for k in e["key_metadata"]) for e in entries]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{metadata_file} cannot be read ({error!r}); is the file complete?") from error


def _strip(paths: list[tuple[str, ...]]) -> dict[str, tuple[str, ...]]:
    names = {path: path for path in paths}
    if paths and all(path[0] == "params" for path in paths):
        names = {path: name[1:] for path, name in names.items()}
    if paths and all(path[-1] == "value" for path in paths):
        names = {path: name[:-1] for path, name in names.items()}
    return {"/".join(name): path for path, name in names.items()}


def _kvstore(folder: Path, key: str) -> dict:
    if (folder / "manifest.ocdbt").exists():
        return {"driver": "ocdbt", "base": f"file://{folder.resolve()}/", "path": f"{key}/"}
    return {"driver": "file", "path": f"{(folder / key).resolve()}/"}


def _open_array(folder: Path, spec: dict, key: str) -> ts.Future:
    return ts.open({**spec, "kvstore": _kvstore(folder, key)}, read=True, open=True)


def _decode(view: ts.TensorStore) -> np.ndarray:
    """All of an array or a view. Large ones chunk by chunk, since a chunk takes twice its size while it is decoded."""
    if view.size * view.dtype.numpy_dtype.itemsize <= PIECE:
        return np.asarray(view.read().result())
    out = np.empty(view.shape, view.dtype.numpy_dtype)
    target = ts.array(out, copy=False)[ts.d[:].translate_to[view.origin]]
    for region in _grid(view.shape, _chunk(view), view.origin):
        target[region].write(view[region]).result()
    return out


def _chunk(view: ts.TensorStore) -> tuple[int, ...]:
    """The shape of what can only be decoded together."""
    shape = view.chunk_layout.read_chunk.shape or view.shape
    return tuple(chunk or size for chunk, size in zip(shape, view.shape, strict=True))


def _grid(
    shape: tuple[int, ...], chunk: tuple[int, ...], origin: tuple[int, ...] | None = None
) -> Iterator[tuple[slice, ...]]:
    """The parts of an array, or of the view of one that begins at `origin`, that lie in one chunk each."""
    ranges = []
    for start, length, size in zip(origin or (0,) * len(shape), shape, chunk, strict=True):
        edges = range(start - start % size, start + length, size)
        ranges.append([slice(max(edge, start), min(edge + size, start + length)) for edge in edges])
    return itertools.product(*ranges)


@dataclasses.dataclass
class _Held:
    """The rows that were decoded last, of one of a checkpoint's arrays.

    A chunk can only be decoded whole, and often holds all layers; this decodes it once, not once for each layer.
    """

    of: object = None
    start: int = 0
    rows: np.ndarray | None = None

    def read(self, array: ts.TensorStore, index: tuple[int | slice, ...]) -> np.ndarray:
        """`array[index]`."""
        if not array.rank or not index:
            return _decode(array)
        count, per_chunk = array.shape[0], _chunk(array)[0]
        row = index[0]
        start, stop = (row, row + 1) if isinstance(row, int) else row.indices(count)[:2]
        if start % per_chunk == 0 and (stop % per_chunk == 0 or stop == count):
            return _decode(array[index])
        itemsize = array.dtype.numpy_dtype.itemsize
        whole = array.size * itemsize <= HELD
        rest, within = ((), index[1:]) if whole else (index[1:], ())
        of = (id(array), rest)
        if self.rows is None or self.of != of or not self.start <= start <= stop <= self.start + len(self.rows):
            self.rows = None
            fitting = max(HELD // (array[(slice(0, 1), *rest)].size * itemsize), 1)
            fitting -= fitting % per_chunk if fitting > per_chunk else 0
            begin = start - start % per_chunk if fitting >= per_chunk else start
            end = min(max(begin + fitting, stop), count)
            self.of, self.start, self.rows = of, begin, _decode(array[(slice(begin, end), *rest)])
            self.rows.flags.writeable = False
        chosen = start - self.start if isinstance(row, int) else slice(start - self.start, stop - self.start)
        return self.rows[(chosen, *within)]  # a view: keeping it would keep all of these rows in memory


def _array_tensor(future: ts.Future, folder: Path, name: str, held: _Held, dtype: np.dtype | None) -> Tensor:
    try:
        array = future.result()
        if dtype is not None and array.dtype.numpy_dtype != dtype:
            array = ts.cast(array, ts.dtype(dtype.name))
    except Exception as error:  # tensorstore raises bare ValueError or OSError by cause
        raise CheckpointError(f"{folder}: the array {name} cannot be opened: {error}") from error

    def read(index: tuple[int | slice, ...]) -> np.ndarray:
        try:
            return held.read(array, index)
        except Exception as error:
            raise CheckpointError(f"{folder}: the array {name} cannot be read: {error}") from error

    return Tensor(tuple(array.shape), array.dtype.numpy_dtype, read)


def write_orbax(
    folder: Path,
    tensors: Mapping[str, Tensor],
    root: tuple[str, ...] = (),
    chunks: Mapping[str, tuple[int, ...]] | None = None,
) -> None:
    """Write an Orbax PyTree checkpoint that Orbax and `read_orbax` restore; names are key paths with slashes.

    An array is stored in one chunk, a large one in several slices of its first axis, or in the `chunks` of these
    shapes, which need tensors that take any index.
    """
    folder.mkdir(parents=True, exist_ok=True)
    context, tree = ts.Context(), {}
    for name, tensor in tensors.items():
        path, parts = (*root, *name.split("/")), pieces(tensor)
        chunk = (parts[0][0].stop, *tensor.shape[1:]) if parts[0] else tensor.shape
        if chunks is not None:
            chunk, parts = chunks[name], list(_grid(tensor.shape, chunks[name]))
        spec = {
            "driver": "zarr",
            "kvstore": {"driver": "ocdbt", "base": f"file://{folder.resolve()}/", "path": f"{'.'.join(path)}/"},
            "metadata": {"compressor": {"id": "zstd", "level": 1}, "chunks": [max(n, 1) for n in chunk]},
        }
        array = ts.open(
            spec, dtype=ts.dtype(tensor.dtype.name), shape=tensor.shape, create=True, context=context
        ).result()
        for part in parts:
            array[part].write(_contiguous(tensor.read(part))).result()
        tree[str(path)] = {
            "key_metadata": [{"key": key, "key_type": 2} for key in path],
            "value_metadata": {"value_type": "np.ndarray", "skip_deserialize": False},
        }
    metadata = {
        "tree_metadata": tree,
        "use_zarr3": False,
        "store_array_data_equal_to_fill_value": True,
        "custom_metadata": None,
    }
    (folder / "_METADATA").write_text(json.dumps(metadata))
    handler = "orbax.checkpoint._src.handlers.pytree_checkpoint_handler.PyTreeCheckpointHandler"
    (folder / "_CHECKPOINT_METADATA").write_text(json.dumps({"item_handlers": handler, "metrics": {}}))


# ---- safetensors: read and written here, since its NumPy library neither streams nor knows bfloat16 everywhere -------

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
    """The tensors of a safetensors file, memory-mapped. Raises CheckpointError for a damaged file."""
    size = file.stat().st_size
    try:
        with file.open("rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            header = json.loads(stream.read(min(length, size)), object_pairs_hook=_no_duplicates)
        header.pop("__metadata__", None)
        entries = {name: _entry(name, **entry) for name, entry in header.items()}
    except (struct.error, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{file} is not a safetensors file, or is damaged: {error}") from error
    end = 8 + length
    for begin, size_of, name in sorted((b, math.prod(s) * d.itemsize, n) for n, (d, s, b) in entries.items()):
        if 8 + length + begin != end:
            raise CheckpointError(f"{file} is damaged: {name} does not begin where the tensor before it ends")
        end += size_of
    if size != end:
        raise CheckpointError(f"{file} has {size} bytes, its header says {end}; is the file truncated?")
    return {name: _mapped(file, *entry[:2], 8 + length + entry[2]) for name, entry in entries.items()}


def read_sharded(index: Path) -> dict[str, Tensor]:
    """The tensors of the safetensors files that a `model.safetensors.index.json` lists. Raises CheckpointError."""
    try:
        listed: dict[str, str] = json.loads(index.read_text())["weight_map"]
        shards = {name: read_safetensors(index.parent / name) for name in sorted(set(listed.values()))}
    except (ValueError, KeyError, TypeError, AttributeError, FileNotFoundError) as error:
        raise CheckpointError(f"{index} cannot be used: {error!r}; are all of its files there?") from error
    found = [(name, shard) for shard, tensors in shards.items() for name in tensors]
    wrong = sorted({name for name, _ in set(found) ^ set(listed.items())})
    if wrong:
        raise CheckpointError(f"{index} and its files do not agree on {wrong[:5]}; are they of one checkpoint?")
    return {name: shards[shard][name] for name, shard in found}


def _no_duplicates(pairs: list[tuple[str, object]]) -> dict[str, object]:
    names = [name for name, _ in pairs]
    if len(set(names)) < len(names):
        raise ValueError(f"duplicate entries {sorted({n for n in names if names.count(n) > 1})}")
    return dict(pairs)


def _entry(name: str, dtype: str, shape: list[int], data_offsets: list[int]) -> tuple[np.dtype, tuple[int, ...], int]:
    """Dtype, shape and first byte of a tensor. Raises ValueError or TypeError for what the format does not know."""
    if dtype not in _CODES:
        raise ValueError(f"{name} has dtype {dtype}; known are {', '.join(_CODES)}")
    begin, end = data_offsets
    if not all(isinstance(n, int) and n >= 0 for n in (*shape, begin)):
        raise ValueError(f"{name} has shape {shape} and offsets {data_offsets}; expected whole numbers")
    if end - begin != math.prod(shape) * _CODES[dtype].itemsize:
        raise ValueError(f"{name} takes {end - begin} bytes, but {shape} {dtype} needs others")
    return _CODES[dtype], tuple(shape), begin


def _mapped(file: Path, dtype: np.dtype, shape: tuple[int, ...], start: int) -> Tensor:
    def read(index: tuple[int | slice, ...]) -> np.ndarray:
        if not math.prod(shape):
            return np.empty(shape, dtype)[index]
        return np.memmap(file, dtype, "r", start, shape)[index]

    return Tensor(shape, dtype, read)


def write_safetensors(file: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write a safetensors file, one tensor at a time, in the order given; the same input gives the same bytes."""
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
                piece = _contiguous(tensor.read(part)).reshape(-1).view(np.uint8).data
                writing.result()
                writing = writer.submit(stream.write, piece)
        writing.result()


# ---- npz: big_vision's, read only -----------------------------------------------------------------------------------


def read_npz(file: Path) -> dict[str, Tensor]:
    """The arrays of an npz file, memory-mapped where they are not compressed. Raises CheckpointError."""
    try:
        with zipfile.ZipFile(file) as archive, file.open("rb") as stream:
            members = [m for m in archive.infolist() if m.filename.endswith(".npy")]
            return {m.filename.removesuffix(".npy"): _member(file, archive, stream, m) for m in members}
    except (zipfile.BadZipFile, ValueError, struct.error) as error:
        raise CheckpointError(f"{file} is not an npz file, or is damaged: {error}") from error


def _member(file: Path, archive: zipfile.ZipFile, stream: BinaryIO, member: zipfile.ZipInfo) -> Tensor:
    with archive.open(member) as header:
        version = np.lib.format.read_magic(header)
        read_header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, fortran_order, dtype = read_header(header)
        start = header.tell()
    if dtype == np.dtype("V2"):  # how NumPy stores bfloat16
        dtype = np.dtype(ml_dtypes.bfloat16)
    if dtype.hasobject or fortran_order:
        raise ValueError(f"{member.filename} holds {dtype}, fortran_order={fortran_order}; expected plain C arrays")
    if member.compress_type != zipfile.ZIP_STORED:

        def read(index: tuple[int | slice, ...]) -> np.ndarray:
            return np.load(file)[member.filename.removesuffix(".npy")].view(dtype)[index]

        return Tensor(shape, dtype, read)
    stream.seek(member.header_offset + 26)
    name_length, extra_length = struct.unpack("<HH", stream.read(4))
    start += member.header_offset + 30 + name_length + extra_length
    if start + math.prod(shape) * dtype.itemsize > file.stat().st_size:
        raise ValueError(f"{member.filename} is truncated")
    return _mapped(file, dtype, shape, start)
