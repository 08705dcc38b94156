"""From one layout to another, tensor by tensor, nothing lost: `convert`, `pi0-convert`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np

from convert.checkpoints import Checkpoint, CheckpointError, new_folder, open_checkpoint, write_checkpoint
from convert.layouts import LAYOUTS
from pi0.config import ModelConfig


def convert(
    source: str | Path,
    target: str | Path,
    *,
    to: str,
    config: ModelConfig | None = None,
    overwrite: bool = False,
    verify: bool = True,
) -> Checkpoint:
    """Write the checkpoint `source`, of any layout, to the folder `target` in the layout `to`.

    With `verify`, what was written is read again and every byte compared before the folder gets its name. Returns
    the opened result. Raises CheckpointError or LayoutError, and FileExistsError where `target` exists; then nothing
    is left behind.
    """
    checkpoint = open_checkpoint(source, config)
    target = Path(target)
    with new_folder(target, overwrite) as folder:
        write_checkpoint(checkpoint, folder, to)
        if verify:
            verify_equal(checkpoint, open_checkpoint(folder, checkpoint.assets.model))
    return open_checkpoint(target)


def verify_equal(a: Checkpoint, b: Checkpoint) -> None:
    """Raise CheckpointError that names the first parameter whose bytes differ between two checkpoints."""
    for name, tensor in a.ours.items():
        one, other = tensor.read(()), b.ours[name].read(())
        if one.dtype != other.dtype or not np.array_equal(_bytes(one), _bytes(other)):
            raise CheckpointError(f"{b.folder}: {name} was not written as it was read from {a.folder}")


def _bytes(array: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8)


def main(arguments: list[str] | None = None) -> None:
    """The command `pi0-convert`."""
    parser = argparse.ArgumentParser(
        prog="pi0-convert",
        description="Convert a checkpoint to another layout. The layout of the source is found by its tensors' names; "
        "every tensor must fit, none may be missing or left over, and what was written is read again and compared "
        "byte by byte.",
        epilog="examples:\n"
        "  pi0-convert runs/demo/checkpoints/400 exported --to pi0_torch     a training run to PyTorch\n"
        "  pi0-convert checkpoints/pi0_base/params exported --to pi0_torch   an openpi checkpoint to PyTorch\n"
        "  pi0-convert exported back --to openpi_jax                          and back, the same bytes",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("source", help="a checkpoint's folder, gs:// or hf://")
    parser.add_argument("target", type=Path, help="the folder to write; it must not exist")
    parser.add_argument("--to", required=True, choices=list(LAYOUTS), help="the layout to write")
    parser.add_argument("--overwrite", action="store_true", help="replace the target folder if it exists")
    parser.add_argument("--no-verify", action="store_true", help="do not read and compare what was written")
    args = parser.parse_args(arguments)
    try:
        result = convert(args.source, args.target, to=args.to, overwrite=args.overwrite, verify=not args.no_verify)
    except (ValueError, OSError) as error:
        print(f"pi0-convert: {error}", file=sys.stderr)
        sys.exit(1)
    count = sum(int(np.prod(t.shape)) for t in result.ours.values())
    model = result.assets.model
    print(f"{args.target}: {model.kind}, {count:,} parameters in {len(result.ours)} arrays, layout {args.to}")
