"""Norm stats of a dataset of any size: one pass, bounded memory, exactly mergeable; `pi0-stats`."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from tqdm import tqdm

from pi0.command import add_dataset, add_robot, exit_on_error, make_parser, output_path
from pi0.datasets.base import Dataset
from pi0.datasets.engine import add_engine, run_tasks
from pi0.datasets.registry import open_dataset
from pi0.plots import plot_distributions
from pi0.plugins import require_extra
from pi0.reading import naming
from pi0.robots.normalize import NormStats, save_norm_stats
from pi0.robots.registry import make_robot
from pi0.robots.robot import Robot, gripper_dims
from pi0.robots.transforms import DeltaActions
from pi0.storage import below, new_file

BINS = 8192  # of each dimension's histogram; at least half of them, less one, span the data
LOWEST_EXPONENT = -1000  # of a bin's width, for data that are all zero
MANTISSA = 50  # bits of a bin's number: below float64's 53, so that numbers are exact
BLOCK = 2**21  # numbers processed at a time

NEARLY_CONSTANT = 1e-4  # a spread, in the data's units, below which normalization amplifies noise
OUTLIER = 2.0  # distance outside of [q01, q99] in units of q99 - q01
CLIPPED = 0.02  # share of values at one end
WARNINGS = {  # kinds of harm, and what to think of
    "constant": "normalization makes a small change of these huge; widen their stats by hand, or leave them out",
    "outliers": "they widen a range that a mode with minimum and maximum uses; look at these frames",
    "clipped": "were they clipped when they were recorded?",
}


@dataclasses.dataclass(frozen=True, eq=False)
class RunningStats:
    """Statistics of the N vectors of D numbers seen so far; `a + b` merges two of them.

    `mean`, `m2` (sum of squared deviations), `min`, `max` float64 [D]; `counts` int64 [D, BINS] of the values in
    [first + i, first + i + 1) · 2**exponent. A bin's edges depend only on `min` and `max`, and a coarser bin is the
    union of finer ones, so counts do not depend on how the data were split.
    """

    count: int
    mean: np.ndarray
    m2: np.ndarray
    min: np.ndarray
    max: np.ndarray
    counts: np.ndarray

    @classmethod
    def of(cls, x: np.ndarray) -> RunningStats:
        """The statistics of x [..., D]. Raises ValueError for no vectors, or NaN."""
        x = np.asarray(x, np.float64).reshape(-1, np.shape(x)[-1])
        if not len(x) or not np.isfinite(x).all():
            raise ValueError(f"statistics need finite vectors; got {int((~np.isfinite(x)).sum())} others of {len(x)}")
        mean, low, high = x.mean(axis=0), x.min(axis=0), x.max(axis=0)
        exponent, first = _bins(low, high)
        numbers = np.floor(x * np.ldexp(1.0, -exponent)).astype(np.int64) - first
        return cls(len(x), mean, np.square(x - mean).sum(axis=0), low, high, _count(numbers))

    def __add__(self, other: RunningStats) -> RunningStats:
        """Merge by Chan's formula for mean and deviations (1979). Raises ValueError for other dimensions."""
        if len(self.mean) != len(other.mean):
            raise ValueError(f"statistics of {len(self.mean)} and of {len(other.mean)} dimensions cannot be merged")
        count, difference = self.count + other.count, other.mean - self.mean
        mean = self.mean + difference * (other.count / count)
        m2 = self.m2 + other.m2 + np.square(difference) * (self.count * other.count / count)
        low, high = np.minimum(self.min, other.min), np.maximum(self.max, other.max)
        counts = self._counts_within(low, high) + other._counts_within(low, high)
        return RunningStats(count, mean, m2, low, high, counts)

    def norm_stats(self) -> NormStats:
        """The norm stats. Raises ValueError for fewer than two vectors."""
        if self.count < 2:
            raise ValueError("norm stats need at least 2 frames; there is 1")
        std = np.sqrt(self.m2 / self.count)
        return NormStats(self.mean, std, self.quantile(0.01), self.quantile(0.99), self.min, self.max)

    def quantile(self, q: float) -> np.ndarray:
        """The quantile [D], linear between vectors as NumPy's, with an error below a bin, 2.5e-4 of max - min."""
        rank = q * (self.count - 1)
        below, above = (self._value(r) for r in (int(rank), min(int(rank) + 1, self.count - 1)))
        return np.clip(below + (above - below) * (rank - int(rank)), below, above)  # rounding would cross q01 and q99

    def histogram(self, dim: int, bars: int = 64) -> tuple[np.ndarray, np.ndarray]:
        """Edges [E + 1] and counts [E] of one dimension, for a plot of at most `bars` bars."""
        exponent, first = (int(v[dim]) for v in _bins(self.min, self.max))
        used = np.flatnonzero(self.counts[dim])
        step = -(-(used[-1] + 1 - used[0]) // bars)
        starts = np.arange(used[0], used[-1] + 1, step)
        edges = np.ldexp((first + np.append(starts, starts[-1] + step)).astype(np.float64), exponent)
        return edges, np.add.reduceat(self.counts[dim], starts)

    def _counts_within(self, low: np.ndarray, high: np.ndarray) -> np.ndarray:
        """The counts in the bins of a wider range."""
        (exponent, first), (wider, wider_first) = _bins(self.min, self.max), _bins(low, high)
        numbers = ((first + np.arange(BINS)[:, None]) >> np.minimum(wider - exponent, 62)) - wider_first
        return _count(np.clip(numbers, 0, BINS - 1), self.counts.T)  # bins beyond the ends are empty

    def _value(self, rank: int) -> np.ndarray:
        """The approximate value [D] with `rank` smaller ones: values are spread evenly in a bin."""
        exponent, first = _bins(self.min, self.max)
        sums = self.counts.cumsum(axis=1)
        bins = (sums <= rank).sum(axis=1)
        inside, every = np.take_along_axis(self.counts, bins[:, None], 1)[:, 0], np.arange(len(bins))
        position = (rank - (sums[every, bins] - inside) + 0.5) / inside
        return np.clip(np.ldexp(first + bins + position, exponent), self.min, self.max)


def _bins(low: np.ndarray, high: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The least exponent [D] of a bin's width for which BINS bins span [low, high], and the first bin's number [D]."""
    _, span = np.frexp(high - low)
    _, largest = np.frexp(np.maximum(np.abs(low), np.abs(high)))
    constant, zero = high == low, np.maximum(np.abs(low), np.abs(high)) == 0
    exponent = np.where(constant, LOWEST_EXPONENT, span - int(np.log2(BINS)))
    exponent = np.maximum(exponent, np.where(zero, LOWEST_EXPONENT, np.maximum(largest - MANTISSA, LOWEST_EXPONENT)))
    first, last = (np.floor(np.ldexp(x, -exponent)) for x in (low, high))
    exponent = exponent + (last - first >= BINS)
    return exponent, np.floor(np.ldexp(low, -exponent)).astype(np.int64)


def _count(numbers: np.ndarray, weights: np.ndarray | None = None) -> np.ndarray:
    """The count, or total weight int64 [N, D], of each bin [D, BINS] in numbers [N, D]."""
    dims = numbers.shape[1]
    flat = (numbers + BINS * np.arange(dims)).ravel()
    sums = np.bincount(flat, None if weights is None else weights.ravel(), BINS * dims)  # float64: exact up to 2**53
    return sums.astype(np.int64).reshape(dims, BINS)


def dataset_statistics(
    dataset: Dataset, robot: Robot, *, workers: int = 1, engine: str = "local"
) -> dict[str, RunningStats]:
    """The statistics of `frame_numbers`: "state", and "actions" over whole chunks. Raises ValueError as that does.

    Blocks are the same and merged in the same order for any number of workers, and so the result to the bit.
    """
    blocks, stats = _blocks(dataset, robot), {}  # type: ignore[var-annotated]
    progress = tqdm(total=len(blocks), desc="statistics", unit="block", disable=None if len(blocks) > 1 else True)
    options: dict[str, Any] = {"workers": workers, "engine": engine, "progress": progress}
    for found in run_tasks(_statistics_of, (dataset, robot), blocks, **options):
        for key, new in found.items():
            stats[key] = stats[key] + new if key in stats else new
    return stats


def _statistics_of(shared: tuple[Dataset, Robot], block: range) -> dict[str, RunningStats]:
    return {key: RunningStats.of(x) for key, x in _numbers(*shared, block).items()}


def frame_numbers(dataset: Dataset, robot: Robot) -> Iterator[dict[str, np.ndarray]]:
    """The `state` [N, S] and chunked `actions` [N, T, A] of all frames, N at a time, as inputs of `Normalize`.

    That is after the robot's adapter and its delta transform, if any; no image is decoded. Chunks have the dataset's
    `action_horizon` and repeat an episode's last action beyond its end (openpi `compute_norm_stats.py`). Raises
    ValueError where the dataset is not the robot's.
    """
    for block in _blocks(dataset, robot):
        yield _numbers(dataset, robot, block)


def _blocks(dataset: Dataset, robot: Robot) -> list[range]:
    """The frames that are processed together."""
    action_keys = robot.action_keys(dataset.features)
    if not action_keys:
        raise ValueError(f"the dataset has no actions; it has {sorted(dataset.features)}")
    try:
        table = {key: dataset.table(key) for key in (*robot.state_keys(dataset.features), *action_keys)}
    except KeyError as error:
        raise ValueError(error.args[0]) from error
    size = max(1, BLOCK // (dataset.action_horizon * sum(table[key].shape[-1] for key in action_keys)))
    return [range(start, min(start + size, len(dataset))) for start in range(0, len(dataset), size)]


def _numbers(dataset: Dataset, robot: Robot, block: range) -> dict[str, np.ndarray]:
    data = absolute_numbers(dataset, robot, np.asarray(block))
    return data if robot.delta_mask is None else DeltaActions(robot.delta_mask)(data)


def absolute_numbers(dataset: Dataset, robot: Robot, rows: np.ndarray) -> dict[str, np.ndarray]:
    """As `frame_numbers`, of the frames `rows` [N], with actions before the delta transform. Raises ValueError."""
    action_keys = robot.action_keys(dataset.features)
    last = dataset.starts[np.searchsorted(dataset.starts, rows, side="right")] - 1
    chunks = np.minimum(rows[:, None] + np.arange(dataset.action_horizon), last[:, None])
    keys = (*robot.state_keys(dataset.features), *action_keys)
    with naming(dataset.root):
        return robot.numbers({key: dataset.table(key)[chunks if key in action_keys else rows] for key in keys})


def report(
    stats: Mapping[str, RunningStats],
    names: Mapping[str, Sequence[str]] | None = None,
    grippers: Mapping[str, Sequence[int]] | None = None,
) -> str:
    """A table of all dimensions, and a warning of each kind of harm to training, with the dimensions that have it.

    `names` are those of the dimensions, by key. `grippers` are dimensions that are open or closed most of the time, as
    they should be: they are not reported for it.
    """
    lines, warnings = [], dict[str, list[str]]()
    for key, running in stats.items():
        norm = running.norm_stats()
        assert norm.q01 is not None and norm.q99 is not None
        own = (names or {}).get(key, ())
        named = list(own) if len(own) == len(norm.mean) else [str(dim) for dim in range(len(norm.mean))]
        columns = {"mean": norm.mean, "std": norm.std, "min": running.min, "q01": norm.q01, "q99": norm.q99}
        columns["max"] = running.max
        width = max(3, *map(len, named))
        lines += [f"{key}, {running.count} vectors", "dim".rjust(width) + "".join(f"{name:>12}" for name in columns)]
        for dim, name in enumerate(named):
            lines += [name.rjust(width) + "".join(f"{column[dim]:>12.4g}" for column in columns.values())]
            label = f"{key} {name}" if own else f"{key}[{dim}]"
            for kind, text in dimension_warnings(running, dim).items():
                if kind != "clipped" or dim not in (grippers or {}).get(key, ()):
                    warnings.setdefault(kind, []).append(f"{label} {text}")
        lines += [""]
    found = [f"warning: {'; '.join(texts)}: {WARNINGS[kind]}" for kind, texts in sorted(warnings.items())]
    return "\n".join([*lines, *(found or ["no dimension is nearly constant, clipped or has outliers"])])


def dimension_warnings(stats: RunningStats, dim: int) -> dict[str, str]:
    """What is wrong with one dimension, by kind (a key of WARNINGS)."""
    norm = stats.norm_stats()
    assert norm.q01 is not None and norm.q99 is not None
    std, low, high = norm.std[dim], norm.q01[dim], norm.q99[dim]
    bin_width = (stats.max[dim] - stats.min[dim]) / (BINS // 2)  # equal values look this far apart
    if min(std, high - low) < NEARLY_CONSTANT or high - low <= bin_width:
        return {"constant": f"is nearly constant (std {std:.2g}, q99 - q01 {high - low:.2g})"}
    counts, found = stats.counts[dim][stats.counts[dim] > 0], dict[str, list[str]]()
    for name, value, quantile, end in (
        ("min", stats.min[dim], low, counts[0]),
        ("max", stats.max[dim], high, counts[-1]),
    ):
        ranges, share = abs(value - quantile) / (high - low), end / stats.count
        if ranges > OUTLIER:
            found.setdefault("outliers", []).append(f"{name} {value:.4g} lies {ranges:.1f} times q99 - q01 outside")
        if share > CLIPPED:
            found.setdefault("clipped", []).append(f"is {name} ({value:.4g}) in {share:.0%}")
    return {kind: " and ".join(texts) for kind, texts in found.items()}


@exit_on_error("pi0-stats")
def main(arguments: list[str] | None = None) -> None:
    """The command `pi0-stats`. Raises FileExistsError where norm stats are already and may not be overwritten."""
    parser = make_parser(
        "pi0-stats",
        "Compute the norm stats of a dataset as openpi does, of states and of chunked actions in the model's units, "
        "and warn of dimensions that would harm training. No image is decoded.",
        "examples:\n"
        "  pi0-stats bundled://metaworld_v30 --robot metaworld --action-horizon 10 --out assets --asset-id metaworld\n"
        "  pi0-stats hf://datasets/lab/towels --robot aloha --action-horizon 50 --out assets --asset-id towels\n"
        '  pi0-stats data/towels --robot \'{"name": "aloha", "delta": false}\' --action-horizon 50 --out assets '
        "--asset-id towels\n\n"
        "output files:\n"
        "  <asset id>/norm_stats.json, which openpi reads too, and <asset id>/norm_stats.png, the distribution of each "
        "dimension",
    )
    add_dataset(parser)
    add_robot(parser, required=True)
    parser.add_argument("--action-horizon", required=True, type=int, metavar="T", help="actions in a chunk")
    parser.add_argument("--out", required=True, type=output_path, metavar="FOLDER", help="where <asset id>/ is written")
    parser.add_argument("--asset-id", required=True, metavar="ID", help="the name of these norm stats")
    parser.add_argument("--overwrite", action="store_true", help="replace the norm stats of this asset id")
    add_engine(parser)
    args = parser.parse_args(arguments)
    require_extra("plots", "matplotlib")  # before anything takes long
    folder = below(args.out, args.asset_id)
    if (folder / "norm_stats.json").exists() and not args.overwrite:
        raise FileExistsError(f"{folder} has norm stats already; choose another --asset-id or pass --overwrite")
    robot, options = make_robot(args.robot), {"action_horizon": args.action_horizon, "cameras": []}
    dataset = open_dataset(args.dataset, robot, format=args.format, **options)
    stats = dataset_statistics(dataset, robot, workers=args.workers, engine=args.engine)
    keys = {"state": robot.state_keys(dataset.features), "actions": robot.action_keys(dataset.features)}
    names = {key: [n for column in columns for n in dataset.dimension_names(column)] for key, columns in keys.items()}
    grippers = {key: gripper_dims(names[key], robot, len(running.mean)) for key, running in stats.items()}
    print(report(stats, names, grippers))
    norm_stats = {key: running.norm_stats() for key, running in stats.items()}
    save_norm_stats(folder / "norm_stats.json", norm_stats)
    panels = {
        f"{key} {names[key][dim]}" if names[key] else f"{key}[{dim}]": (
            *running.histogram(dim),
            running.quantile(0.01)[dim],
            running.quantile(0.99)[dim],
        )
        for key, running in stats.items()
        for dim in range(len(running.mean))
    }
    with new_file(folder / "norm_stats.png") as file:
        plot_distributions(panels, file)
    print(f"\n{folder}: norm_stats.json, norm_stats.png")
