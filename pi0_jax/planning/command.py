"""The command `pi0-plan`. It imports JAX after its arguments are parsed."""

from __future__ import annotations

import dataclasses
import sys

from pi0.command import exit_on_error, make_parser
from pi0.experiments import parse_arguments

EXAMPLES = """examples:
  pi0-plan --config pi0_metaworld --topology v5p:2x2x2 --config.batch_size=64 --config.mesh.fsdp=8
  pi0-plan --config pi0_metaworld --topology gpu:8x80 --config.mesh.fsdp=8
  pi0-plan --config pi0_metaworld --topology v5e:1x1 --sample --config.batch_size=1
  pi0-plan --config pi0_metaworld --topology v5e:4x4 v5e:8x8 --batch-per-chip 8 --config.mesh.fsdp=16"""


@exit_on_error("pi0-plan")
def main(arguments: list[str] | None = None) -> None:
    """The command `pi0-plan`."""
    description = (
        "Compile an experiment's training step for chips that need not be present, and report its memory, operations, "
        "collectives and time. Exits with 1 where it does not fit. TPUs need: pip install libtpu."
    )
    parser = make_parser("pi0-plan", description, EXAMPLES)
    parser.add_argument("--topology", required=True, nargs="+", help="v4, v5e, v5p, v6e or v7x:SHAPE, or gpu:NUMBERxGB")
    parser.add_argument("--sample", action="store_true", help="sampling instead of training")
    parser.add_argument("--batch-per-chip", type=int, help="rows of each device (of v7x, half a chip)")
    args, config = parse_arguments(parser, arguments)

    from pi0_jax.planning.plan import devices_of, plan, prepare, report, suggest, table

    prepare(args.topology)
    plans = []
    for topology in args.topology:
        if args.batch_per_chip:
            config = dataclasses.replace(config, batch_size=args.batch_per_chip * len(devices_of(topology)))
        plans.append(plan(config, topology, sampling=args.sample))
    work = "sampling" if args.sample else f"training, remat {config.model.runtime.remat}"
    print(report(plans[0], f"{config.model.kind}, {work}") if len(plans) == 1 else table(plans))
    for refused in [each for each in plans if not each.fits]:
        print(f"\n{refused.topology}: try one or more of", *suggest(config, refused, sampling=args.sample), sep="\n  ")
    sys.exit(0 if all(each.fits for each in plans) else 1)
