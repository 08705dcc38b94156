"""From one layout to another, tensor by tensor, nothing lost: `convert`, `pi0-convert`."""

from __future__ import annotations

import argparse
import dataclasses
import math
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import ml_dtypes
import numpy as np
from tqdm import tqdm

from convert.checkpoints import Checkpoint, open_checkpoint, write_checkpoint
from convert.layouts import WRITTEN
from convert.lora import merge_lora
from convert.sidecars import WRITERS, variants_of
from convert.tensors import CheckpointError, Index, Tensor, pieces, same_bytes
from pi0.command import output_path
from pi0.config import ModelConfig
from pi0.parameters import LayoutError, lora_of, parameters
from pi0.storage import local_path, new_folder
from pi0.variants import read_variant

DTYPES = {"keep": None, "float32": np.dtype(np.float32), "bfloat16": np.dtype(ml_dtypes.bfloat16)}
SMALL = 1_000_000_000  # parameters up to which a conversion is verified unless told otherwise


def convert(
    source: str | Path,
    target: str | Path,
    *,
    to: str,
    dtype: str = "keep",
    lora: str = "keep",
    ema: bool = True,
    step: int | None = None,
    action_dim: int | None = None,
    action_horizon: int | None = None,
    config: ModelConfig | None = None,
    asset_id: str | None = None,
    fresh: int | None = None,
    overwrite: bool = False,
    verify: bool | None = None,
    say: Callable[[str], None] = lambda _: None,
) -> Checkpoint:
    """Write the checkpoint `source`, of any layout, to the folder `target` in the layout `to`.

    `dtype` "keep", "float32" or "bfloat16" (rounded once); `lora` "keep" or "merge"; `ema`, `step` choose what is read
    of a training run, `config` replaces the model config found, `asset_id` chooses among norm stats; with the seed
    `fresh` an action expert or LoRA that the source has not is newly initialized. `action_dim` pads the projections of
    state and actions with zeros or cuts them; `action_horizon` only changes the config. Each change is told to `say`.
    With `verify` (default: for models up to a billion parameters) what was written is read again and compared byte by
    byte.

    Returns the opened result. Raises CheckpointError or LayoutError (which NaN and infinite values are too), and
    FileExistsError where `target` exists; then nothing is left behind.
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype is {dtype!r}; it must be {', '.join(DTYPES)}")
    target, target_dtype = local_path(target), DTYPES[dtype]
    read_dtype = target_dtype if lora == "keep" else None  # LoRA is merged as it is stored, and then rounded
    checkpoint = open_checkpoint(source, config, step=step, ema=ema, asset_id=asset_id, fresh=fresh, dtype=read_dtype)
    if checkpoint.fresh:
        say(f"newly initialized: {len(checkpoint.fresh)} parameters, {checkpoint.fresh[0]} to {checkpoint.fresh[-1]}")
    checkpoint = _changed(checkpoint, target_dtype, lora, action_dim, action_horizon, say)
    if to in WRITERS and variants_of(checkpoint.assets.model) is None:
        say(f"these sizes have no name in the layout {to}: its own config.json is not written")
    if verify is None:
        verify = sum(math.prod(t.shape) for t in checkpoint.ours.values()) <= SMALL
    size = sum(tensor.size for tensor in checkpoint.ours.values())
    with (
        new_folder(target, overwrite) as folder,
        tqdm(total=size, unit="B", unit_scale=True, desc="converting", delay=2) as bar,
    ):
        watched = {name: _watched(name, tensor, bar.update) for name, tensor in checkpoint.ours.items()}
        write_checkpoint(dataclasses.replace(checkpoint, ours=watched), folder, to)
        if verify:
            verify_equal(checkpoint, open_checkpoint(folder, checkpoint.assets.model))
    return open_checkpoint(target, checkpoint.assets.model)


def _changed(
    checkpoint: Checkpoint,
    dtype: np.dtype | None,
    lora: str,
    action_dim: int | None,
    action_horizon: int | None,
    say: Callable[[str], None],
) -> Checkpoint:
    """The checkpoint with what was asked for changed, lazily."""
    model, ours = checkpoint.assets.model, dict(checkpoint.ours)
    if lora == "merge":
        if not lora_of(model):
            raise LayoutError(f"{checkpoint.folder} has no LoRA to merge; leave --lora merge out")
        say(f"LoRA of {' and '.join(lora_of(model))} merged in float32")
        model, ours = merge_lora(model, ours)
    if action_dim is not None and action_dim != model.action_dim:
        how = "projections of state and actions " + ("padded with zeros" if action_dim > model.action_dim else "cut")
        if model.action_expert is None:
            how = "no parameter depends on it"
        say(f"action_dim {model.action_dim} -> {action_dim}: {how}")
        model, ours = _resized(model, ours, action_dim)
    if action_horizon is not None and action_horizon != model.action_horizon:
        say(f"action_horizon {model.action_horizon} -> {action_horizon}: no parameter depends on it")
        model = dataclasses.replace(model, action_horizon=action_horizon)
    if dtype is not None:
        ours = {name: tensor.cast(dtype) for name, tensor in ours.items()}
    assets = dataclasses.replace(checkpoint.assets, model=model)
    return dataclasses.replace(checkpoint, assets=assets, ours=ours)


def _resized(model: ModelConfig, ours: Mapping[str, Tensor], action_dim: int) -> tuple[ModelConfig, dict[str, Tensor]]:
    """The projections with another size of the axis `a`."""
    model = dataclasses.replace(model, action_dim=action_dim)
    result = {}
    for name, parameter in parameters(model).items():
        if "a" not in parameter.axes:
            result[name] = ours[name]
            continue
        array = ours[name].read(())
        axis = parameter.axes.index("a")
        kept = np.take(array, range(min(action_dim, array.shape[axis])), axis)
        widths = [(0, wanted - found) for wanted, found in zip(parameter.shape, kept.shape, strict=True)]
        result[name] = Tensor.of(np.pad(kept, widths))
    return model, result


def _watched(name: str, tensor: Tensor, progress: Callable[[int], object]) -> Tensor:
    """The tensor, refusing values that are not finite, and telling `progress` the bytes read."""

    def read(index: Index) -> np.ndarray:
        array = tensor.read(index)
        if not _finite(array):
            raise CheckpointError(f"{name} has NaN or infinite values; the source is damaged, or its training diverged")
        progress(array.nbytes)
        return array

    return dataclasses.replace(tensor, read=read)


def _finite(array: np.ndarray) -> bool:
    """Whether no value is NaN or infinite; bfloat16 by its bits, since its arithmetic is slow in NumPy."""
    if array.dtype == DTYPES["bfloat16"]:
        bits = array.view(np.uint16)
        return not any(((row & 0x7F80) == 0x7F80).any() for row in (bits if bits.ndim > 1 else [bits]))
    return bool(np.isfinite(array).all())


def verify_equal(a: Checkpoint, b: Checkpoint) -> None:
    """Raise CheckpointError that names the first parameter whose bytes differ between two checkpoints."""
    for name, tensor in a.ours.items():
        for part in pieces(tensor) if b.ours[name].sliced else [()]:
            if not same_bytes(tensor.read(part), b.ours[name].read(part)):
                raise CheckpointError(f"{b.folder}: {name} was not written as it was read from {a.folder}")


def main(arguments: list[str] | None = None) -> None:
    """The command `pi0-convert`."""
    parser = argparse.ArgumentParser(
        prog="pi0-convert",
        description="Convert a checkpoint to another layout. The layout of the source is found by its tensors' names; "
        "every tensor must fit, none may be missing, left over, NaN or infinite, and what was written is read again "
        "and compared byte by byte.",
        epilog="examples:\n"
        "  pi0-convert runs/demo exported --to pi0_torch                      a training run's newest checkpoint\n"
        "  pi0-convert checkpoints/pi0_base/params exported --to pi0_torch    an openpi checkpoint to PyTorch\n"
        "  pi0-convert lora_run/params exported --to pi0_torch --lora merge   a LoRA fine-tuning, merged\n"
        "  pi0-convert exported back --to openpi_jax                          and back, the same bytes\n"
        "  pi0-convert pt_224.npz start --to pi0_jax --model pi0 --fresh 0    PaliGemma and a new action expert",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("source", help="a checkpoint's or training run's folder, gs:// or hf://")
    parser.add_argument("target", type=output_path, help="the folder to write; it must not exist")
    parser.add_argument("--to", required=True, choices=WRITTEN, help="the layout to write")
    parser.add_argument("--dtype", choices=DTYPES, default="keep", help="of all tensors (default keep)")
    parser.add_argument("--lora", choices=("keep", "merge"), default="keep", help="what to do with LoRA (default keep)")
    parser.add_argument(
        "--ema", action=argparse.BooleanOptionalAction, default=True, help="of a run: the moving average, or not"
    )
    parser.add_argument("--step", type=int, help="of a run: this step (default: the newest)")
    parser.add_argument("--action-dim", type=int, metavar="N", help="pad or cut the action projections to N dimensions")
    parser.add_argument("--action-horizon", type=int, metavar="N", help="the horizon to write into the config")
    parser.add_argument(
        "--model",
        metavar="NAME",
        help="the model, where neither a config.json of ours nor the shapes say it (flat layouts do not tell heads "
        "from head dim): a variant of pi0.config, such as pi0 or pi05, or a JSON file of its fields",
    )
    parser.add_argument("--asset-id", metavar="ID", help="of several norm stats: those of this robot or dataset")
    parser.add_argument(
        "--fresh",
        type=int,
        metavar="SEED",
        help="newly initialize what --model has and the source has not: an action expert, or LoRA",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace the target folder if it exists")
    parser.add_argument(
        "--verify", action=argparse.BooleanOptionalAction, help="read and compare what was written (default: if small)"
    )
    args = parser.parse_args(arguments)
    options = {name: value for name, value in vars(args).items() if name not in ("source", "target", "model")}
    try:
        config = None if args.model is None else read_variant(args.model)
        result = convert(args.source, args.target, config=config, **options, say=print)
    except (ValueError, OSError) as error:
        print(f"pi0-convert: {error}", file=sys.stderr)
        sys.exit(1)
    count = sum(math.prod(t.shape) for t in result.ours.values())
    print(f"{args.target}: {result.assets.model.kind}, {count:,} parameters, layout {args.to}")
