"""The command `pi0-parity`."""

from __future__ import annotations

import argparse
import json
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from pi0.command import exit_on_error, make_parser, output_path
from pi0.config import DTYPES
from pi0.policy.manifest import FORMATS, is_export
from pi0.storage import write_text
from pi0_eval.export.parity import compare_export
from pi0_eval.parity.ci import to_badge, to_json, to_junit
from pi0_eval.parity.compare import compare, compare_all
from pi0_eval.parity.explain import explain
from pi0_eval.parity.html import to_html
from pi0_eval.parity.report import Report, matrix_table
from pi0_eval.parity.sides import FRAMEWORKS, SIDES, Side, SideError
from pi0_eval.parity.training import TrainingReport, compare_training

SILENCE = 3.0  # seconds without a line before the last one is repeated


@exit_on_error("pi0-parity", code=2)
def main(arguments: list[str] | None = None) -> None:
    """The command `pi0-parity`; exits with 1 where a stage is out, with 2 where there is no report.

    Raises ValueError or SideError for options that exclude each other.
    """
    parser = make_parser(
        "pi0-parity",
        "Compare two checkpoints, in either framework, on the same inputs: the output of every layer, velocity or "
        "logits, loss, gradients, and sampled actions or tokens. Names the first stage that parts.",
        "examples:\n"
        "  pi0-parity run/checkpoints/400 exported                 JAX against its PyTorch export\n"
        "  pi0-parity exported exported --framework-b jax          one checkpoint in both frameworks\n"
        "  pi0-parity A B --dtype bfloat16 --json parity.json      rounding errors in bfloat16, for CI\n\n"
        "  pi0-parity A B --side-b torch:sampler:flex              any other way to compute B\n"
        "  pi0-parity A B --matrix                                 all ways that this machine has\n"
        "  pi0-parity A B --train-steps 10                         train both, and compare after each step\n\n"
        "Both run in float64, where they are one function or not (1e-12), and in the compute dtype, where they may be\n"
        "apart by what their own distances from float64 allow.",
    )
    parser.add_argument("a", help="the reference: the folder of a checkpoint or of a training run, gs:// or hf://")
    parser.add_argument("b", help="the checkpoint to compare with it, or an export of pi0-export")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="compute dtype (default float32)")
    parser.add_argument("--framework-a", choices=FRAMEWORKS, help="of A (default: by its file format)")
    parser.add_argument("--framework-b", choices=SIDES, help="of B (default: by its file format)")
    for side in "ab":
        words = "framework, plain or sampler, attention, dtype, device, (un)compiled, with colons between them"
        parser.add_argument(f"--side-{side}", type=Side.parse, default=Side(), help=f"how {side.upper()} runs: {words}")
    parser.add_argument("--matrix", action="store_true", help="compare A with every way to run B, in one table")
    parser.add_argument(
        "--sliced", action="store_true", help="layer by layer, for models that do not fit in memory in float64"
    )
    parser.add_argument("--explain", action="store_true", help="of a failure, name the first operation that parts")
    parser.add_argument(
        "--train-steps",
        type=_positive,
        metavar="N",
        help="train both for N steps in float32, as A was trained, and compare loss, gradient norm, every parameter, "
        "moment and moving average after each",
    )
    parser.add_argument("--inputs", type=Path, help="npz file with an observation's keys, actions, noise, time")
    parser.add_argument(
        "--quick", action="store_true", help="2 steps and no gradients: for a first look, or every push"
    )
    parser.add_argument("--batch", type=int, default=2, help="rows of random inputs (default 2)")
    parser.add_argument("--seed", type=int, default=0, help="of random inputs (default 0)")
    parser.add_argument("--steps", type=int, help="Euler steps, or tokens to decode (default 10, with --quick 2)")
    parser.add_argument("--no-gradients", action="store_true", help="skip gradients: half the memory and time")
    parser.add_argument("--json", type=output_path, help="write the report as JSON to this file")
    parser.add_argument("--html", type=output_path, help="write the report with plots as one HTML file")
    parser.add_argument("--junit", type=output_path, help="write a test case for each stage as JUnit XML")
    parser.add_argument("--badge", type=output_path, help="write the JSON of a shields.io endpoint badge")
    args = parser.parse_args(arguments)
    if args.explain and (args.matrix or {args.side_a.path, args.side_b.path} != {"plain"}):
        raise SideError("--explain is for two plain sides: samplers record no operations")
    if args.sliced and (args.matrix or args.explain):
        raise ValueError("--sliced holds one layer's weights; --matrix and --explain need all of them: leave one out")
    if args.matrix and args.html:
        raise ValueError("--html shows one comparison; leave out --matrix, or ask for --json or --junit")
    exported = is_export(args.b)
    if exported:
        check_export_arguments(args, parser)
    elif {args.framework_b, args.side_b.framework} & set(FORMATS):
        raise SideError(f"{args.b} is no export of pi0-export, which {args.framework_b or args.side_b} needs")
    if args.train_steps is not None:
        others = ("side_a", "side_b", "matrix", "sliced", "explain", "inputs", "quick", "steps", "no_gradients")
        given = [n for n in (*others, "dtype", "html", "junit", "badge") if getattr(args, n) != parser.get_default(n)]
        if given:
            names = ", ".join(f"--{name.replace('_', '-')}" for name in given)
            raise ValueError(f"--train-steps takes no {names}; it trains plain models in float32, on random batches")
        sys.exit(0 if compare_runs(args).passed else 1)
    for file in filter(None, (args.json, args.html, args.junit, args.badge)):  # fail before the work, not after it
        file.parent.mkdir(parents=True, exist_ok=True)
    with Progress(f"comparing {args.a} and {args.b}") as progress:
        reports = run(args, progress)
    if args.matrix:
        print(matrix_table(reports))
    else:
        (report,) = reports.values()
        print(report.table())
        if args.explain and not report.passed:
            print(explanation(args, report))
        if args.html:
            write_text(args.html, to_html(report))
    for file, form in ((args.json, to_json), (args.junit, to_junit), (args.badge, to_badge)):
        if file:
            write_text(file, form(reports).rstrip() + "\n")
    sys.exit(0 if all(report.passed for report in reports.values()) else 1)


def check_export_arguments(args: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    """Raise SideError for what a comparison with an export does not have."""
    others = ("matrix", "sliced", "explain", "quick", "no_gradients", "train_steps", "dtype")
    if given := [name for name in others if getattr(args, name) != parser.get_default(name)]:
        names = ", ".join(f"--{name.replace('_', '-')}" for name in given)
        raise SideError(f"{args.b} is an export, which runs as it is and has no gradients: leave out {names}")
    args.side_b.of(args.framework_b or args.side_b.framework or FORMATS[0], "float32")


def _positive(text: str) -> int:
    """The type of a number of steps."""
    if (value := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"{value} is not positive")
    return value


def compare_runs(args: argparse.Namespace) -> TrainingReport:
    """Train both for a few steps, and print the comparison."""
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
    frameworks = {"framework_a": args.framework_a, "framework_b": args.framework_b}
    with Progress(f"training {args.a} and {args.b}") as progress:
        report = compare_training(
            args.a, args.b, args.train_steps, batch=args.batch, seed=args.seed, progress=progress, **frameworks
        )
    print(report.table())
    if args.json:
        write_text(args.json, json.dumps(report.to_dict(), indent=2) + "\n")
    return report


def explanation(args: argparse.Namespace, report: Report) -> str:
    """The operation at which a comparison fails."""
    named = (args.side_a, args.framework_a), (args.side_b, args.framework_b)
    side_a, side_b = (replace(side, framework=side.framework or framework) for side, framework in named)
    return explain(args.a, args.b, report, side_a=side_a, side_b=side_b, **chosen_inputs(args))


def chosen_inputs(args: argparse.Namespace) -> dict[str, Any]:
    """The inputs and steps of a comparison."""
    steps = args.steps if args.steps is not None else 2 if args.quick else 10
    return {"inputs": args.inputs, "batch": args.batch, "seed": args.seed, "num_steps": steps}


def run(args: argparse.Namespace, progress: Progress) -> dict[str, Report]:
    """The comparison, or with `--matrix` all of them, by how B is run."""
    options: dict[str, Any] = {
        "dtype": args.dtype,
        "side_a": args.side_a,
        "framework_a": args.framework_a,
        "gradients": not (args.no_gradients or args.quick),
        "progress": progress,
    } | chosen_inputs(args)
    if is_export(args.b):
        options |= {"framework": args.framework_b or args.side_b.framework, "device": args.side_b.device}
        del options["gradients"]
        report = compare_export(args.a, args.b, **options | {"num_steps": args.steps})
        return {report.b: report}
    if args.matrix:
        return compare_all(args.a, args.b, **options)
    report = compare(args.a, args.b, side_b=args.side_b, framework_b=args.framework_b, sliced=args.sliced, **options)
    return {report.b: report}


class Progress:
    """Lines with seconds on stderr; within its block at least one every few seconds, also during imports."""

    def __init__(self, line: str):
        self._started, self._lock, self._done = time.perf_counter(), threading.Lock(), threading.Event()
        self._line, self._last = line, 0.0
        self(line)

    def __call__(self, line: str) -> None:
        with self._lock:  # lines of several threads stay whole
            self._line, self._last = line, time.perf_counter()
            sys.stderr.write(f"{self._last - self._started:6.1f} s  {line}\n")
            sys.stderr.flush()

    def __enter__(self) -> Progress:
        threading.Thread(target=self._beat, daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self._done.set()

    def _beat(self) -> None:
        while not self._done.wait(0.2):
            if time.perf_counter() - self._last > SILENCE:
                self(self._line if self._line.startswith("still: ") else f"still: {self._line}")
