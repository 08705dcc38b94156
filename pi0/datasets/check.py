"""Find damaged files, episodes and frames of a dataset; `pi0-check-data`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from tqdm import tqdm

from pi0.command import add_dataset, exit_on_error, make_parser
from pi0.datasets.errors import DataError
from pi0.datasets.registry import find_format


def find_damage(
    root: str | Path, *, format: str = "lerobot", decode: bool = True, **options: object
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
    for position, episode in enumerate(tqdm(dataset.episodes if decode else [], desc="decoding", unit="episode")):
        for camera in dataset.cameras:
            try:
                for frame in range(episode.length):
                    dataset.image(camera, position, frame)
            except DataError as error:
                problems.append(error)
    return sorted(problems, key=lambda problem: -1 if problem.episode is None else problem.episode)


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
    args = parser.parse_args(arguments)
    columns = {name: value for name, value in vars(args).items() if name in ("states", "actions") and value}
    problems = find_damage(args.dataset, format=args.format, decode=args.decode, **columns)
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
