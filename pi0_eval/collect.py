"""Demonstrations of scripted experts as LeRobot datasets: `collect`, `pi0-collect`."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pi0.command import exit_on_error, local_output_path, make_parser
from pi0.datasets.writer import CODECS, DatasetWriter
from pi0.plugins import require_extra
from pi0.reading import read_json
from pi0.storage import write_text
from pi0_eval.environments.registry import find_environment, task_name
from pi0_eval.environments.workers import Begin, Demonstrate, Pool, Reply

ATTEMPTS = "meta/attempts.json"  # in the dataset: what was tried, by seed and episode, and what became of it
MOST_FAILED = 0.8  # of a task's attempts, after which it is given up


class Attempts:
    """What was tried for a dataset, in order; written before each episode is, so that a resumed run repeats nothing."""

    def __init__(self, file: Path, settings: Mapping[str, Any], episodes: int):
        self.file, self.settings, self.rows = file, dict(settings), list[dict[str, Any]]()
        if file.exists():
            found = read_json(file)
            if changed := sorted(k for k, v in self.settings.items() if found["settings"].get(k) != v):
                raise ValueError(
                    f"{file}: the dataset was begun with other settings: "
                    + ", ".join(f"{k} {found['settings'].get(k)!r}, not {self.settings[k]!r}" for k in changed)
                )
            # An episode whose files were not all in place when the run ended is done again, and what came after it.
            rows = found["attempts"]
            kept = [row["dataset_episode"] is None or row["dataset_episode"] < episodes for row in rows]
            self.rows = rows[: kept.index(False)] if False in kept else rows

    def add(self, **row: Any) -> None:
        """Enter an attempt."""
        self.rows.append(row)
        write_text(self.file, json.dumps({"settings": self.settings, "attempts": self.rows}, indent=1) + "\n")

    def of(self, task: str) -> list[dict[str, Any]]:
        """The attempts of a task."""
        return [row for row in self.rows if row["task"] == task]


def collect(
    out: Path,
    pool: Pool,
    references: Sequence[Mapping[str, Any]],
    *,
    episodes: int,
    workers: int,
    seed: int = 0,
    cameras: Sequence[str] | None = None,
    noise: float = 0.0,
    after: int = 5,
    limit: int | None = None,
    codec: str = "h264",
) -> dict[str, dict[str, Any]]:
    """Record `episodes` successful demonstrations of each task; returns attempts, kept episodes and frames by task.

    Failed ones are left out, and listed with their seeds in `meta/attempts.json`. Episodes are in the order of their
    seeds, whatever the number of workers; the same call goes on where it was cut off. Raises EnvironmentFailed-like
    ValueError for an expert that fails too often, and RuntimeError for an error of a simulator.
    """
    settings = {"tasks": [dict(r) for r in references], "seed": seed, "noise": noise, "after": after, "limit": limit}
    settings |= {"cameras": None if cameras is None else list(cameras), "codec": codec}
    writer: DatasetWriter | None = None
    attempts: Attempts | None = None
    kept: dict[str, int] = {}
    if (out / "meta" / "info.json").exists():
        info = read_json(out / "meta" / "info.json")
        own = {name: f for name, f in info["features"].items() if name.startswith(("observation.", "action"))}
        writer = DatasetWriter(
            out, fps=info["fps"], features=own, robot_type=info["robot_type"], codec=codec, resume=True
        )
        attempts = Attempts(out / ATTEMPTS, settings, writer.episodes)
    for reference in references:
        task = task_name(reference)
        rows = attempts.of(task) if attempts else []
        kept[task], number = sum(row["success"] for row in rows), len(rows)
        while kept[task] < episodes:
            commands = {}
            for slot in range(workers):
                begin = Begin(reference, seed, number + slot, None if cameras is None else tuple(cameras), limit)
                commands[slot] = Demonstrate(begin, noise, after)
            for slot, reply in sorted(pool.run(commands).items()):
                if reply.error:
                    raise RuntimeError(f"{task}, seed {seed}, episode {number + slot}: {reply.error}")
                if writer is None:
                    writer = DatasetWriter(out, **_format(reference, reply), codec=codec)
                    attempts = Attempts(out / ATTEMPTS, settings, 0)
                assert attempts is not None
                where = writer.episodes if reply.success else None
                attempts.add(
                    task=task, episode=number + slot, success=reply.success, steps=reply.steps, dataset_episode=where
                )
                if reply.success:
                    kept[task] += 1
                    _save(writer, reply)
                if kept[task] == episodes:
                    break
            number += workers
            tried = len(attempts.of(task)) if attempts else 0
            if tried >= 20 and tried - kept[task] > MOST_FAILED * tried:
                raise ValueError(f"{task}: the expert failed in {tried - kept[task]} of {tried} attempts")
        rows = attempts.of(task) if attempts else []
        frames = sum(row["steps"] for row in rows if row["success"])
        print(f"{task}: {kept[task]} of {len(rows)} episodes kept, {frames} frames", flush=True)
    if writer is not None:
        writer.close()
    return {t: {"attempts": len(attempts.of(t)) if attempts else 0, "kept": n} for t, n in kept.items()}


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
    """The command `pi0-collect`."""
    parser = make_parser(
        "pi0-collect",
        "Record demonstrations of a scripted expert in simulation as a LeRobot v3.0 dataset. The same command goes on "
        "where it was cut off.",
        "examples:\n"
        "  pi0-collect data/reach --env metaworld/reach-v3 --expert scripted --episodes 50\n"
        "  pi0-collect data/four --env metaworld/reach-v3 metaworld/drawer-open-v3 --noise 0.3 --workers 2",
    )
    parser.add_argument("out", type=local_output_path, metavar="OUT", help="the dataset's folder, new or begun")
    parser.add_argument(
        "--env", nargs="+", required=True, metavar="NAME", help='"metaworld/reach-v3", "module:Name", …'
    )
    parser.add_argument("--expert", choices=("scripted",), default="scripted", help="who acts (default scripted)")
    parser.add_argument("--episodes", type=int, default=50, metavar="N", help="successful ones of a task (default 50)")
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
    if args.episodes < 1 or args.noise < 0 or args.after < 0:
        raise ValueError("episodes must be at least 1, noise and after at least 0")
    with Pool(args.workers) as pool:
        options = {
            k: getattr(args, k) for k in ("episodes", "workers", "seed", "cameras", "noise", "after", "limit", "codec")
        }
        collect(args.out, pool, pool.tasks(args.env), **options)
