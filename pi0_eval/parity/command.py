"""The command `pi0-parity`."""

from __future__ import annotations

import sys
import time
from dataclasses import replace
from pathlib import Path

from pi0.command import exit_on_error, make_parser, output_path
from pi0.config import DTYPES
from pi0.storage import write_text
from pi0_eval.parity.compare import compare, compare_all
from pi0_eval.parity.explain import explain
from pi0_eval.parity.html import to_html
from pi0_eval.parity.report import matrix_table
from pi0_eval.parity.sides import FRAMEWORKS, Side, SideError


@exit_on_error("pi0-parity", code=2)
def main(arguments: list[str] | None = None) -> None:
    """The command `pi0-parity`; exits with 1 where a stage is out, with 2 where there is no report."""
    parser = make_parser(
        "pi0-parity",
        "Compare two checkpoints, in either framework, on the same inputs: the output of every layer, velocity or "
        "logits, loss, gradients, and sampled actions or tokens. Names the first stage that parts.",
        "examples:\n"
        "  pi0-parity run/checkpoints/400 exported                 JAX against its PyTorch export\n"
        "  pi0-parity exported exported --framework-b jax          one checkpoint in both frameworks\n"
        "  pi0-parity A B --dtype bfloat16 --json parity.json      rounding errors in bfloat16, for CI\n\n"
        "  pi0-parity A B --side-b torch:sampler:flex              any other way to compute B\n"
        "  pi0-parity A B --matrix                                 all ways that this machine has\n\n"
        "Both run in float64, where they are one function or not (1e-12), and in the compute dtype, where they may be\n"
        "apart by what their own distances from float64 allow.",
    )
    parser.add_argument("a", help="the reference: the folder of a checkpoint or of a training run, gs:// or hf://")
    parser.add_argument("b", help="the checkpoint to compare with it")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="compute dtype (default float32)")
    parser.add_argument("--framework-a", choices=FRAMEWORKS, help="of A (default: by its file format)")
    parser.add_argument("--framework-b", choices=FRAMEWORKS, help="of B (default: by its file format)")
    for side in "ab":
        words = "framework, plain or sampler, attention, dtype, device, (un)compiled, with colons between them"
        parser.add_argument(f"--side-{side}", type=Side.parse, default=Side(), help=f"how {side.upper()} runs: {words}")
    parser.add_argument("--matrix", action="store_true", help="compare A with every way to run B, in one table")
    parser.add_argument("--explain", action="store_true", help="of a failure, name the first operation that parts")
    parser.add_argument("--inputs", type=Path, help="npz file with an observation's keys, actions, noise, time")
    parser.add_argument("--batch", type=int, default=2, help="rows of random inputs (default 2)")
    parser.add_argument("--seed", type=int, default=0, help="of random inputs (default 0)")
    parser.add_argument("--steps", type=int, default=10, help="Euler steps, or tokens to decode (default 10)")
    parser.add_argument("--no-gradients", action="store_true", help="skip gradients: half the memory and time")
    parser.add_argument("--json", type=output_path, help="write the report as JSON to this file")
    parser.add_argument("--html", type=output_path, help="write the report with plots as one HTML file")
    args = parser.parse_args(arguments)
    if args.explain and (args.matrix or {args.side_a.path, args.side_b.path} != {"plain"}):
        raise SideError("--explain is for two plain sides: samplers record no operations")
    for file in filter(None, (args.json, args.html)):  # fail before the work, not after it
        file.parent.mkdir(parents=True, exist_ok=True)
    started = time.perf_counter()

    def progress(line: str) -> None:
        print(f"{time.perf_counter() - started:6.1f} s  {line}", file=sys.stderr, flush=True)

    progress(f"comparing {args.a} and {args.b}")
    options = {
        "dtype": args.dtype,
        "side_a": args.side_a,
        "framework_a": args.framework_a,
        "inputs": args.inputs,
        "batch": args.batch,
        "seed": args.seed,
        "num_steps": args.steps,
        "gradients": not args.no_gradients,
        "progress": progress,
    }
    if args.matrix:
        reports = compare_all(args.a, args.b, **options)
        print(matrix_table(reports))
        sys.exit(0 if all(report.passed for report in reports.values()) else 1)
    report = compare(args.a, args.b, side_b=args.side_b, framework_b=args.framework_b, **options)
    print(report.table())
    if args.explain and not report.passed:
        named = (args.side_a, args.framework_a), (args.side_b, args.framework_b)
        side_a, side_b = (replace(side, framework=side.framework or framework) for side, framework in named)
        chosen = {"inputs": args.inputs, "batch": args.batch, "seed": args.seed, "num_steps": args.steps}
        print(explain(args.a, args.b, report, side_a=side_a, side_b=side_b, **chosen))
    if args.json:
        write_text(args.json, report.to_json() + "\n")
    if args.html:
        write_text(args.html, to_html(report))
    sys.exit(0 if report.passed else 1)
