"""Find damaged files, episodes and frames of a dataset; `pi0-check-data`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from tqdm import tqdm

from pi0.command import add_dataset, exit_on_error, make_parser
from pi0.datasets.base import Dataset
from pi0.datasets.engine import add_engine, run_tasks
from pi0.datasets.errors import DataError
from pi0.datasets.registry import find_format


def find_damage(
    root: str | Path,
    *,
    format: str = "lerobot",
    decode: bool = True,
    workers: int = 1,
    engine: str = "local",
    **options: object,
) -> list[DataError]:
    """All problems of a dataset by episode: the first of its rows and of each camera.

    `decode` decodes every image; without it, videos are only checked by their indices. `options` are those of `Dataset`
    that select what is read. A dataset that cannot be opened is one problem.
    """
    try:
        dataset = find_format(format)(root, skip_damaged=True, **options)  # type: ignore[arg-type]
    except DataError as error:
        return [error]
    problems = list(dataset.skipped)
    positions = range(len(dataset.episodes) if decode else 0)
    with tqdm(total=len(positions), desc="decoding", unit="episode") as progress:
        for found in run_tasks(_decode, dataset, positions, workers=workers, engine=engine, progress=progress):
            problems += found
    return sorted(problems, key=lambda problem: -1 if problem.episode is None else problem.episode)


def _decode(dataset: Dataset, position: int) -> list[DataError]:
    """The first problem of each camera in an episode's images."""
    problems = []
    for camera in dataset.cameras:
        try:
            for frame in range(dataset.episodes[position].length):
                dataset.image(camera, position, frame)
        except DataError as error:
            problems.append(error)
    return problems


@exit_on_error("pi0-check-data")
def main(arguments: list[str] | None = None) -> None:
    """The command `pi0-check-data`; exits with 1 where something is damaged."""
    parser = make_parser(
        "pi0-check-data",
        "Find damage in a dataset: missing, truncated and undecodable files, lengths that do not match, NaN in states "
        "and actions, timestamps that do not match the frame rate, missing tasks. Prints file, episode and frame of "
        "each, and exits with 1.",
        "examples:\n  pi0-check-data bundled://metaworld_v30\n  pi0-check-data hf://datasets/lerobot/pusht --no-decode",
    )
    add_dataset(parser)
    parser.add_argument("--decode", action=argparse.BooleanOptionalAction, default=True, help="decode every image")
    parser.add_argument("--states", nargs="+", metavar="COLUMN", help="default: observation.state")
    parser.add_argument("--actions", nargs="+", metavar="COLUMN", help="default: action")
    add_engine(parser)
    args = parser.parse_args(arguments)
    columns = {name: value for name, value in vars(args).items() if name in ("states", "actions") and value}
    run = {"workers": args.workers, "engine": args.engine}
    problems = find_damage(args.dataset, format=args.format, decode=args.decode, **run, **columns)
    if not problems:
        print(f"{args.dataset}: no damage found{'' if args.decode else ', without decoding images'}")
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
