"""The command `pi0-doctor`."""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import sys
from typing import Any

from convert.checkpoints import open_checkpoint
from pi0.assets import Assets
from pi0.command import (
    add_checkpoint,
    add_preset,
    add_robot,
    exit_on_error,
    make_parser,
    output_path,
)
from pi0.config import DTYPES
from pi0.datasets.registry import open_dataset
from pi0.plugins import resolve
from pi0.policy.policy import fill_assets
from pi0.reading import naming
from pi0.robots.pipeline import Pipeline
from pi0.storage import write_text
from pi0_eval.doctor.diagnosis import CHECKS, diagnose, exit_code
from pi0_eval.doctor.findings import VERY_LIKELY, Diagnosis, Finding, ordered
from pi0_eval.doctor.html import to_html
from pi0_eval.doctor.probes import LocalPredictor, Predictor, ServerPredictor
from pi0_eval.doctor.recordings import Recording, of_dataset, of_environment
from pi0_eval.environments.registry import find_tasks, make_environment, task_name

OVERRIDES = ("robot", "action_horizon", "tokenizer")


def examine(args: argparse.Namespace) -> Diagnosis:
    """The diagnosis of the arguments. Raises ValueError for arguments that do not go together."""
    framework = args.framework or next((n for n in ("torch", "jax") if importlib.util.find_spec(n)), None)
    assets, pipeline = _assets(args)
    robot, horizon = pipeline.robot, assets.model.action_horizon
    predictor, differences = _predictor(args, framework, assets)
    replan = args.replan or horizon
    if not 1 <= replan <= horizon:
        raise ValueError(f"--replan is {replan}; a chunk has 1 to {horizon} actions")
    formats = {"format": args.format, "action_horizon": horizon}
    known = None
    if args.training is not None:
        dataset = open_dataset(args.training, robot, episodes=args.training_episodes, **formats)
        known = of_dataset(dataset, robot, max(replan // 2, 1))
    if args.data is not None:
        seen = of_dataset(open_dataset(args.data, robot, episodes=args.episodes, **formats), robot, max(replan // 2, 1))
    elif args.env is not None:
        seen = _rolled_out(args, pipeline, predictor, replan)
    elif known is not None:
        seen = known
    else:
        raise ValueError("nothing to look at: give --data, --env, or for a server --training")
    if seen is known:
        known = None
    parts = [f"{args.checkpoint} ({assets.model.family.title}, {type(robot).__name__}"]
    parts += [f", on {args.server})" if args.server else f", {framework or 'no framework'})"]
    rate = "requests" if seen.fps is None else f"frames at {seen.fps:g} per second"
    parts += [f" with {seen.name}, {seen.frames} {rate}"]
    parts += [f"; training {known.name}, {known.frames} frames" if known is not None else ""]
    found = diagnose(assets, pipeline, seen, known, predictor, replan=replan, skip=args.skip, subject="".join(parts))
    return Diagnosis(
        found.subject, ordered([*differences, *found.findings]), found.healthy, found.unjudged, found.facts
    )


def _assets(args: argparse.Namespace) -> tuple[Assets, Pipeline]:
    """What the checkpoint's files say; its weights are not read."""
    checkpoint = open_checkpoint(args.checkpoint, asset_id=args.asset_id, preset=args.preset)
    with naming(checkpoint.folder):
        overrides = {name: getattr(args, name) for name in OVERRIDES}
        assets = fill_assets(checkpoint.assets, checkpoint.norm_stats, **overrides)
        return assets, Pipeline.from_assets(assets)


def _predictor(
    args: argparse.Namespace, framework: str | None, assets: Assets
) -> tuple[Predictor | None, list[Finding]]:
    """The policy, here or on a server, and how the server's differs from the checkpoint."""
    if args.server is not None:
        client = resolve("pi0_serve.client:Client", {}, "client")(args.server, None, args.api_key, timeout=120.0)
        return ServerPredictor(client), _differences(client.metadata, assets)
    if framework is None:
        return None, []
    options: dict[str, Any] = {name: getattr(args, name) for name in (*OVERRIDES, "asset_id", "preset", "num_steps")}
    options |= {"fallback": True}
    if args.device is not None:
        if framework != "torch":
            raise ValueError("--device is for PyTorch; for JAX set JAX_PLATFORMS")
        options["device"] = args.device

    def load(dtype: str | None) -> Any:
        policy = importlib.import_module(f"pi0_{framework}").Policy
        return policy.from_pretrained(args.checkpoint, **options, dtype=dtype)

    return LocalPredictor(load(args.dtype), load, dtype=args.dtype or assets.model.runtime.dtype), []


def _differences(metadata: dict[str, Any], assets: Assets) -> list[Finding]:
    """What the server says of its policy that is not the checkpoint's."""
    horizon = metadata.get("action_horizon")
    if horizon in (None, assets.model.action_horizon):
        return []
    text = f"The server's policy has a horizon of {horizon} actions, the checkpoint {assets.model.action_horizon}."
    return [Finding("horizon", VERY_LIKELY, text)]


def _rolled_out(args: argparse.Namespace, pipeline: Pipeline, predictor: Predictor | None, replan: int) -> Recording:
    if predictor is None:
        raise ValueError("--env needs PyTorch or JAX, for the policy to act")
    (task, *others) = find_tasks(args.env)
    if others:
        raise ValueError(f"--env {args.env} is {1 + len(others)} tasks; give one, such as {task_name(task)}")
    optional = set(pipeline.robot.optional_cameras)
    cameras = tuple(name for name in pipeline.robot.cameras if name not in optional)
    environment = make_environment(task, cameras)
    try:
        return of_environment(
            environment, pipeline.robot, predictor.predict, replan, name=task_name(task), steps=args.steps
        )
    finally:
        environment.close()


@exit_on_error("pi0-doctor", RuntimeError)
def main(arguments: list[str] | None = None) -> None:
    """The command `pi0-doctor`; exits with 1 where a cause is likely."""
    parser = make_parser(
        "pi0-doctor",
        "Find out why a trained policy does not move the robot as it should: looks at recordings of the robot "
        "(--data), a simulator (--env) or a policy server (--server), compares them with the training data "
        "(--training) and with what the checkpoint says, and asks the policy what its actions depend on. Names causes "
        "in order of likelihood, each with its evidence and what to do, and exits with 1 where one is likely.",
        "examples:\n"
        "  pi0-doctor runs/demo/export --data robot/monday --training bundled://metaworld_v30\n"
        "  pi0-doctor runs/towels --data data/towels\n"
        "  pi0-doctor runs/metaworld --env metaworld/reach-v3 --training runs/demonstrations --html doctor.html\n"
        "  pi0-doctor runs/towels --server ws://robot:8000 --training data/towels\n\n"
        f"checks, for --skip: {', '.join(CHECKS)}",
    )
    add_checkpoint(parser)
    add_robot(parser)
    add_preset(parser)
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--data", metavar="DATASET", help="recordings of the robot, or of training")
    where.add_argument("--server", metavar="ADDRESS", help="ws://… of a policy server, asked for the actions")
    where.add_argument("--env", metavar="NAME", help='a simulator, "metaworld/reach-v3" or "module:Name"')
    parser.add_argument("--training", metavar="DATASET", help="what the policy was trained on, to compare with")
    text = 'of both datasets: lerobot (default), rlds, arrayrecord or "module:Name"'
    parser.add_argument("--format", default="lerobot", help=text)
    parser.add_argument("--episodes", type=int, nargs="+", metavar="N", help="of --data (default: all)")
    parser.add_argument("--training-episodes", type=int, nargs="+", metavar="N", help="of --training (default: all)")
    parser.add_argument("--framework", choices=("torch", "jax"), help="default: PyTorch where it is installed")
    parser.add_argument("--dtype", choices=DTYPES, help="compute dtype (default: the checkpoint's)")
    parser.add_argument("--device", help="of PyTorch (default cpu)")
    parser.add_argument("--num-steps", type=int, metavar="N", help="Euler steps (default: the checkpoint's)")
    parser.add_argument("--action-horizon", type=int, metavar="N", help="where neither checkpoint nor preset says it")
    parser.add_argument("--tokenizer", metavar="FILE", help="where the checkpoint names none (default PaliGemma's)")
    parser.add_argument("--replan", type=int, metavar="N", help="actions applied of a chunk (default: all)")
    parser.add_argument("--steps", type=int, default=150, metavar="N", help="of --env at most (default 150)")
    parser.add_argument("--api-key", metavar="KEY", help="of the server")
    parser.add_argument("--skip", nargs="+", default=[], choices=CHECKS, metavar="CHECK", help="checks to leave out")
    parser.add_argument("--json", type=output_path, metavar="FILE", help="the diagnosis as JSON")
    parser.add_argument("--html", type=output_path, metavar="FILE", help="the diagnosis with images, in one file")
    args = parser.parse_args(arguments)
    diagnosis = examine(args)
    print(diagnosis.to_text())
    if args.json is not None:
        write_text(args.json, json.dumps(diagnosis.to_dict(), indent=2) + "\n")
    if args.html is not None:
        write_text(args.html, to_html(diagnosis))
    sys.exit(exit_code(diagnosis))
