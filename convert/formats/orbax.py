"""Read and write Orbax checkpoints through tensorstore, without JAX, lazily and in pieces."""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import tensorstore as ts

from convert.tensors import PIECE, CheckpointError, Index, Tensor, contiguous, pieces
from pi0.reading import read_json, require_stored
from pi0.storage import below, is_bucket, list_files, requests, require_files_below

# Bytes of decoded rows to cache while slices smaller than a chunk are read.
CACHED = 5 << 29
# The tree of a checkpoint's chunks is kept, which is read anew for each array otherwise: of a bucket by many requests.
CONTEXT = {"cache_pool#ocdbt": {"total_bytes_limit": 64 << 20}}


def read_orbax(folder: Path, dtype: np.dtype | None = None) -> dict[str, Tensor]:
    """The arrays of an Orbax PyTree checkpoint by key path, joined with slashes; converted to `dtype` if given.

    A common root key `params` and common leaf keys `value` (openpi's released and training styles) are dropped from
    the names. Raises CheckpointError where the folder is not an Orbax checkpoint or lacks a file.
    """
    metadata, paths = orbax_paths(folder)
    spec = {
        "driver": "zarr3" if metadata.get("use_zarr3") else "zarr",
        # Tensorstore reads missing chunks as zeros; where all chunks are stored, a missing one is damage.
        "fill_missing_data_reads": not metadata.get("store_array_data_equal_to_fill_value"),
    }
    try:
        if not is_bucket(folder):
            require_files_below(folder)
        keys = {name: ".".join(path) for name, path in _strip(paths).items()}
        for key in keys.values():
            below(folder, key)
    except ValueError as error:
        raise CheckpointError(f"{folder}: {error}") from error
    context = ts.Context(CONTEXT)
    opened = {name: _open_array(folder, spec, key, context) for name, key in keys.items()}
    cache = _RowCache()
    tensors = {name: _array_tensor(future, folder, name, cache, dtype) for name, future in opened.items()}
    stored = sum(file.size for file in list_files(folder).values())
    require_stored(str(folder), sum(t.size for t in tensors.values()), stored, CheckpointError)
    return tensors


def orbax_paths(folder: Path) -> tuple[dict, list[tuple[str, ...]]]:
    """The metadata of an Orbax checkpoint, and the key paths of its arrays.

    Raises CheckpointError for a folder without readable metadata.
    """
    metadata_file = folder / "_METADATA"
    if not metadata_file.exists():
        raise CheckpointError(f"{folder} is not an Orbax checkpoint: it has no _METADATA file")
    metadata = read_json(metadata_file, error=CheckpointError)
    try:
        entries = metadata["tree_metadata"].values()
        # Empty nodes, such as those of optimizer states, are listed without stored data.
        entries = [e for e in entries if not e["value_metadata"].get("skip_deserialize")]
        paths = [tuple(k["key"] for k in e["key_metadata"]) for e in entries]
        if not all(path and all(isinstance(key, str) for key in path) for path in paths):
            raise ValueError("key_metadata without keys, or with keys that are no text")
        return metadata, paths
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
        return _ocdbt(folder, key)
    return _base(folder / key)


def _base(folder: Path) -> dict:
    """The specification of a folder's files, straight from its bucket where it is in one. It is no URL, in which #, ?,
    % and | have a meaning. Raises CheckpointError for a path that tensorstore takes for another.
    """
    if is_bucket(folder):
        scheme, _, address = str(folder).partition("://")
        bucket, _, key = address.partition("/")
        driver = {"driver": "gcs"} if scheme == "gs" else {"driver": scheme} | _s3_place()
        return driver | {"bucket": bucket, "path": f"{key}/"}
    path = folder.resolve()
    if "\\" in str(path):
        raise CheckpointError(f"{path} has a backslash in its path, which tensorstore takes for a slash; rename it")
    return {"driver": "file", "path": f"{path}/"}


def _s3_place() -> dict[str, str]:
    """Where S3 is, if not at Amazon, as AWS's own clients take it from the environment; tensorstore does not."""
    names = {
        "endpoint": ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL"),
        "aws_region": ("AWS_REGION", "AWS_DEFAULT_REGION"),
    }
    found = {field: next(filter(None, map(os.environ.get, own)), None) for field, own in names.items()}
    return {field: value for field, value in found.items() if value}


def _ocdbt(folder: Path, key: str) -> dict:
    return {"driver": "ocdbt", "base": _base(folder), "path": f"{key}/", "cache_pool": "cache_pool#ocdbt"}


def _open_array(folder: Path, spec: dict, key: str, context: ts.Context) -> ts.Future:
    return ts.open({**spec, "kvstore": _kvstore(folder, key)}, read=True, open=True, context=context)


def _decode(view: ts.TensorStore) -> np.ndarray:
    """Read an array or a view; large ones chunk by chunk, since decoding takes twice the memory of a chunk."""
    if view.size * view.dtype.numpy_dtype.itemsize <= PIECE:
        return np.asarray(view.read().result())
    out = np.empty(view.shape, view.dtype.numpy_dtype)
    target = ts.array(out, copy=False)[ts.d[:].translate_to[view.origin]]
    for region in _grid(view.shape, _chunk(view), view.origin):
        target[region].write(view[region]).result()
    return out


def _chunk(view: ts.TensorStore) -> tuple[int, ...]:
    """The chunk shape."""
    shape = view.chunk_layout.read_chunk.shape or view.shape
    return tuple(chunk or size for chunk, size in zip(shape, view.shape, strict=True))


def _grid(
    shape: tuple[int, ...], chunk: tuple[int, ...], origin: tuple[int, ...] | None = None
) -> Iterator[tuple[slice, ...]]:
    """The index of each chunk's part of an array, or of a view that starts at `origin`."""
    ranges = []
    for start, length, size in zip(origin or (0,) * len(shape), shape, chunk, strict=True):
        edges = range(start - start % size, start + length, size)
        ranges.append([slice(max(edge, start), min(edge + size, start + length)) for edge in edges])
    return itertools.product(*ranges)


@dataclasses.dataclass
class _RowCache:
    """The most recently decoded rows of one array of a checkpoint.

    A chunk can only be decoded whole and often holds all layers; this decodes it once instead of once per layer.
    """

    of: object = None
    start: int = 0
    rows: np.ndarray | None = None

    def read(self, array: ts.TensorStore, index: Index) -> np.ndarray:
        """`array[index]`."""
        if not array.rank or not index:
            return _decode(array)
        if len(index) == array.rank and all(isinstance(i, slice) for i in index):  # a box, which is read once
            return _decode(array[index])
        count, per_chunk = array.shape[0], _chunk(array)[0]
        row = index[0]
        start, stop = (row, row + 1) if isinstance(row, int) else row.indices(count)[:2]
        if start % per_chunk == 0 and (stop % per_chunk == 0 or stop == count):
            return _decode(array[index])
        itemsize = array.dtype.numpy_dtype.itemsize
        whole = array.size * itemsize <= CACHED
        rest, within = ((), index[1:]) if whole else (index[1:], ())
        of = (id(array), rest)
        if self.rows is None or self.of != of or not self.start <= start <= stop <= self.start + len(self.rows):
            self.rows = None
            fitting = max(CACHED // (array[(slice(0, 1), *rest)].size * itemsize), 1)
            fitting -= fitting % per_chunk if fitting > per_chunk else 0
            begin = start - start % per_chunk if fitting >= per_chunk else start
            end = min(max(begin + fitting, stop), count)
            self.of, self.start, self.rows = of, begin, _decode(array[(slice(begin, end), *rest)])
            self.rows.flags.writeable = False
        chosen = start - self.start if isinstance(row, int) else slice(start - self.start, stop - self.start)
        return self.rows[(chosen, *within)]  # a view, which keeps all of these rows in memory


def _array_tensor(future: ts.Future, folder: Path, name: str, cache: _RowCache, dtype: np.dtype | None) -> Tensor:
    try:
        with requests(f"{folder}: the array {name} cannot be opened"):
            array = future.result()
        if dtype is not None and array.dtype.numpy_dtype != dtype:
            array = ts.cast(array, ts.dtype(dtype.name))
        if any(chunk > 2 * max(size, 1) for chunk, size in zip(_chunk(array), array.shape, strict=True)):
            raise ValueError(f"its chunks {list(_chunk(array))} are larger than itself, {list(array.shape)}")
    except ConnectionError:
        raise
    except Exception as error:  # tensorstore raises bare ValueError or OSError by cause
        raise CheckpointError(f"{folder}: the array {name} cannot be opened: {error}") from error

    def read(index: Index) -> np.ndarray:
        try:
            with requests(f"{folder}: the array {name} cannot be read"):
                return cache.read(array, index)
        except ConnectionError:
            raise
        except Exception as error:
            raise CheckpointError(f"{folder}: the array {name} cannot be read: {error}") from error

    return Tensor(tuple(array.shape), array.dtype.numpy_dtype, read, anyhow=True)


def write_orbax(
    folder: Path,
    tensors: Mapping[str, Tensor],
    root: tuple[str, ...] = (),
    chunks: Mapping[str, tuple[int, ...]] | None = None,
    empty: Sequence[str] = (),
) -> None:
    """Write an Orbax PyTree checkpoint; names are key paths joined with slashes, below `root`.

    A key of digits is a place in a sequence, of which places without arrays are listed in `empty`. Arrays are stored in
    one chunk, large ones in slices of the first axis, or in `chunks` of the given shapes, which needs tensors that
    support any index.
    """
    folder.mkdir(parents=True, exist_ok=True)
    context = ts.Context(CONTEXT)
    tree: dict[tuple[str, ...], dict[str, object]] = {}
    for name, tensor in tensors.items():
        path, parts = (*root, *name.split("/")), pieces(tensor)
        chunk = (parts[0][0].stop, *tensor.shape[1:]) if parts[0] else tensor.shape
        if chunks is not None:
            chunk, parts = chunks[name], list(_grid(tensor.shape, chunks[name]))
        spec = {
            "driver": "zarr",
            "kvstore": _ocdbt(folder, ".".join(path)),
            "metadata": {"compressor": {"id": "zstd", "level": 1}, "chunks": [max(n, 1) for n in chunk]},
        }
        array = ts.open(
            spec, dtype=ts.dtype(tensor.dtype.name), shape=tensor.shape, create=True, context=context
        ).result()
        for part in parts:
            array[part].write(contiguous(tensor.read(part))).result()
        tree[path] = {"value_type": "np.ndarray", "skip_deserialize": False}
    tree |= {(*root, *name.split("/")): {"value_type": "None", "skip_deserialize": True} for name in empty}
    entries = {
        str(path): {
            "key_metadata": [{"key": key, "key_type": 1 if key.isdigit() else 2} for key in path],
            "value_metadata": value,
        }
        for path, value in (sorted(tree.items()) if empty else tree.items())  # sequences in order
    }
    metadata = {
        "tree_metadata": entries,
        "use_zarr3": False,
        "store_array_data_equal_to_fill_value": True,
        "custom_metadata": None,
    }
    (folder / "_METADATA").write_text(json.dumps(metadata), encoding="utf-8")
    handler = "orbax.checkpoint._src.handlers.pytree_checkpoint_handler.PyTreeCheckpointHandler"
    (folder / "_CHECKPOINT_METADATA").write_text(
        json.dumps({"item_handlers": handler, "metrics": {}}), encoding="utf-8"
    )
