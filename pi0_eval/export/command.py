"""The command `pi0-export`."""

from __future__ import annotations

import argparse
import sys
import time

from pi0.command import (
    add_checkpoint,
    add_head_dims,
    add_preset,
    add_robot,
    exit_on_error,
    local_output_path,
    make_parser,
)
from pi0.config import DTYPES
from pi0.policy.manifest import FORMATS, Manifest
from pi0.policy.rtc import JACOBIANS, METHODS, RTC
from pi0.quantization import QuantizationConfig
from pi0_eval.export.exporting import Options, export


@exit_on_error("pi0-export")
def main(arguments: list[str] | None = None) -> None:
    """The command `pi0-export`; exits with 1, and writes nothing, where the export is not equivalent to its source.

    Raises ValueError for arguments that do not go together.
    """
    args = make_export_parser().parse_args(arguments)
    if args.jacobian is not None and args.rtc != "guided":
        raise ValueError("--jacobian is an option of --rtc guided")
    rtc = None if args.rtc is None else RTC(args.rtc, args.jacobian or RTC.jacobian)
    options = Options(
        args.to,
        args.split,
        args.batch,
        args.cameras,
        args.prompts,
        args.dtype,
        args.weights,
        args.num_steps,
        rtc,
        None if args.quantize is None else QuantizationConfig.of(args.quantize),
    )
    started = time.perf_counter()

    def log(line: str) -> None:
        print(f"{time.perf_counter() - started:7.1f} s  {line}", file=sys.stderr, flush=True)

    names = ("asset_id", "preset", "head_dims", "robot", "tokenizer", "action_horizon", "norm_stats")
    chosen = {name: getattr(args, name) for name in names}
    inputs = {"data": args.data, "frames": args.frames, "most": args.cases, "every": args.every, "seed": args.seed}
    manifest = export(args.checkpoint, args.target, options, **chosen, **inputs, overwrite=args.overwrite, log=log)
    print(table(manifest))
    print(f"{args.target}: {', '.join(program.file for program in manifest.programs.values())}, manifest.json")


def make_export_parser() -> argparse.ArgumentParser:
    """The parser of `pi0-export`."""
    parser = make_parser(
        "pi0-export",
        "Export a policy's sampler as programs that run without this project: torch.export, AOTInductor, ONNX or "
        "StableHLO. The export is run beside its source, stage by stage, and gets its name when both agree.",
        "examples:\n"
        "  pi0-export runs/metaworld_torch runs/onnx --to onnx                 for onnxruntime, TensorRT\n"
        "  pi0-export runs/metaworld_torch runs/pt2 --to pt2 --cameras 1-2     any one or two cameras\n"
        "  pi0-export runs/metaworld_torch runs/aoti --to aoti --split         the prefix and the steps apart\n\n"
        "Exit code 1 where it is refused: the first stage out of tolerance is named, and nothing is written.",
    )
    add_checkpoint(parser)
    parser.add_argument("target", type=local_output_path, help="the folder to write")
    parser.add_argument("--to", required=True, choices=FORMATS, help="the format")
    parser.add_argument("--split", action="store_true", help="two programs: reading the prefix, and the Euler steps")
    parser.add_argument("--batch", type=size_range, default=(1, 1), metavar="N[-M]", help="batch sizes (default 1)")
    parser.add_argument("--cameras", type=size_range, metavar="N[-M]", help="how many (default: all, some masked)")
    parser.add_argument(
        "--prompts", type=int, nargs="+", metavar="N", help="lengths that prompts are cut to (default: the samplers')"
    )
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="compute dtype (default float32)")
    parser.add_argument("--weights", choices=DTYPES, help="dtype that weights are stored in (default: that of --dtype)")
    parser.add_argument(
        "--quantize", metavar="FORMAT", help="round weights: int8, int4, …, or a .json file of pi0-quantize-report"
    )
    parser.add_argument("--num-steps", type=int, metavar="N", help="Euler steps, or tokens (default: the checkpoint's)")
    parser.add_argument("--rtc", choices=METHODS, help="real-time chunking, in the program")
    parser.add_argument("--jacobian", choices=JACOBIANS, help="of --rtc guided (default exact)")
    parser.add_argument("--data", metavar="DATASET", help="recordings to compare on, after random inputs")
    parser.add_argument("--frames", type=int, default=4, metavar="N", help="of --data (default 4)")
    parser.add_argument("--cases", type=int, metavar="N", help="at most so many random inputs")
    parser.add_argument("--every", action="store_true", help="all combinations of cameras, prompts and batch sizes")
    parser.add_argument("--seed", type=int, default=0, help="of random inputs (default 0)")
    parser.add_argument("--overwrite", action="store_true", help="replace an export")
    add_preset(parser)
    add_robot(parser)
    parser.add_argument("--norm-stats", metavar="FILE", help="where the checkpoint has none")
    parser.add_argument("--tokenizer", metavar="FILE", help="where the checkpoint names none (default PaliGemma's)")
    parser.add_argument("--action-horizon", type=int, metavar="N", help="where neither checkpoint nor preset says it")
    add_head_dims(parser)
    return parser


def size_range(text: str) -> tuple[int, int]:
    """The type of a size, "N", or of the smallest and the largest, "N-M". Raises ValueError, which argparse reports."""
    least, _, most = text.partition("-")
    return int(least), int(most or least)


def table(manifest: Manifest) -> str:
    """The figures of the gate: stages whose layers or steps are many in one line."""
    groups: dict[str, list[dict[str, float]]] = {}
    for stage, figures in manifest.gate["stages"].items():
        words = [word for word in stage.split() if not word.isdecimal()]
        groups.setdefault(" ".join(words), []).append(figures)
    lines = [f"{'stage':<22}{'error':>10}{'allowed':>10}"]
    for name, found in groups.items():
        worst = max(found, key=lambda figures: figures["error"])
        lines.append(f"{name:<22}{worst['error']:>10.1e}{worst['allowed']:>10.1e}")
    return "\n".join([*lines, f"{len(manifest.gate['cases'])} inputs; the largest error of each, relative L2"])
