"""The command `pi0-quantize-report`."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

from pi0.command import (
    add_checkpoint,
    add_preset,
    add_robot,
    exit_on_error,
    make_parser,
    output_path,
)
from pi0.config import DTYPES
from pi0.datasets.base import Dataset
from pi0.datasets.registry import open_dataset
from pi0.plugins import require_extra
from pi0.quantization import CALIBRATED, FORMATS, QuantizationConfig
from pi0.storage import new_folder, require_replaceable
from pi0_eval.replay import action_labels

FILES: dict[str, Any] = {"marker": ("report.json",), "files": ("quantization.json", "layers.png")}


@exit_on_error("pi0-quantize-report")
def main(arguments: list[str] | None = None) -> None:
    """The command `pi0-quantize-report`."""
    formats = "\n".join(f"  {name:<13}{text}" for name, text in FORMATS.items())
    parser = make_parser(
        "pi0-quantize-report",
        "Measure on recorded frames how far quantized weights move a policy's actions, in PyTorch: as a whole, stage "
        "by stage, and each layer alone, the worst first; validation loss, memory and latency; and search the fewest "
        "layers that have to stay wide for a given action error.",
        "examples:\n"
        "  pi0-quantize-report runs/demo/export --data bundled://metaworld_v30\n"
        "  pi0-quantize-report runs/towels --data data/towels --quantize int4 --max-error 1 --out runs/int4\n"
        "  pi0-quantize-report runs/towels --data data/towels --quantize w8a8 --out runs/w8a8\n\n"
        f"formats:\n{formats}\n\n"
        "written to the folder:\n"
        "  report.json, layers.png, and quantization.json, the config with the layers that stay wide and the "
        "calibrated ranges",
    )
    add_checkpoint(parser)
    add_robot(parser)
    add_preset(parser)
    parser.add_argument(
        "--data", required=True, metavar="DATASET", help="a folder, hf://datasets/…, gs://… or bundled://…"
    )
    parser.add_argument(
        "--format", default="lerobot", help='of the dataset: lerobot, rlds, arrayrecord or "module:Name"'
    )
    parser.add_argument(
        "--quantize", default="int8", metavar="FORMAT", help="a format for all layers, or a .json config"
    )
    parser.add_argument("--group-size", type=int, metavar="N", help="inputs that share a scale in int4 (default 32)")
    parser.add_argument("--episodes", type=int, nargs="+", metavar="N", help="default: those that training held out")
    parser.add_argument("--frames", type=int, default=16, metavar="N", help="of these episodes, evenly (default 16)")
    text = "frames of other episodes that ranges are calibrated on (default 32)"
    parser.add_argument("--calibration-frames", type=int, default=32, metavar="N", help=text)
    text = "search the fewest wide layers for this mean action error, in %% of the recorded range"
    parser.add_argument("--max-error", type=float, metavar="PERCENT", help=text)
    text = "how many of the worst layers are kept wide, to show what it gives (default 5)"
    parser.add_argument("--worst", type=int, default=5, metavar="N", help=text)
    parser.add_argument("--list", type=int, default=15, metavar="N", help="layers in the text (default 15)")
    parser.add_argument("--batch-size", type=int, default=8, metavar="N", help="frames at a time (default 8)")
    parser.add_argument("--repeats", type=int, default=10, metavar="N", help="timed calls (default 10)")
    parser.add_argument("--num-steps", type=int, metavar="N", help="Euler steps (default: the checkpoint's)")
    parser.add_argument("--dtype", choices=DTYPES, help="compute dtype (default: the checkpoint's)")
    parser.add_argument("--device", default="cpu", help="of PyTorch (default cpu)")
    parser.add_argument("--out", type=output_path, metavar="FOLDER", help="a new folder for report, config and plot")
    parser.add_argument("--overwrite", action="store_true", help="replace that folder if it exists")
    args = parser.parse_args(arguments)
    config = read_config(args)
    if args.out is not None:  # fail before the work, not after it
        require_replaceable(args.out, args.overwrite, **FILES)
        require_extra("plots", "matplotlib")
    require_extra("torch", "torch")
    report = measure(args, config)
    print(report.to_text(args.list))
    if args.out is not None:
        write_folder(args.out, report, args.overwrite)
        print(f"\n{args.out}: report.json, quantization.json, layers.png")


def read_config(args: argparse.Namespace) -> QuantizationConfig:
    """The config of the arguments, without ranges. Raises ValueError for arguments that do not go together."""
    for name in ("frames", "calibration_frames", "batch_size", "repeats"):
        if getattr(args, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')} is {getattr(args, name)}; it must be at least 1")
    if args.worst < 0 or args.list < 0:
        raise ValueError("--worst and --list must be 0 or positive")
    if args.max_error is not None and not args.max_error >= 0:
        raise ValueError(f"--max-error is {args.max_error}; it must be 0 or positive, in percent")
    config = QuantizationConfig.of(args.quantize)
    if args.group_size is not None:
        if "int4" not in config.layers.values():
            raise ValueError("--group-size is of int4, which the config does not have")
        config = dataclasses.replace(config, group_size=args.group_size)
    return config


def measure(args: argparse.Namespace, config: QuantizationConfig) -> Any:
    """The report of the arguments, with ranges calibrated where the config has none."""
    from pi0_eval.quantization.measure import Quantizable, Recorded, calibrate
    from pi0_eval.quantization.report import make_report
    from pi0_torch.loading import find_device
    from pi0_torch.policy import Policy
    from pi0_torch.quantization import check_formats

    names = ("robot", "preset", "asset_id", "dtype", "device", "num_steps")
    policy = Policy.from_pretrained(args.checkpoint, **{name: getattr(args, name) for name in names}, fallback=True)
    check_formats(config.layers.values(), find_device(args.device))
    robot = policy.pipeline.robot
    dataset = open_dataset(args.data, robot, format=args.format, action_horizon=policy.config.action_horizon)
    data = (policy.assets.training or {}).get("data", {})
    own = args.episodes or (data.get("validation_episodes") if args.data == data.get("root") else None)
    chosen, others = choose_frames(dataset, own or None, args.frames, args.calibration_frames)
    if not config.input_ranges and set(config.layers.values()) & CALIBRATED.keys():
        progress(f"calibrating on {len(others)} frames")
        ranges = calibrate(policy, Recorded.read(policy, dataset, others), args.batch_size)
        config = dataclasses.replace(config, input_ranges=ranges)
    frames = Recorded.read(policy, dataset, chosen)
    case = Quantizable(policy, config, frames, dataset, batch=args.batch_size)
    model = f"{policy.config.family.title}, {policy.config.runtime.dtype}"
    return make_report(
        f"{args.checkpoint} ({model}) in {args.quantize}, on {len(frames)} frames of {args.data}",
        case,
        action_labels(dataset, robot),
        max_error=None if args.max_error is None else args.max_error / 100,
        worst=args.worst,
        repeats=args.repeats,
        progress=progress,
    )


def choose_frames(
    dataset: Dataset, episodes: list[int] | None, count: int, calibration: int
) -> tuple[list[int], list[int]]:
    """Frames of the episodes, evenly spaced, and of all other episodes; of the same ones where there are no others.

    Raises ValueError for an episode that the dataset does not have.
    """
    numbers = [episode.index for episode in dataset.episodes]
    wanted = numbers if episodes is None else list(episodes)
    if missing := sorted(set(wanted) - set(numbers)):
        raise ValueError(f"the dataset has no episodes {missing}; it has {len(numbers)}, up to {max(numbers)}")

    def spread(which: set[int], count: int) -> list[int]:
        bounds = zip(numbers, dataset.starts[:-1].tolist(), dataset.starts[1:].tolist(), strict=True)
        frames = [i for number, start, end in bounds if number in which for i in range(start, end)]
        return [frames[i] for i in np.linspace(0, len(frames) - 1, min(count, len(frames))).astype(int)]

    return spread(set(wanted), count), spread(set(numbers) - set(wanted) or set(numbers), calibration)


def progress(line: str) -> None:
    """Say what is being done, on standard error."""
    print(line, file=sys.stderr, flush=True)


def write_folder(out: Path, report: Any, overwrite: bool) -> None:
    """Write report, config and plot, all or nothing. Raises FileExistsError."""
    from pi0.plots import plot_layer_errors

    with new_folder(out, overwrite, **FILES) as folder:
        (folder / "report.json").write_text(json.dumps(report.to_dict(), indent=2) + "\n")
        report.chosen.save(folder / "quantization.json")
        rows = {row.name: 100 * row.error.mean for row in report.layers}
        curve = {count: 100 * error for count, error in report.curve.items()}
        plot_layer_errors(rows, curve, folder / "layers.png", report.subject)
