"""Lossless conversion of checkpoints between layouts: `convert`, `pi0-convert`."""

from __future__ import annotations

import argparse
import dataclasses
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from tqdm import tqdm

from convert.checkpoints import Checkpoint, open_checkpoint, write_checkpoint
from convert.checksums import CHECKSUMS, is_sidecar, sign
from convert.layouts.layout import Layout
from convert.layouts.registry import WRITABLE, find_layout
from convert.lora import merge_lora
from convert.runs import convert_run
from convert.sidecars import PARITY
from convert.tensors import CheckpointError, Index, Tensor, pieces, same_bytes
from pi0.command import add_checkpoint, add_head_dims, add_preset, exit_on_error, make_parser, output_path
from pi0.config import ModelConfig, canonical_dtype
from pi0.parameters import LayoutError, lora_of, parameters
from pi0.presets import describe_assumed
from pi0.reading import naming
from pi0.storage import SCHEMES, as_path, new_folder, require_replaceable
from pi0.variants import read_variant

DTYPES = {"keep": None, "float32": np.dtype(np.float32), "bfloat16": np.dtype(ml_dtypes.bfloat16)}
# What a folder that is replaced has at least one file of, and what else it may have.
MARKER = ("model.safetensors", "model.safetensors.index.json", "params")
FILES = ("model-*.safetensors", "config.json", "assets", "policy_p*processor*", CHECKSUMS, PARITY)
OF_RUNS = ("source", "target", "to", "step", "overwrite", "with_training_state")  # options of converting a run
VERIFIED_SIZE = 1_000_000_000  # parameters up to which conversions are verified by default


def convert(
    source: str | Path,
    target: str | Path,
    *,
    to: str | Layout,
    layout: str | Layout | None = None,
    dtype: Any = "keep",
    lora: str = "keep",
    ema: bool = True,
    step: int | None = None,
    action_dim: int | None = None,
    action_horizon: int | None = None,
    config: ModelConfig | None = None,
    asset_id: str | None = None,
    fresh: int | None = None,
    preset: str | None = None,
    head_dims: tuple[int, int] | None = None,
    overwrite: bool = False,
    verify: bool | None = None,
    log: Callable[[str], None] = lambda _: None,
) -> Checkpoint:
    """Convert the checkpoint `source`, of any layout, to the layout `to`, written to the folder `target`.

    Args:
        source, layout, ema, step, config, asset_id, fresh, preset, head_dims: see `open_checkpoint`.
        to: the layout to write, by name or as "module:NAME".
        dtype: "keep", "float32" or "bfloat16" (rounded once).
        lora: "keep" or "merge".
        action_dim: pads the state and action projections with zeros, or truncates them.
        action_horizon: replaces the config's; no parameter depends on it.
        overwrite: replace `target` if it exists, is a checkpoint and not the source.
        verify: read back what was written and compare it byte by byte. Default: for models up to a billion parameters.
        log: called with a line for each change to the model.

    Returns the opened result. Raises CheckpointError or LayoutError, also for NaN and infinite values, and
    FileExistsError where `target` exists; then nothing is left behind.
    """
    dtype = dtype if isinstance(dtype, str) else canonical_dtype(dtype)
    if dtype not in DTYPES:
        raise ValueError(f"dtype is {dtype!r}; it must be one of {', '.join(DTYPES)}")
    target, target_layout, target_dtype = as_path(target), find_layout(to), DTYPES[dtype]
    scheme, separator, _ = str(source).partition("://")
    sources = [as_path(source)] if scheme in SCHEMES else [] if separator else [Path(source).expanduser()]
    replace: dict[str, Any] = {"marker": MARKER, "files": FILES, "sources": sources}
    require_replaceable(target, overwrite, **replace)
    checkpoint = open_checkpoint(
        source,
        config,
        layout=layout,
        step=step,
        ema=ema,
        asset_id=asset_id,
        fresh=fresh,
        preset=preset,
        head_dims=head_dims,
        in_place=True,
        dtype=target_dtype if lora == "keep" else None,  # LoRA is merged as stored, then rounded once
    )
    for note in checkpoint.notes:
        log(note)
    if checkpoint.fresh:
        log(f"newly initialized: {len(checkpoint.fresh)} parameters, {checkpoint.fresh[0]} to {checkpoint.fresh[-1]}")
    checkpoint = _changed(checkpoint, target_dtype, lora, action_dim, action_horizon, log)
    for note in () if target_layout.check_target is None else target_layout.check_target(checkpoint.assets):
        log(note)
    if verify is None:
        verify = sum(math.prod(t.shape) for t in checkpoint.ours.values()) <= VERIFIED_SIZE
    size = sum(tensor.size for tensor in checkpoint.ours.values())
    with (
        naming(checkpoint.folder),
        new_folder(target, overwrite, **replace) as folder,
        tqdm(total=size, unit="B", unit_scale=True, desc="converting", delay=2) as bar,
    ):
        checked = {name: _checked(name, tensor, bar.update) for name, tensor in checkpoint.ours.items()}
        write_checkpoint(dataclasses.replace(checkpoint, ours=checked), folder, target_layout)
        sign(folder, is_sidecar)
        if verify:
            verify_equal(checkpoint, open_checkpoint(folder, checkpoint.assets.model, layout=target_layout))
    written = open_checkpoint(target, checkpoint.assets.model, layout=target_layout, in_place=True)
    assets = dataclasses.replace(written.assets, assumed=checkpoint.assets.assumed)
    return dataclasses.replace(written, assets=assets)


def _changed(
    checkpoint: Checkpoint,
    dtype: np.dtype | None,
    lora: str,
    action_dim: int | None,
    action_horizon: int | None,
    log: Callable[[str], None],
) -> Checkpoint:
    """The checkpoint with the requested changes, applied lazily."""
    model, ours = checkpoint.assets.model, dict(checkpoint.ours)
    if lora == "merge":
        if not lora_of(model):
            raise LayoutError(f"{checkpoint.folder} has no LoRA to merge; omit --lora merge")
        log(f"LoRA of {' and '.join(lora_of(model))} merged in float32")
        model, ours = merge_lora(model, ours)
        wider = [name for name, tensor in ours.items() if tensor.dtype != checkpoint.ours[name].dtype]
        if wider and dtype is None:
            stored = checkpoint.ours[wider[0]].dtype
            log(f"{len(wider)} merged kernels are float32: {stored}, as stored, would round the updates (--dtype does)")
    if action_dim is not None and action_dim != model.action_dim:
        how = f"projections {'padded with zeros' if action_dim > model.action_dim else 'truncated'}"
        if model.action_expert is None:
            how = "no parameter depends on it"
        log(f"action_dim {model.action_dim} -> {action_dim}: {how}")
        model, ours = _resized(model, ours, action_dim)
    if action_horizon is not None and action_horizon != model.action_horizon:
        log(f"action_horizon {model.action_horizon} -> {action_horizon}: no parameter depends on it")
        model = dataclasses.replace(model, action_horizon=action_horizon)
    if dtype is not None:
        ours = {name: tensor.cast(dtype) for name, tensor in ours.items()}
    assumed = checkpoint.assets.assumed
    if action_horizon is not None:
        assumed = tuple(name for name in assumed if name != "action_horizon")
    if assumed:
        log(f"assumed, as in released models: {describe_assumed(model, assumed)}; --preset says more")
    assets = dataclasses.replace(checkpoint.assets, model=model, assumed=assumed)
    return dataclasses.replace(checkpoint, assets=assets, ours=ours)


def _resized(model: ModelConfig, ours: Mapping[str, Tensor], action_dim: int) -> tuple[ModelConfig, dict[str, Tensor]]:
    """The parameters with another size of the axis `a`, and of the state's where it is the same."""
    model = dataclasses.replace(model, action_dim=action_dim)
    result = {}
    for name, parameter in parameters(model).items():
        if ours[name].shape == parameter.shape:
            result[name] = ours[name]
            continue
        kept = ours[name].read(())[tuple(slice(size) for size in parameter.shape)]
        widths = [(0, wanted - found) for wanted, found in zip(parameter.shape, kept.shape, strict=True)]
        result[name] = Tensor.of(np.pad(kept, widths))
    return model, result


def _checked(name: str, tensor: Tensor, progress: Callable[[int], object]) -> Tensor:
    """The tensor, checked for finite values as it is read; `progress` is called with the bytes read."""

    def read(index: Index) -> np.ndarray:
        array = tensor.read(index)
        if not _finite(array):
            raise CheckpointError(f"{name} has NaN or infinite values; the source is damaged or its training diverged")
        progress(array.nbytes)
        return array

    return dataclasses.replace(tensor, read=read)


def _finite(array: np.ndarray) -> bool:
    """Whether all values are finite; bfloat16 by its bits, since its arithmetic is slow in NumPy."""
    if array.dtype == DTYPES["bfloat16"]:
        bits = array.view(np.uint16)
        return not any(((row & 0x7F80) == 0x7F80).any() for row in (bits if bits.ndim > 1 else [bits]))
    return bool(np.isfinite(array).all())


def verify_equal(a: Checkpoint, b: Checkpoint) -> None:
    """Raise CheckpointError naming the first parameter whose bytes differ between two checkpoints."""
    for name, tensor in a.ours.items():
        for part in pieces(tensor) if b.ours[name].sliced else [()]:
            if not same_bytes(tensor.read(part), b.ours[name].read(part)):
                raise CheckpointError(f"{b.folder}: {name} differs from what was read from {a.folder}")


@exit_on_error("pi0-convert")
def main(arguments: list[str] | None = None) -> None:
    """The command `pi0-convert`.

    Raises ValueError for options that conversion with the training state does not take.
    """
    parser = make_parser(
        "pi0-convert",
        "Convert a checkpoint to another layout. Every tensor must fit: missing, unknown, NaN and infinite ones are "
        "errors. What was written is read back and compared byte by byte.",
        "examples:\n"
        "  pi0-convert runs/demo exported --to pi0_torch                      a training run's newest checkpoint\n"
        "  pi0-convert checkpoints/pi0_base/params exported --to pi0_torch    an openpi checkpoint to PyTorch\n"
        "  pi0-convert lora_run/params exported --to pi0_torch --lora merge   a LoRA fine-tuning, merged\n"
        "  pi0-convert exported back --to openpi_jax                          and back, byte for byte\n"
        "  pi0-convert pi05_droid exported --to pi0_torch --preset pi05_droid   with what openpi's config says of it\n"
        "  pi0-convert exported theirs --to my_package.layouts:LAYOUT         a layout of your own\n"
        "  pi0-convert runs/demo runs/in_torch --to pi0_torch --with-training-state   to go on training in PyTorch\n"
        "  pi0-convert pt_224.npz start --to pi0_jax --model pi0 --fresh 0    PaliGemma and a new action expert",
    )
    add_checkpoint(parser, "source")
    add_preset(parser)
    parser.add_argument("target", type=output_path, help="the folder to write; it must not exist")
    parser.add_argument("--to", required=True, help=f'the layout to write: {", ".join(WRITABLE)} or "module:NAME"')
    parser.add_argument("--layout", metavar="NAME", help='of the source (default: detected): a name or "module:NAME"')
    parser.add_argument("--dtype", choices=DTYPES, default="keep", help="of all tensors (default keep)")
    parser.add_argument("--lora", choices=("keep", "merge"), default="keep", help="default keep")
    parser.add_argument(
        "--ema", action=argparse.BooleanOptionalAction, default=True, help="the moving average of a training run"
    )
    parser.add_argument("--step", type=int, help="of a training run (default: the newest)")
    parser.add_argument("--action-dim", type=int, metavar="N", help="pad or truncate the action projections")
    parser.add_argument("--action-horizon", type=int, metavar="N", help="the horizon to write into the config")
    parser.add_argument(
        "--model",
        metavar="NAME",
        help="the model config, where neither a config.json nor shapes determine it (flat layouts do not distinguish "
        "heads and head dim): a variant of pi0.variants, such as pi0 or pi05, or a JSON file",
    )
    add_head_dims(parser)
    parser.add_argument(
        "--fresh", type=int, metavar="SEED", help="initialize an action expert or LoRA that the source does not have"
    )
    parser.add_argument(
        "--with-training-state",
        action="store_true",
        help="convert a training run to the other framework, with optimizer and step, for pi0-train to go on with",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace the target folder if it exists")
    parser.add_argument(
        "--verify", action=argparse.BooleanOptionalAction, help="read back and compare (default: up to 1 B parameters)"
    )
    args = parser.parse_args(arguments)
    if args.with_training_state:
        others = {name: value for name, value in vars(args).items() if name not in OF_RUNS}
        given = [name for name, value in others.items() if value != parser.get_default(name)]
        if given:
            raise ValueError(f"--with-training-state takes no {', '.join(given)}: a run goes on as it is")
        result = convert_run(args.source, args.target, to=args.to, step=args.step, overwrite=args.overwrite, log=print)
        print(f"{args.target}: a run after step {result.assets.step}, which pi0-train goes on with, layout {args.to}")
        return
    apart = ("source", "target", "model", "with_training_state")
    options = {name: value for name, value in vars(args).items() if name not in apart}
    config = None if args.model is None else read_variant(args.model)
    result = convert(args.source, args.target, config=config, **options, log=print)
    count = sum(math.prod(t.shape) for t in result.ours.values())
    print(f"{args.target}: {result.assets.model.kind}, {count:,} parameters, layout {args.to}")
