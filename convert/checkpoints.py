"""Reading and writing checkpoints tensor by tensor: Orbax through tensorstore, and safetensors. Needs no jax.

Nothing is read before it is asked for, and nothing is written before the whole checkpoint has been found to fit.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import math
import os
import shutil
import struct
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

import ml_dtypes
import numpy as np
import tensorstore as ts

from convert.layouts import LAYOUTS, Layout, LayoutError, Tensor
from convert.layouts.layout import experts_of, infer_sizes
from pi0.assets import Assets
from pi0.config import GemmaConfig, ModelConfig, VisionConfig
from pi0.fetch import fetch


class CheckpointError(ValueError):
    """A file or folder that is no checkpoint, or a damaged one; the message names it."""


# A tensor larger than this many bytes is written slice by slice, and read chunk by chunk.
PIECE = 256 << 20
# As many bytes of a stored array are kept decoded while slices are read whose chunks hold more than the slice.
HELD = 5 << 29


def pieces(tensor: Tensor) -> list[tuple[slice, ...]]:
    """What to read one after the other to have all of a tensor: slices of its first axis where it is large."""
    if tensor.size <= PIECE or not tensor.sliced:
        return [()]
    rows = max(PIECE * tensor.shape[0] // tensor.size, 1)
    return [(slice(i, min(i + rows, tensor.shape[0])),) for i in range(0, tensor.shape[0], rows)]


# ---- Orbax ----------------------------------------------------------------------------------------------------------


def read_orbax(folder: Path) -> dict[str, Tensor]:
    """The arrays of an Orbax PyTree checkpoint, by their key paths joined with slashes.

    A root key `params` and leaves `value` (openpi's released and training styles) are left out of the names.
    Raises CheckpointError where the folder is not an Orbax checkpoint or lacks a file.
    """
    metadata, paths = orbax_paths(folder)
    spec = {
        "driver": "zarr3" if metadata.get("use_zarr3") else "zarr",
        # Where every part was stored, a missing one is damage; tensorstore would read it as zeros.
        "fill_missing_data_reads": not metadata.get("store_array_data_equal_to_fill_value"),
    }
    stored = {name: _open_array(folder, spec, ".".join(path)) for name, path in _strip(paths).items()}
    held = _Held()
    return {name: _array_tensor(future, folder, name, held) for name, future in stored.items()}


def orbax_paths(folder: Path) -> tuple[dict, list[tuple[str, ...]]]:
    """An Orbax checkpoint's metadata, and the key paths in it."""
    metadata_file = folder / "_METADATA"
    if not metadata_file.exists():
        raise CheckpointError(f"{folder} is not an Orbax checkpoint: it has no _METADATA file")
    try:
        metadata = json.loads(metadata_file.read_text())
        return metadata, [tuple(k["key"] for k in e["key_metadata"]) for e in metadata["tree_metadata"].values()]
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


def _array_tensor(future: ts.Future, folder: Path, name: str, held: _Held) -> Tensor:
    try:
        array = future.result()
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
            array[part].write(np.ascontiguousarray(tensor.read(part))).result()
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
    with file.open("wb") as stream:
        stream.write(struct.pack("<Q", len(encoded)) + encoded)
        for tensor in tensors.values():
            for part in pieces(tensor):
                stream.write(np.ascontiguousarray(tensor.read(part)).reshape(-1).view(np.uint8).data)


# ---- whole checkpoints ----------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """An opened checkpoint that has been found to fit its layout: our parameters, lazily, and what lies beside them."""

    folder: Path
    layout: Layout
    assets: Assets
    ours: dict[str, Tensor]

    def in_layout(self, layout: str) -> dict[str, Tensor]:
        """The tensors of another layout, read lazily."""
        return LAYOUTS[layout].from_ours(self.assets.model, self.ours)


@dataclasses.dataclass(frozen=True)
class Stored:
    """What a checkpoint's file or folder `weights` holds, by the names there; what goes with it lies in `beside`."""

    folder: Path
    weights: Path
    beside: Path
    tensors: dict[str, Tensor]


def read_tensors(source: str | Path, *, step: int | None = None, ema: bool = True) -> Stored:
    """The tensors in a checkpoint's files, whatever they are; see `open_checkpoint`. Raises CheckpointError."""
    folder = _step_folder(fetch(source), step)
    if not ema:
        return Stored(folder, folder / "train_state", folder, _trained(folder))
    file = folder / "model.safetensors"
    if file.exists():
        return Stored(folder, file, folder, read_safetensors(file))
    for params, beside in ((folder / "params", folder), (folder, folder.parent)):
        if (params / "_METADATA").exists():
            return Stored(folder, params, beside, read_orbax(params))
    raise CheckpointError(f"{folder} holds neither model.safetensors nor an Orbax params folder")


def open_checkpoint(
    source: str | Path, config: ModelConfig | None = None, *, step: int | None = None, ema: bool = True
) -> Checkpoint:
    """Open a checkpoint of any layout, checked against its table; weights are not read yet.

    `source`: a folder, `gs://` or `hf://`; a folder that holds an Orbax `params` folder, that folder itself, one with
    `model.safetensors`, or a training run's (its newest step, or `step`; without `ema`, the parameters that are
    trained and not their moving average).

    The layout follows from the names of the tensors, the model config from `config.json`; without one, sizes follow
    from the shapes, and what shapes do not say (horizon, text length, cameras) is that of the released models.
    `config` overrides both. Raises CheckpointError and LayoutError that name what is wrong.
    """
    stored = read_tensors(source, step=step, ema=ema)
    folder, tensors = stored.folder, stored.tensors
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    layout, kind, lora = detect(shapes)
    for name, tensor in tensors.items():
        if not np.issubdtype(tensor.dtype, np.floating) and tensor.dtype != ml_dtypes.bfloat16:
            raise LayoutError(f"{folder}: {name} has dtype {tensor.dtype}; expected a floating-point one")
    assets = Assets.load(stored.beside)
    if config is not None:
        assets = Assets(config) if assets is None else dataclasses.replace(assets, model=config)
    elif assets is None:
        assets = Assets(infer_config(layout, kind, shapes, lora))
    return Checkpoint(folder, layout, assets, layout.to_ours(assets.model, tensors))


def _step_folder(folder: Path, step: int | None) -> Path:
    """The checkpoint of a training run's folder; any other folder as it is."""
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is a file; give the checkpoint's folder")
    steps = sorted(int(f.name) for f in (folder / "checkpoints").glob("*") if f.name.isdigit())
    if step is not None and step not in steps:
        raise CheckpointError(f"{folder} has no checkpoint of step {step}; it has {steps or 'none'}")
    if not steps:
        return folder
    return folder / "checkpoints" / str(steps[-1] if step is None else step)


def _trained(folder: Path) -> dict[str, Tensor]:
    """The parameters in a checkpoint's training state."""
    if not (folder / "train_state").exists():
        raise CheckpointError(f"{folder} has no train_state; only a training run's checkpoint has two sets of weights")
    state = read_orbax(folder / "train_state")
    return {name.removeprefix("params/"): tensor for name, tensor in state.items() if name.startswith("params/")}


def detect(shapes: Mapping[str, tuple[int, ...]]) -> tuple[Layout, str, tuple[str, ...]]:
    """The layout, the kind of model and its experts with LoRA whose names fit `shapes` best.

    Raises LayoutError where none fits at all.
    """
    best, most = None, 0.0
    for layout in LAYOUTS.values():
        unused = {_stem(rule.theirs) for rule in layout.unused}
        found = {_stem(layout.spell(name)) for name in shapes} - unused
        for kind, lora in ((k, lora) for k in layout.kinds for lora in _lora_choices(layout, k)):
            names = {_stem(rule.theirs.replace("{l}", "0")) for rule in layout.rules_for(kind, lora)}
            score = len(names & found) / len(names | found)
            if score > most:
                best, most = (layout, kind, lora), score
    if best is None:
        raise LayoutError(f"no known layout has tensors like {sorted(shapes)[:5]}; known are {', '.join(LAYOUTS)}")
    return best


def _lora_choices(layout: Layout, kind: str) -> Iterator[tuple[str, ...]]:
    """The experts that may have low-rank updates, together: none first, then all of them."""
    yield ()
    if layout.has_lora:
        for count in range(len(experts_of(kind)), 0, -1):
            yield from itertools.combinations(experts_of(kind), count)


def _stem(name: str) -> str:
    """The name with its layer number, if any, left open."""
    return ".".join("#" if part.isdigit() else part for part in name.split("."))


def infer_config(
    layout: Layout, kind: str, shapes: Mapping[str, tuple[int, ...]], lora: tuple[str, ...] = ()
) -> ModelConfig:
    """The model config that the shapes of a checkpoint say. Raises LayoutError where they do not say a size.

    LoRA's alpha is no shape: it is taken to be the rank, as in all of openpi's variants.
    """
    sizes = infer_sizes(layout.rules_for(kind, lora), {layout.spell(name): shape for name, shape in shapes.items()})
    vision, released = sizes["vision"], ModelConfig.variant(kind)

    def gemma(scope: str) -> GemmaConfig:
        s = sizes[scope]
        if not {"n", "k", "h"} <= s.keys():
            raise LayoutError(
                f"the layout {layout.name} does not tell heads from head dim; a config.json of ours is "
                f"missing beside the weights: pass --model (config= in Python), for instance --model {kind}"
            )
        return GemmaConfig(s["d"], s["l"], s["m"], s["n"], s["k"], s["h"], s.get("r"))

    experts = {name: gemma(name) for name in experts_of(kind)}
    side = math.isqrt(vision["s"])
    if side**2 != vision["s"]:
        (name,) = (r.theirs for r in layout.rules_for(kind) if r.ours == "vision.position_embedding")
        raise LayoutError(f"{name} holds {vision['s']} positions, which are not a square image's; pass config=")
    resolution = (side * vision["p"], side * vision["p"])
    return dataclasses.replace(
        released,
        vision=VisionConfig(vision["d"], vision["l"], vision["m"], vision["n"], vision["p"]),
        paligemma=experts["paligemma"],
        action_expert=experts.get("action_expert"),
        vocab_size=sizes["paligemma"]["v"],
        image_resolution=resolution,
        action_dim=sizes["projections"]["a"] if "projections" in sizes else released.action_dim,
    )


@contextlib.contextmanager
def new_folder(target: Path, overwrite: bool = False) -> Iterator[Path]:
    """A temporary folder that becomes `target` when the block ends well, and vanishes when it does not.

    Raises FileExistsError where `target` exists and is not to be overwritten.
    """
    if target.exists() and not overwrite:
        raise FileExistsError(f"{target} exists already; choose another name or pass --overwrite")
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        yield temporary
        temporary.chmod(0o777 & ~_umask())
        if target.exists():
            shutil.rmtree(target)
        os.replace(temporary, target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def write_checkpoint(checkpoint: Checkpoint, folder: Path, layout: str) -> None:
    """Write a checkpoint into `folder` in another layout, with its config, norm stats and tokenizer reference."""
    tensors = checkpoint.in_layout(layout)
    if LAYOUTS[layout].format == "safetensors":
        write_safetensors(folder / "model.safetensors", tensors, {"format": "pt"})
        checkpoint.assets.save(folder / "assets", config_folder=folder)
    else:
        write_orbax(folder / "params", tensors, LAYOUTS[layout].root)
        checkpoint.assets.save(folder / "assets")
