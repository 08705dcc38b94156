"""Success rates of a policy in simulation, closed loop: `pi0-rollout`."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from pi0.command import add_preset, exit_on_error, local_output_path, make_parser, robot_reference
from pi0.policy.rtc import METHODS
from pi0.reading import read_json
from pi0.robots.registry import make_robot
from pi0.storage import write_text
from pi0_eval.actors import Actor, LocalActor, RandomActor, ServerActor
from pi0_eval.closed_loop import SETTINGS, Plan, Rollout
from pi0_eval.environments.environment import EnvironmentFailed
from pi0_eval.environments.protocols import PROTOCOLS
from pi0_eval.environments.registry import find_environment, task_name
from pi0_eval.environments.workers import Pool
from pi0_eval.outcomes import EPISODES, compare_outcomes, comparison_table, read_episodes, summarize, table
from pi0_eval.parity.frameworks import exact_matmuls
from pi0_eval.parity.sides import Side
from pi0_eval.rollout_html import to_html

RESULTS, REPORT = "results.json", "report.html"
PARTS = {"build": "building simulators", "reset": "resets", "step": "physics", "render": "rendering"}


def write_results(folder: Path, rollout: Rollout | None = None) -> list[dict[str, Any]]:
    """Write `results.json` and `report.html` of a rollout's folder; returns the figures of `summarize`."""
    episodes = list(read_episodes(folder / EPISODES).values())
    rows, settings = summarize(episodes), read_json(folder / SETTINGS)
    results: dict[str, Any] = settings | {"results": rows}
    if rollout is not None:
        results |= {"seconds": dict(rollout.seconds), "steps": rollout.steps}
    write_text(folder / RESULTS, json.dumps(results, indent=2) + "\n")
    write_text(folder / REPORT, to_html(folder, settings, episodes, rows))
    return rows


def time_table(rollout: Rollout) -> str:
    """Where the time went: wall seconds of policy and environments, processor-like seconds within the workers."""
    seconds = rollout.seconds
    lines = [
        f"{rollout.steps} steps in {seconds['policy'] + seconds['environments']:.1f} s: "
        f"policy {seconds['policy']:.1f} s, environments {seconds['environments']:.1f} s, of which in all workers:"
    ]
    lines += [f"  {text:<22}{seconds[part]:8.1f} s" for part, text in PARTS.items() if seconds.get(part)]
    return "\n".join(lines)


def make_plan(args: argparse.Namespace, pool: Pool, horizon: int | None) -> Plan:
    """The plan of the arguments, completed by their protocol. Raises ValueError."""
    protocol = PROTOCOLS[args.protocol]
    references = tuple(pool.tasks(args.env or protocol.env))
    replan = args.replan or protocol.replan or horizon
    if replan is None:
        raise ValueError("the server does not say how long its chunks are: give --replan")
    limits = {task_name(r): args.limit or protocol.limit(r) for r in references}
    return Plan(
        references,
        episodes=args.episodes or protocol.episodes,
        seed=protocol.seed if args.seed is None else args.seed,
        first=args.first,
        batch_size=args.batch_size,
        replan=replan,
        idle=protocol.idle if args.idle is None else args.idle,
        limits=limits,
        latency=args.latency,
    )


def make_actor(args: argparse.Namespace, checkpoint: str | None, side: str | None) -> Actor:
    """The policy of the arguments. Raises ValueError for random actions in environments of several robots."""
    if args.server is not None:
        return ServerActor(args.server, args.batch_size, args.api_key)
    assert checkpoint is not None
    if checkpoint == "random":
        protocol = PROTOCOLS[args.protocol]
        names = {json.loads(n)["name"] if n.startswith("{") else n for n in args.env or protocol.env}
        robots = {n: make_robot(find_environment(n.partition("/")[0]).robot) for n in names}
        dims = {robot.action_dim for robot in robots.values()}
        if len(dims) != 1:
            raise ValueError(f"random actions are for environments of one robot; these have {sorted(dims)} dimensions")
        return RandomActor(dims.pop(), (args.replan or protocol.replan or 10) + args.latency)
    options = {name: getattr(args, name) for name in ("asset_id", "preset", "robot", "num_steps", "tokenizer")}
    options |= {"action_horizon": args.action_horizon, "rtc": args.rtc}
    return LocalActor(checkpoint, Side() if side is None else Side.parse(side), args.batch_size, **options)


def run_side(args: argparse.Namespace, checkpoint: str | None, side: str | None, folder: Path) -> list[dict[str, Any]]:
    """Run one policy into a folder, print its table, and return its figures."""
    actor = make_actor(args, checkpoint, side)
    try:
        with Pool(args.workers, args.timeout) as pool:
            plan = make_plan(args, pool, actor.horizon)
            count = len(plan.all())
            videos = range(count) if args.videos == ["all"] else [int(v) for v in args.videos]
            rollout = Rollout(plan, actor, pool, folder, videos=videos)
            rollout.run()
    finally:
        actor.close()
    rows = write_results(folder, rollout)
    print(f"\n{table(rows)}\n\n{time_table(rollout)}\n{folder}: {RESULTS}, {REPORT}, {EPISODES}, trajectories/")
    return rows


def run_comparison(args: argparse.Namespace) -> int:
    """Compare two rollouts, run first where they are checkpoints; returns the number of errors.

    Raises ValueError without `--out` where checkpoints are compared.
    """
    sides = args.side if len(args.side) == 2 else args.side * 2
    folders, errors = [], 0
    for name, source, side in zip("ab", args.compare, sides, strict=True):
        if (Path(source) / SETTINGS).exists():
            folders.append(Path(source))
            continue
        if args.out is None:
            raise ValueError("--compare of checkpoints writes two rollouts: give --out")
        folders.append(args.out / name)
        print(f"{name.upper()}: {source}, {side or 'as it is'}", flush=True)
        with exact_matmuls():
            rows = run_side(args, source, side, folders[-1])
        errors += sum(row["errors"] for row in rows if row["task"] != "all")
    figures = compare_outcomes(folders[0], folders[1])
    print(f"\n{comparison_table(figures)}")
    if args.out is not None:
        write_text(args.out / "comparison.json", json.dumps(figures, indent=2) + "\n")
    return errors


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `pi0-rollout`."""
    parser.add_argument(
        "checkpoint", nargs="?", help='a checkpoint, run or export, gs:// or hf://; "random" for random actions'
    )
    parser.add_argument("--compare", nargs=2, metavar=("A", "B"), help="checkpoints, or folders of finished rollouts")
    parser.add_argument("--server", metavar="ADDRESS", help="ws://… of a policy server, instead of a checkpoint")
    parser.add_argument("--api-key", metavar="KEY", help="of the server")
    parser.add_argument(
        "--env", nargs="+", metavar="NAME", help='"metaworld/reach-v3", "libero/libero_10", "module:Name"'
    )
    parser.add_argument("--protocol", choices=PROTOCOLS, default="default", help="a published evaluation's settings")
    parser.add_argument("--out", type=local_output_path, metavar="FOLDER", help="a new folder, or one to go on with")
    parser.add_argument("--episodes", type=int, metavar="N", help="of each task (default: the protocol's, 25)")
    parser.add_argument("--first", type=int, default=0, metavar="N", help="the first episode's number (default 0)")
    parser.add_argument("--seed", type=int, help="of initial states and noise (default: the protocol's, 0)")
    parser.add_argument(
        "--replan", type=int, metavar="N", help="actions applied of a chunk (default: the protocol's, all)"
    )
    parser.add_argument(
        "--idle", type=int, metavar="N", help="first steps that do nothing (default: the protocol's, 0)"
    )
    parser.add_argument("--limit", type=int, metavar="N", help="steps of an episode (default: the protocol's)")
    parser.add_argument("--latency", type=int, default=0, metavar="N", help="steps that an answer takes (default 0)")
    parser.add_argument("--rtc", choices=METHODS, help="real-time chunking: chunks that go on from the one executed")
    parser.add_argument("--batch-size", type=int, default=4, metavar="N", help="episodes in progress (default 4)")
    parser.add_argument("--workers", type=int, default=1, metavar="N", help="processes with simulators (default 1)")
    parser.add_argument("--timeout", type=float, default=600.0, metavar="SECONDS", help="of a simulator (default 600)")
    parser.add_argument("--videos", nargs="+", default=[], metavar="INDEX", help="episodes to record, or all")
    side = "framework, sampler, dtype, … such as torch:sampler:bfloat16; two for --compare"
    side += " (default: torch, and of an export its format)"
    parser.add_argument("--side", nargs="+", default=[None], metavar="SIDE", help=side)
    parser.add_argument("--asset-id", metavar="ID", help="of several norm stats: those of this robot or dataset")
    parser.add_argument("--robot", type=robot_reference, help="where the checkpoint does not name it")
    parser.add_argument("--action-horizon", type=int, metavar="N", help="where neither checkpoint nor preset says it")
    parser.add_argument("--tokenizer", metavar="FILE", help="where the checkpoint names none (default PaliGemma's)")
    parser.add_argument("--num-steps", type=int, metavar="N", help="Euler steps (default: the checkpoint's)")
    add_preset(parser)


@exit_on_error("pi0-rollout", RuntimeError)
def main(arguments: list[str] | None = None) -> None:
    """The command `pi0-rollout`.

    Raises ValueError for options that do not fit each other, and EnvironmentFailed where episodes ended in an error.
    """
    parser = make_parser(
        "pi0-rollout",
        "Run a policy in simulation, closed loop, and report success rates with 95 % intervals. Every episode is "
        "written as it ends; the same command goes on where it was cut off. An exception of a simulator is an error, "
        "not a failure.",
        "examples:\n"
        "  pi0-rollout runs/metaworld_rollout --env metaworld/reach-v3 --out runs/reach --videos 0 1\n"
        "  pi0-rollout data/pi05_libero --preset pi05_libero --protocol libero --out runs/libero\n"
        "  pi0-rollout --server ws://gpu:8000 --protocol libero --out runs/libero --workers 8 --batch-size 16\n"
        "  pi0-rollout --compare runs/a runs/a --side jax torch --env metaworld/reach-v3 --out runs/frameworks\n\n"
        "written to the folder:\n"
        "  episodes.jsonl, results.json, report.html, trajectories/ (actions, states, chunks), videos/",
    )
    add_arguments(parser)
    args = parser.parse_args(arguments)
    sources = [name for name in ("checkpoint", "compare", "server") if getattr(args, name) is not None]
    if len(sources) != 1:
        raise ValueError(f"give one of a checkpoint, --compare and --server; got {', '.join(sources) or 'none'}")
    if len(args.side) > (2 if args.compare else 1):
        raise ValueError(f"{len(args.side)} sides: one is for a checkpoint, two for --compare")
    if args.out is None and not args.compare:
        raise ValueError("give --out, the folder of the results")
    if not (args.env or PROTOCOLS[args.protocol].env or args.compare):
        raise ValueError("no environment: give --env, or a --protocol that has some")
    if bad := [v for v in args.videos if v != "all" and not v.isdecimal()]:
        raise ValueError(f"--videos {bad[0]!r}: give indices of episodes, or all")
    if args.rtc and (args.server or args.checkpoint == "random"):
        raise ValueError("--rtc is for checkpoints: random actions have none, and a server has that of pi0-serve --rtc")
    if args.compare:
        errors = run_comparison(args)
    else:
        rows = run_side(args, args.checkpoint, args.side[0], args.out)
        errors = sum(row["errors"] for row in rows if row["task"] != "all")
    if errors:
        raise EnvironmentFailed(
            f"{errors} episodes ended in an error of the simulator; the same command tries them again"
        )
