"""What is damaged in a LeRobot dataset: `find_damage`, `pi0-check-data`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from tqdm import tqdm

from pi0.datasets.errors import DataError
from pi0.datasets.lerobot import LeRobotDataset


def find_damage(root: str | Path, *, decode: bool = True, **options: object) -> list[DataError]:
    """Everything that reading a dataset would raise, in order of episodes: the first problem of rows and each camera.

    `decode` decodes every picture; without, videos are only measured by their indices. `options` are those of
    `LeRobotDataset` that say what is read. A dataset that cannot be opened is one problem.
    """
    try:
        dataset = LeRobotDataset(root, skip_damaged=True, **options)  # type: ignore[arg-type]
    except DataError as error:
        return [error]
    problems = list(dataset.skipped)
    for position, episode in enumerate(tqdm(dataset.episodes if decode else [], desc="decoding", unit="episode")):
        for camera in dataset.cameras:
            try:
                for frame in range(episode.length):
                    dataset.picture(camera, position, frame)
            except DataError as error:
                problems.append(error)
    return sorted(problems, key=lambda problem: -1 if problem.episode is None else problem.episode)


def main(arguments: list[str] | None = None) -> None:
    """The command `pi0-check-data`; exits with 1 where something is damaged."""
    parser = argparse.ArgumentParser(
        prog="pi0-check-data",
        description="Look for damage in a LeRobot dataset: missing, truncated and undecodable files, lengths that do "
        "not match, NaN in states and actions, timestamps that do not fit the frame rate, missing tasks. Names file, "
        "episode and frame of each, and exits with 1.",
        epilog="examples:\n"
        "  pi0-check-data bundled://metaworld_v30\n"
        "  pi0-check-data hf://datasets/lerobot/pusht --no-decode",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("dataset", help="a dataset's folder, hf://datasets/... or bundled://...")
    parser.add_argument("--decode", action=argparse.BooleanOptionalAction, default=True, help="decode every picture")
    parser.add_argument("--states", nargs="+", metavar="COLUMN", help="default: observation.state")
    parser.add_argument("--actions", nargs="+", metavar="COLUMN", help="default: action")
    args = parser.parse_args(arguments)
    columns = {name: value for name, value in vars(args).items() if name in ("states", "actions") and value}
    try:
        problems = find_damage(args.dataset, decode=args.decode, **columns)
    except (ValueError, OSError) as error:
        print(f"pi0-check-data: {error}", file=sys.stderr)
        sys.exit(1)
    if not problems:
        print(f"{args.dataset}: no damage found{'' if args.decode else ', without decoding pictures'}")
        return
    print(table(problems))
    sys.exit(1)


def table(problems: list[DataError]) -> str:
    """One line for each problem, in columns."""
    head = ("episode", "frame", "file", "problem")
    rows = [[str("" if v is None else v) for v in (p.episode, p.frame, p.file, p.problem)] for p in problems]
    widths = [max(len(row[i]) for row in [head, *rows]) for i in range(3)]
    return "\n".join(
        "  ".join([row[0].rjust(widths[0]), row[1].rjust(widths[1]), row[2].ljust(widths[2]), row[3]])
        for row in [head, *rows]
    )
