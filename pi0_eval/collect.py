"""Demonstrations of scripted experts, and episodes of policies, as LeRobot datasets: `pi0-collect`."""

from __future__ import annotations

import dataclasses
import json
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pi0.command import exit_on_error, local_output_path, make_parser
from pi0.datasets.writer import CODECS, DatasetWriter
from pi0.plugins import require_extra
from pi0.reading import read_json, read_npz
from pi0.storage import digest, write_text
from pi0_eval.actors import Actor, LocalActor
from pi0_eval.closed_loop import Plan, Rollout
from pi0_eval.environments.registry import find_environment, task_name
from pi0_eval.environments.workers import Begin, Demonstrate, Pool, Reply
from pi0_eval.parity.sides import Side

ATTEMPTS = "meta/attempts.json"  # in the dataset: what was tried, by seed and episode, and what became of it
BATCH = 4  # episodes in progress of a policy
MOST_FAILED = 0.8  # of a task's attempts, after which it is given up


class Demonstrations:
    """A dataset that is being collected: its writer, and `attempts`, what was tried in order.

    An attempt is entered before its episode is written, so that a run which goes on repeats nothing and leaves nothing
    out. Raises FileExistsError for a folder that has something else, and ValueError for one that was begun with other
    settings.
    """

    def __init__(self, out: Path, settings: Mapping[str, Any], codec: str):
        self.out, self.codec = out, codec
        self.settings = json.loads(json.dumps({**settings, "codec": codec}))
        self.attempts: list[dict[str, Any]] = []
        self._writer: DatasetWriter | None = None
        if out.exists() and any(out.iterdir()):
            self._resume()

    def _resume(self) -> None:
        if not (self.out / ATTEMPTS).exists():
            raise FileExistsError(f"{self.out} exists already and was not begun by pi0-collect; choose another folder")
        found, info = read_json(self.out / ATTEMPTS), read_json(self.out / "meta" / "info.json")
        if changed := sorted(key for key in self.settings if found["settings"].get(key) != self.settings[key]):
            said = ", ".join(f"{key} {found['settings'].get(key)!r}, not {self.settings[key]!r}" for key in changed)
            raise ValueError(f"{self.out} was begun with other settings: {said}")
        own = {name: f for name, f in info["features"].items() if name.startswith(("observation.", "action"))}
        options = {"fps": info["fps"], "features": own, "robot_type": info["robot_type"], "codec": self.codec}
        self._writer = DatasetWriter(self.out, **options, resume=True)
        # An episode whose files were not all in place when the run ended is done again, and what came after it.
        rows, episodes = found["attempts"], self._writer.episodes
        kept = [row["dataset_episode"] is None or row["dataset_episode"] < episodes for row in rows]
        self.attempts = rows[: kept.index(False)] if False in kept else rows

    def of(self, task: str) -> list[dict[str, Any]]:
        """The attempts of a task."""
        return [row for row in self.attempts if row["task"] == task]

    def add(self, reference: Mapping[str, Any], episode: int, reply: Reply, keep: bool) -> None:
        """Enter an attempt, and write its frames where they are kept."""
        if self._writer is None:
            self._writer = DatasetWriter(self.out, **_format(reference, reply), codec=self.codec)
        row = {"task": task_name(reference), "episode": episode, "success": reply.success, "steps": len(reply.frames)}
        self.attempts.append(row | {"dataset_episode": self._writer.episodes if keep else None})
        content = {"settings": self.settings, "attempts": self.attempts}
        write_text(self.out / ATTEMPTS, json.dumps(content, indent=1) + "\n")
        if keep:
            _save(self._writer, reply)

    def report(self, task: str) -> None:
        """Print what there is of a task."""
        rows = self.of(task)
        kept = [row for row in rows if row["dataset_episode"] is not None]
        frames, won = sum(row["steps"] for row in kept), sum(row["success"] for row in rows)
        print(f"{task}: {won} of {len(rows)} succeeded, {len(kept)} episodes kept, {frames} frames", flush=True)


def collect(
    out: Path,
    pool: Pool,
    references: Sequence[Mapping[str, Any]],
    *,
    episodes: int | Sequence[int],
    workers: int,
    seed: int = 0,
    cameras: Sequence[str] | None = None,
    noise: float = 0.0,
    after: int = 5,
    limit: int | None = None,
    codec: str = "h264",
    actions: Sequence[Path] = (),
) -> list[dict[str, Any]]:
    """Record `episodes` successful demonstrations of the scripted expert of each task; returns all attempts.

    `episodes` is one number for all tasks, or one for each. Or replay `actions`, files with an array of this name,
    [N, A], one of each episode of one task, from episode 0 on.

    Failed ones are left out, and listed in `meta/attempts.json`. Episodes are in the order of their numbers, whatever
    the number of workers; the same call goes on where it was cut off. Raises ValueError for other numbers of `episodes`
    and of tasks, and for an expert that fails too often, RuntimeError for an error of a simulator, and what
    Demonstrations raises.
    """
    settings = {"tasks": [dict(r) for r in references], "seed": seed, "noise": noise, "after": after, "limit": limit}
    numbers = [episodes] if isinstance(episodes, int) else [*episodes]
    numbers = numbers * len(references) if len(numbers) == 1 else numbers
    if len(numbers) != len(references):
        raise ValueError(f"episodes has {len(numbers)} numbers for {len(references)} tasks; give one, or one for each")
    replayed = [_actions(file) for file in actions]
    if replayed and len(references) != 1:
        raise ValueError(f"actions are those of one task; these are {len(references)}")
    expert = [digest(file, "sha256")[:16] for file in actions] or "scripted"
    found = Demonstrations(out, settings | {"cameras": cameras, "expert": expert}, codec)
    names = None if cameras is None else tuple(cameras)
    for reference, wanted in zip(references, numbers, strict=True):
        task = task_name(reference)
        kept, number = sum(row["success"] for row in found.of(task)), len(found.of(task))
        while kept < wanted and not (replayed and number >= len(replayed)):
            slots = range(min(workers, len(replayed) - number) if replayed else workers)
            commands = {}
            for slot in slots:
                begin = Begin(reference, seed, number + slot, names, limit)
                commands[slot] = Demonstrate(begin, noise, after, replayed[number + slot] if replayed else None)
            replies = pool.run(commands)
            for slot, reply in sorted(replies.items()):
                if reply.error:
                    raise RuntimeError(f"{task}, seed {seed}, episode {number + slot}: {reply.error}")
                if kept < wanted:
                    found.add(reference, number + slot, reply, reply.success)
                    kept += reply.success
            number += workers
            failed = len(found.of(task)) - kept
            if not replayed and failed >= 15 and failed > MOST_FAILED * len(found.of(task)):
                raise ValueError(f"{task}: the expert failed in {failed} of {len(found.of(task))} attempts")
        found.report(task)
    return found.attempts


def _actions(file: Path) -> np.ndarray:
    """The actions [N, A] of a file, as `pi0-rollout` writes them to trajectories/. Raises ValueError."""
    actions = read_npz(file).get("actions")
    if actions is None or actions.ndim != 2 or actions.dtype.kind != "f" or not np.isfinite(actions).all():
        raise ValueError(f"{file} has no `actions`, finite numbers [N, A]")
    return actions.astype(np.float32)


def collect_policy(out: Path, pool: Pool, plan: Plan, actor: Actor, codec: str = "h264") -> list[dict[str, Any]]:
    """Record what a policy does in the episodes of a plan, failures too, to be corrected; returns all attempts.

    Which episodes succeeded is in `meta/attempts.json`. Raises FileExistsError for a folder that has something: it does
    not go on with one. Raises RuntimeError for an error of a simulator.
    """
    if out.exists() and any(out.iterdir()):
        raise FileExistsError(f"{out} exists already; a policy's episodes are recorded to a new folder")
    found = Demonstrations(out, {"plan": dataclasses.asdict(plan), "expert": actor.describe()}, codec)

    def record(reference: Mapping[str, Any], episode: int, reply: Reply) -> None:
        if reply.error:
            raise RuntimeError(f"{task_name(reference)}, episode {episode}: {reply.error}")
        found.add(reference, episode, reply, keep=True)

    with tempfile.TemporaryDirectory(prefix="pi0-") as folder:
        Rollout(plan, actor, pool, Path(folder) / "rollout", recorder=record).run()
    for reference in plan.references:
        found.report(task_name(reference))
    return found.attempts


def _format(reference: Mapping[str, Any], reply: Reply) -> dict[str, Any]:
    """The arguments of the writer for an environment's frames."""
    observation, action = reply.frames[0]
    features: dict[str, dict[str, Any]] = {}
    for name, value in observation.items():
        if name == "prompt":
            continue
        if value.ndim == 3:
            features[f"observation.images.{name}"] = {"dtype": "video", "shape": list(value.shape)}
        else:
            features[f"observation.{name}"] = {"dtype": "float32", "shape": list(value.shape)}
    features["action"] = {"dtype": "float32", "shape": list(action.shape)}
    robot = find_environment(reference["name"]).robot
    name = robot if isinstance(robot, str) else robot["name"]
    return {"fps": reply.fps, "features": features, "robot_type": name}


def _save(writer: DatasetWriter, reply: Reply) -> None:
    episode = writer.begin()
    try:
        for observation, action in reply.frames:
            frame: dict[str, Any] = {"action": np.asarray(action, np.float32)}
            for name, value in observation.items():
                if name != "prompt":
                    frame[f"observation.{'images.' if value.ndim == 3 else ''}{name}"] = value
            episode.add(frame, observation["prompt"])
        episode.save()
    except BaseException:
        episode.discard()
        raise


@exit_on_error("pi0-collect", RuntimeError)
def main(arguments: list[str] | None = None) -> None:
    """The command `pi0-collect`. Raises ValueError for options that exclude each other."""
    parser = make_parser(
        "pi0-collect",
        "Record demonstrations of a scripted expert in simulation as a LeRobot v3.0 dataset. The same command goes on "
        "where it was cut off. Or record what a policy does.",
        "examples:\n"
        "  pi0-collect data/reach --env metaworld/reach-v3 --expert scripted --episodes 50\n"
        "  pi0-collect data/two --env metaworld/reach-v3 metaworld/drawer-open-v3 --noise 0.3 --workers 2\n"
        "  pi0-collect data/mistakes --env metaworld/reach-v3 --from-policy runs/metaworld_rollout",
    )
    parser.add_argument("out", type=local_output_path, metavar="OUT", help="the dataset's folder, new or begun")
    parser.add_argument(
        "--env", nargs="+", required=True, metavar="NAME", help='"metaworld/reach-v3", "module:Name", …'
    )
    parser.add_argument("--expert", choices=("scripted",), help="who acts: the simulator's scripted expert (default)")
    parser.add_argument(
        "--actions", nargs="+", type=Path, metavar="FILE", help="or recorded actions: .npz files of episodes 0, 1, …"
    )
    parser.add_argument("--from-policy", metavar="CHECKPOINT", help="or this policy: all episodes, failed ones too")
    parser.add_argument("--side", default="torch", help="of the policy, as pi0-rollout has it (default torch)")
    parser.add_argument("--replan", type=int, metavar="N", help="actions applied of the policy's chunks (default all)")
    parser.add_argument(
        "--episodes",
        type=int,
        nargs="+",
        default=[50],
        metavar="N",
        help="successful ones of a task (default 50), or a number for each task in turn",
    )
    parser.add_argument("--seed", type=int, default=0, help="of initial states and noise (default 0)")
    parser.add_argument("--workers", type=int, default=1, metavar="N", help="processes with simulators (default 1)")
    parser.add_argument("--cameras", nargs="+", metavar="NAME", help="default: the environment's choice")
    parser.add_argument(
        "--noise", type=float, default=0.0, metavar="STD", help="of what is applied, not recorded (DART; default 0)"
    )
    parser.add_argument("--after", type=int, default=5, metavar="N", help="steps after the success (default 5)")
    parser.add_argument("--limit", type=int, metavar="N", help="steps of an attempt (default: the environment's)")
    parser.add_argument("--codec", choices=CODECS, default="h264", help="of the videos (default h264)")
    args = parser.parse_args(arguments)
    require_extra("data", "av", "pyarrow")
    if min(args.episodes) < 1 or args.noise < 0 or args.after < 0:
        raise ValueError("episodes must be at least 1, noise and after at least 0")
    if args.actions and (args.expert or args.noise or args.from_policy):
        raise ValueError("--actions are replayed as they are: leave out --expert, --noise and --from-policy")
    if args.from_policy is None:
        if args.replan is not None:
            raise ValueError("--replan is for --from-policy")
        names = ("episodes", "workers", "seed", "cameras", "noise", "after", "limit", "codec")
        options = {name: getattr(args, name) for name in names} | {"actions": args.actions or ()}
        if args.actions:
            options |= {"episodes": len(args.actions)}
        with Pool(args.workers) as pool:
            collect(args.out, pool, pool.tasks(args.env), **options)
        return
    if len(args.episodes) > 1:
        raise ValueError("--episodes is one number for --from-policy")
    unused = ("expert", "cameras", "noise")
    if wrong := [name for name in unused if getattr(args, name) != parser.get_default(name)]:
        raise ValueError(f"--{wrong[0]} is for a scripted expert, not for --from-policy")
    actor = LocalActor(args.from_policy, Side.parse(args.side), BATCH)
    with Pool(args.workers) as pool:
        references = tuple(pool.tasks(args.env))
        limits = {task_name(reference): args.limit for reference in references}
        replan = args.replan or actor.horizon
        assert replan is not None
        plan = Plan(references, args.episodes[0], args.seed, replan, batch_size=BATCH, limits=limits)
        collect_policy(args.out, pool, plan, actor, args.codec)
