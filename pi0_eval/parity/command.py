"""The command `pi0-parity`."""

from __future__ import annotations

import sys
from pathlib import Path

from pi0.command import exit_on_error, make_parser, output_path
from pi0.config import DTYPES
from pi0.storage import write_text
from pi0_eval.parity.compare import compare
from pi0_eval.parity.frameworks import FRAMEWORKS
from pi0_eval.parity.html import to_html


@exit_on_error("pi0-parity", code=2)
def main(arguments: list[str] | None = None) -> None:
    """The command `pi0-parity`; exits with 1 where a stage is out of tolerance, with 2 where there is no report."""
    parser = make_parser(
        "pi0-parity",
        "Compare two checkpoints, in either framework, on the same inputs: the output of every layer, velocity or "
        "logits, loss, gradients, and sampled actions or tokens. Names the first stage that is out of tolerance.",
        "examples:\n"
        "  pi0-parity run/checkpoints/400 exported                 JAX against its PyTorch export\n"
        "  pi0-parity exported exported --framework-b jax          one checkpoint in both frameworks\n"
        "  pi0-parity A B --dtype bfloat16 --json parity.json      rounding errors in bfloat16, for CI\n\n"
        "In float32 each stage has a fixed tolerance. In bfloat16 both also run in float32, and may differ by\n"
        "sqrt(dA^2 + dB^2), where d is a model's own distance from float32.",
    )
    parser.add_argument("a", help="the reference: the folder of a checkpoint or of a training run, gs:// or hf://")
    parser.add_argument("b", help="the checkpoint to compare with it")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="compute dtype (default float32)")
    parser.add_argument("--framework-a", choices=FRAMEWORKS, help="of A (default: by its file format)")
    parser.add_argument("--framework-b", choices=FRAMEWORKS, help="of B (default: by its file format)")
    parser.add_argument("--inputs", type=Path, help="npz file with an observation's keys, actions, noise, time")
    parser.add_argument("--batch", type=int, default=2, help="rows of random inputs (default 2)")
    parser.add_argument("--seed", type=int, default=0, help="of random inputs (default 0)")
    parser.add_argument("--steps", type=int, default=10, help="Euler steps, or tokens to decode (default 10)")
    parser.add_argument("--no-gradients", action="store_true", help="skip gradients: half the memory and time")
    parser.add_argument("--json", type=output_path, help="write the report as JSON to this file")
    parser.add_argument("--html", type=output_path, help="write the report with plots as one HTML file")
    args = parser.parse_args(arguments)
    for file in filter(None, (args.json, args.html)):  # fail before the work, not after it
        file.parent.mkdir(parents=True, exist_ok=True)
    report = compare(
        args.a,
        args.b,
        dtype=args.dtype,
        framework_a=args.framework_a,
        framework_b=args.framework_b,
        inputs=args.inputs,
        batch=args.batch,
        seed=args.seed,
        num_steps=args.steps,
        gradients=not args.no_gradients,
    )
    print(report.table())
    if args.json:
        write_text(args.json, report.to_json() + "\n")
    if args.html:
        write_text(args.html, to_html(report))
    sys.exit(0 if report.passed else 1)
