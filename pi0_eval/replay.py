"""Compare a policy's actions with recorded ones, open loop: `replay`, `pi0-replay`.

Axes: F frames, A action dim, N draws of noise.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import itertools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pi0.command import (
    add_checkpoint,
    add_dataset,
    add_preset,
    add_robot,
    exit_on_error,
    local_output_path,
    make_parser,
    output_path,
)
from pi0.config import DTYPES
from pi0.datasets.base import Dataset
from pi0.datasets.registry import find_format, open_dataset
from pi0.datasets.statistics import frame_numbers
from pi0.look import dimension_labels
from pi0.plugins import require_extra
from pi0.policy.policy import Policy
from pi0.robots.robot import Robot
from pi0.robots.transforms import DeltaActions
from pi0.storage import new_folder, require_replaceable
from pi0_eval.viewer import write_rerun

NOISE = "policy.noise"  # a column of recordings of a server: what each chunk was sampled from, flat
FILES: dict[str, Any] = {"marker": ("replay.json",), "files": ("episode_*.png",)}  # of the folder it writes


@dataclasses.dataclass(frozen=True, eq=False)
class Replayed:
    """An episode's actions in the robot's units: `recorded` [F, A] and `predicted` [N, F, A].

    `failed` of `chunks`, counted over all draws, are token sequences of π0-FAST that do not decode to actions.
    """

    episode: int
    task: str
    recorded: np.ndarray
    predicted: np.ndarray
    chunks: int
    failed: int


def replay(
    policy: Policy, dataset: Dataset, *, every: int | None = None, draws: int = 1, batch_size: int = 16
) -> list[Replayed]:
    """Predict the episodes of a dataset, with a new action chunk `every` so many frames (default: the whole chunk).

    Where the dataset has NOISE among its states, it is that of the first draw. Raises ValueError for an `every` longer
    than a chunk, and for a dataset of another robot.
    """
    horizon = policy.config.action_horizon
    every = horizon if every is None else every
    if not 1 <= every <= horizon or draws < 1 or batch_size < 1:
        raise ValueError(f"every {every} must be 1 to {horizon}; draws {draws} and batch_size {batch_size} at least 1")
    recorded = recorded_actions(dataset, policy.pipeline.robot)
    bounds = list(itertools.pairwise(dataset.starts.tolist()))
    frames = [i for start, end in bounds for i in range(start, end, every)]
    size, parts = min(batch_size, len(frames)), []
    for first in range(0, len(frames), size):
        chosen = [dataset[i] for i in frames[first : first + size]]
        full = chosen + chosen[-1:] * (size - len(chosen))  # of constant size, so that JAX compiles once
        noise = None
        if NOISE in dataset.states and not policy.config.family.action_tokens:
            noise = np.stack([frame[NOISE] for frame in full]).reshape(size, horizon, -1)
        parts.append([policy.infer_batch(full, None if draw else noise) for draw in range(draws)])
    joined = {
        key: np.concatenate([np.stack([result[key] for result in part], axis=1) for part in parts])[: len(frames)]
        for key in parts[0][0].keys() - {"timing"}
    }
    actions, decoded = joined["actions"][:, :, :every], joined.get("decoded", np.ones((len(frames), draws), bool))
    episodes, first = [], 0
    for episode, (start, end) in zip(dataset.episodes, bounds, strict=True):
        own = slice(first, first := first + len(range(start, end, every)))
        predicted = np.concatenate(list(actions[own]), axis=1)[:, : end - start]
        task = dataset.task(start)
        chunks, failed = decoded[own].size, int((~decoded[own]).sum())
        episodes.append(Replayed(episode.index, task, recorded[start:end], predicted, chunks, failed))
    return episodes


def recorded_actions(dataset: Dataset, robot: Robot) -> np.ndarray:
    """The recorded actions [F, A] of all frames, in the dimensions that the robot uses."""
    parts = []
    for data in frame_numbers(dataset, robot):
        absolute = data if robot.delta_mask is None else DeltaActions(robot.delta_mask).inverse(data)
        parts.append(absolute["actions"][:, 0])
    return robot.from_model({"actions": np.concatenate(parts)})["action"]


def compare_actions(episodes: Sequence[Replayed], names: Sequence[str], threshold: float = 0.1) -> dict[str, Any]:
    """Prediction errors by dimension and by episode, as plain values.

    `mae` and `mse` are in the robot's units; `within` is the fraction of actions with an error of at most `threshold`
    times the recorded range; `mse_to_variance` is 1 for predicting the mean action, None where actions are constant.
    """
    recorded = np.concatenate([e.recorded for e in episodes])
    errors = np.abs(np.concatenate([e.predicted - e.recorded for e in episodes], axis=1, dtype=np.float64))
    columns: dict[str, np.ndarray] = {
        "mae": errors.mean((0, 1)),
        "mse": np.square(errors).mean((0, 1)),
        "within": (errors <= threshold * np.ptp(recorded, axis=0)).mean((0, 1)),
    }
    variance = recorded.astype(np.float64).var(axis=0)
    rows: list[dict[str, Any]] = []
    for i, name in enumerate(names):
        relative = float(columns["mse"][i] / variance[i]) if variance[i] > 0 else None
        rows.append({"name": name} | {k: float(v[i]) for k, v in columns.items()} | {"mse_to_variance": relative})
    by_episode = []
    for e in episodes:
        error = np.abs(e.predicted - e.recorded.astype(np.float64))
        figures = {"mae": error.mean((0, 1)).tolist(), "mse": np.square(error).mean((0, 1)).tolist()}
        by_episode.append({"episode": e.episode, "task": e.task, "frames": len(e.recorded)} | figures)
    chunks, failed = sum(e.chunks for e in episodes), sum(e.failed for e in episodes)
    totals = {"frames": len(recorded), "chunks": chunks, "failed_chunks": failed, "threshold": threshold}
    return totals | {"dimensions": rows, "episodes": by_episode}


def table(figures: Mapping[str, Any]) -> str:
    """The errors by dimension of `compare_actions` as text."""
    width = max(len(row["name"]) for row in figures["dimensions"])
    within = f"within {figures['threshold']:.0%}"
    lines = [f"{'':{width}}{'MAE':>12}{'MSE':>12}{within:>14}{'MSE/variance':>14}"]
    for row in figures["dimensions"]:
        relative = "constant" if row["mse_to_variance"] is None else f"{row['mse_to_variance']:.3f}"
        shown = f"{row['mae']:>12.4g}{row['mse']:>12.4g}{row['within']:>14.1%}{relative:>14}"
        lines.append(f"{row['name']:{width}}{shown}")
    if figures["failed_chunks"]:
        failed = f"{figures['failed_chunks']} of {figures['chunks']} chunks"
        lines.append(f"{failed} did not decode to actions: zero normalized actions instead")
    return "\n".join(lines)


def action_names(dataset: Dataset, robot: Robot) -> list[str]:
    """The names of the robot's action dimensions in the dataset; without them, "action[0]" and so on."""
    names = [name for key in robot.action_keys(dataset.features) for name in dataset.dimension_names(key)]
    return names if len(names) == robot.action_dim else [f"action[{i}]" for i in range(robot.action_dim)]


def action_labels(dataset: Dataset, robot: Robot) -> list[str]:
    """`action_names` with the units that the dataset's features say, for plots."""
    names = action_names(dataset, robot)
    features = [dataset.features[key] for key in robot.action_keys(dataset.features)]
    return dimension_labels(names, features[0].get("units") if len(features) == 1 else None)


@exit_on_error("pi0-replay")
def main(arguments: list[str] | None = None) -> None:
    """The command `pi0-replay`."""
    parser = make_parser(
        "pi0-replay",
        "Compare a policy's actions with recorded ones, open loop: at recorded frames it predicts an action chunk, "
        "which is compared with the recorded actions, dimension by dimension, in the robot's units.",
        "examples:\n"
        "  pi0-replay runs/demo/export bundled://metaworld_v30 --episodes 3 7 11 15 --out runs/replay\n"
        "  pi0-replay runs/aloha data/aloha --framework jax --every 10\n"
        "  pi0-replay gs://openpi-assets/checkpoints/pi05_droid data/droid --preset pi05_droid\n\n"
        "written to the folder:\n"
        "  replay.json, and episode_<number>.png, predicted and recorded actions over time",
    )
    add_checkpoint(parser)
    add_dataset(parser)
    add_robot(parser)
    add_preset(parser)
    parser.add_argument("--action-horizon", type=int, metavar="N", help="where neither checkpoint nor preset says it")
    parser.add_argument("--episodes", type=int, nargs="+", metavar="N", help="default: all")
    parser.add_argument("--framework", choices=("torch", "jax"), default="torch", help="default torch")
    parser.add_argument("--out", type=output_path, metavar="FOLDER", help="a new folder for figures and plots")
    parser.add_argument("--overwrite", action="store_true", help="replace that folder if it exists")
    parser.add_argument("--rerun", type=local_output_path, metavar="FILE", help="an .rrd file for the Rerun viewer")
    parser.add_argument("--tokenizer", metavar="FILE", help="where the checkpoint names none (default PaliGemma's)")
    parser.add_argument("--dtype", choices=DTYPES, help="compute dtype (default: the checkpoint's)")
    parser.add_argument("--device", help="of PyTorch (default cpu)")
    parser.add_argument("--num-steps", type=int, metavar="N", help="Euler steps (default: the checkpoint's)")
    parser.add_argument("--every", type=int, metavar="N", help="frames between chunks (default: the chunk's length)")
    parser.add_argument("--draws", type=int, default=1, metavar="N", help="of noise for each chunk (default 1)")
    parser.add_argument("--seed", type=int, default=0, help="of the noise (default 0)")
    parser.add_argument("--batch-size", type=int, default=16, metavar="N", help="chunks at a time (default 16)")
    parser.add_argument("--threshold", type=float, default=0.1, help="of `within`: fraction of the recorded range")
    args = parser.parse_args(arguments)
    if args.out is not None:  # fail before the work, not after it
        require_replaceable(args.out, args.overwrite, **FILES)
    if args.rerun is not None:
        require_extra("rerun", "rerun")
    policy = load_policy(args)
    dataset = open_recordings(args, policy.pipeline.robot)
    episodes = replay(policy, dataset, every=args.every, draws=args.draws, batch_size=args.batch_size)
    dimensions = action_names(dataset, policy.pipeline.robot)
    figures = compare_actions(episodes, dimensions, args.threshold)
    print(f"{len(episodes)} episodes, {figures['frames']} frames, {figures['chunks']} chunks\n\n{table(figures)}")
    if args.rerun is not None:
        write_rerun(args.rerun, dataset, policy.pipeline.robot, episodes, dimensions)
        print(f"\n{args.rerun}: pip install rerun-sdk, then rerun {args.rerun}")
    if args.out is not None:
        labels = action_labels(dataset, policy.pipeline.robot)
        settings = {**vars(args), "out": str(args.out), "rerun": None if args.rerun is None else str(args.rerun)}
        write_folder(args.out, episodes, labels, settings | figures, args.overwrite)
        print(f"\n{args.out}: replay.json, {len(episodes)} plots")


def open_recordings(args: argparse.Namespace, robot: Robot) -> Dataset:
    """The dataset of the arguments; of one that `pi0-serve --record` wrote, with the noise."""
    options: dict[str, Any] = {"episodes": args.episodes, "format": args.format}
    found = find_format(args.format)
    features = found.contents(found.locate(args.dataset)).features
    if NOISE in features:
        options["states"] = [*robot.state_keys(features), NOISE]
    return open_dataset(args.dataset, robot, **options)


def load_policy(args: argparse.Namespace) -> Policy:
    """The policy of the checkpoint in the framework. Raises ValueError for --device with JAX."""
    names = ("robot", "preset", "action_horizon", "asset_id", "tokenizer", "dtype", "num_steps", "seed")
    options = {name: getattr(args, name) for name in names} | {"fallback": True}
    if args.device is not None:
        if args.framework != "torch":
            raise ValueError("--device is for PyTorch; for JAX set JAX_PLATFORMS")
        options["device"] = args.device
    return importlib.import_module(f"pi0_{args.framework}").Policy.from_pretrained(args.checkpoint, **options)


def write_folder(
    out: Path, episodes: Sequence[Replayed], names: Sequence[str], figures: Mapping[str, Any], overwrite: bool
) -> None:
    """Write figures and plots, all or nothing. Raises FileExistsError."""
    from pi0.plots import plot_actions  # matplotlib is an extra, and slow to import

    with new_folder(out, overwrite, **FILES) as folder:
        (folder / "replay.json").write_text(json.dumps(figures, indent=2) + "\n")
        for e in episodes:
            title = f"episode {e.episode}: {e.task}"
            target = folder / f"episode_{e.episode:06d}.png"
            plot_actions(e.recorded, {"predicted": e.predicted[0]}, names, target, title)
