"""Fit a FAST action tokenizer for π0-FAST on recordings; `pi0-fit-fast`."""

from __future__ import annotations

import dataclasses

import numpy as np

from pi0.command import add_dataset, add_robot, exit_on_error, make_parser, output_path
from pi0.datasets.base import Dataset
from pi0.datasets.engine import add_engine
from pi0.datasets.mixture import split_episodes
from pi0.datasets.registry import episode_numbers, open_dataset
from pi0.datasets.statistics import dataset_statistics, frame_numbers
from pi0.robots.normalize import MODES
from pi0.robots.registry import make_robot
from pi0.robots.robot import Robot
from pi0.storage import require_replaceable
from pi0.tokenizers.fast import FOLDER, FASTTokenizer


@dataclasses.dataclass(frozen=True)
class Report:
    """Compression and reconstruction error of a tokenizer on `chunks` normalized chunks.

    `tokens_mean` and `tokens_max` per chunk; `binning`, the T·A tokens of one token per number; `error_max` and
    `error_rms` of the reconstruction, in normalized units.
    """

    chunks: int
    tokens_mean: float
    tokens_max: int
    binning: int
    error_max: float
    error_rms: float

    @classmethod
    def measure(cls, tokenizer: FASTTokenizer, chunks: np.ndarray) -> Report:
        """The report on chunks [N, T, A]."""
        ids = [tokenizer.encode(chunk) for chunk in chunks]
        errors = np.stack([tokenizer.decode(i, *chunks.shape[1:])[0] for i in ids]) - chunks
        lengths = np.array([len(i) for i in ids])
        return cls(
            chunks=len(chunks),
            tokens_mean=float(lengths.mean()),
            tokens_max=int(lengths.max()),
            binning=int(np.prod(chunks.shape[1:])),
            error_max=float(np.abs(errors).max()),
            error_rms=float(np.sqrt(np.mean(errors**2))),
        )

    def row(self, name: str) -> str:
        """A line of the table with the header HEAD."""
        ratio = self.binning / self.tokens_mean
        tokens = f"{self.tokens_mean:12.1f}{self.tokens_max:12d}{self.binning:10d}{ratio:12.1f}"
        return f"{name:10}{self.chunks:8d}{tokens}{self.error_max:12.2e}{self.error_rms:12.2e}"


HEAD = f"{'':10}{'chunks':>8}{'tokens mean':>12}{'tokens max':>12}{'binning':>10}{'compression':>12}" + (
    f"{'error max':>12}{'error RMS':>12}"
)


def action_chunks(dataset: Dataset, robot: Robot) -> np.ndarray:
    """The action chunks [N, T, A] of all frames in the model's units, not normalized; no image is decoded.

    Raises ValueError where the dataset is not the robot's.
    """
    return np.concatenate([numbers["actions"] for numbers in frame_numbers(dataset, robot)])


@exit_on_error("pi0-fit-fast")
def main(arguments: list[str] | None = None) -> None:
    """The command `pi0-fit-fast`. Raises ValueError for episodes that cannot be held out."""
    parser = make_parser(
        "pi0-fit-fast",
        "Fit a FAST action tokenizer on a dataset's action chunks, normalized by its own norm stats, and report tokens "
        "per chunk against one per number (binning), and the reconstruction error in normalized units. The same data "
        "gives the same bytes.",
        "examples:\n"
        "  pi0-fit-fast bundled://metaworld_v30 runs/fast --robot metaworld --action-horizon 10 --vocab-size 512\n"
        "  pi0-fit-fast bundled://metaworld_v30 runs/fast --robot metaworld --held-out 3 7 11 15 --overwrite",
    )
    add_dataset(parser)
    parser.add_argument(
        "output", type=output_path, help="the tokenizer's folder, in the layout of physical-intelligence/fast"
    )
    add_robot(parser, required=True)
    parser.add_argument("--action-horizon", type=int, default=50, help="actions of a chunk (default: 50)")
    parser.add_argument("--scale", type=float, default=10.0, help="steps per unit of a DCT coefficient (default: 10)")
    parser.add_argument("--vocab-size", type=int, default=1024, help="maximum, 256 or more (default: 1024)")
    parser.add_argument("--normalization", choices=MODES, default="quantile", help="as in training (default: quantile)")
    parser.add_argument("--held-out", type=int, nargs="+", default=[], metavar="EPISODE", help="only reported on")
    parser.add_argument("--overwrite", action="store_true", help="replace the tokenizer in the output folder")
    add_engine(parser)
    args = parser.parse_args(arguments)
    root = args.dataset
    try:
        kept, held_out = split_episodes(episode_numbers(root, args.format), args.held_out)
    except ValueError as error:
        raise ValueError(f"--held-out: {error}") from error
    require_replaceable(args.output, args.overwrite, **FOLDER)  # before the work, not after it
    robot = make_robot(args.robot)

    def dataset_of(episodes: list[int]) -> Dataset:
        options = {"action_horizon": args.action_horizon, "episodes": episodes, "cameras": []}
        return open_dataset(root, robot, format=args.format, **options)

    fitted = dataset_of(kept)
    stats = dataset_statistics(fitted, robot, workers=args.workers, engine=args.engine)["actions"].norm_stats()
    chunks = stats.apply(action_chunks(fitted, robot), args.normalization)
    tokenizer = FASTTokenizer.fit(list(chunks), args.scale, args.vocab_size)
    lines = [HEAD, Report.measure(tokenizer, chunks).row("fitted")]
    if held_out:
        others = stats.apply(action_chunks(dataset_of(held_out), robot), args.normalization)
        lines.append(Report.measure(tokenizer, others).row("held out"))
    tokenizer.save(args.output, args.overwrite)
    print("\n".join(lines))
    print(f"\n{tokenizer.vocab_size} tokens, sha256 {tokenizer.sha256}: {args.output}")
