"""Which frames a run sees, in which order: episodes split in two, and datasets mixed. Pure functions of a seed."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import numpy as np

BLOCK = 4096  # positions in which a mixture keeps its weights exactly, to a frame


def split_episodes(
    episodes: Sequence[int], validation: float | Sequence[int], seed: int = 0
) -> tuple[list[int], list[int]]:
    """Split episode numbers into those of training and of validation, each in the order given.

    `validation` is a list of episodes, or the fraction of them that `seed` draws: at least one, unless it is 0. Raises
    ValueError for unknown episodes, and if none is left to train on.
    """
    if isinstance(validation, int | float):
        if not 0 <= validation < 1:
            raise ValueError(f"the validation fraction is {validation}; it must be from 0 to below 1")
        count = max(round(validation * len(episodes)), 1) if validation else 0
        held_out = {int(n) for n in np.random.default_rng(seed).permutation(np.asarray(episodes, int))[:count]}
    else:
        held_out = set(validation)
    if not held_out < set(episodes):
        raise ValueError(f"validation episodes {sorted(held_out)} must be, and leave, some of {list(episodes)}")
    return [n for n in episodes if n not in held_out], [n for n in episodes if n in held_out]


@dataclasses.dataclass(frozen=True)
class Mixture:
    """An endless shuffled sequence of the frames of several datasets, in proportion to `weights` (default: by size).

    Position p is always the same frame, on every worker and host. Each `BLOCK` positions have the weights' share of
    each dataset, and each dataset's frames come all once, newly shuffled, before any comes again. Its length is that of
    all datasets. Raises ValueError for weights that do not fit, and datasets without frames.
    """

    datasets: Sequence[Any]
    weights: Sequence[float] | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        sizes = [len(dataset) for dataset in self.datasets]
        weights = sizes if self.weights is None else self.weights
        if not sizes or min(sizes) == 0:
            raise ValueError(f"a mixture needs datasets with frames; they have {sizes}")
        if len(weights) != len(sizes) or not np.isfinite(weights).all() or min(weights) <= 0:
            raise ValueError(f"weights are {list(weights)}; {len(sizes)} positive ones are needed")
        exact = np.asarray(weights, float) / np.sum(weights) * BLOCK
        shares = exact.astype(int)
        shares[np.argsort(shares - exact, kind="stable")[: BLOCK - shares.sum()]] += 1  # largest remainders first
        if shares.min() == 0:
            raise ValueError(f"weights are {list(weights)}; the smallest must be at least 1/{BLOCK} of their sum")
        object.__setattr__(self, "_shares", tuple(int(share) for share in shares))

    def __len__(self) -> int:
        return sum(len(dataset) for dataset in self.datasets)

    def locate(self, position: int) -> tuple[int, int]:
        """The dataset and the frame of it that stand at a position from 0 on, without end."""
        if position < 0:
            raise IndexError(f"position {position} is negative")
        block, place = divmod(int(position), BLOCK)
        shares: tuple[int, ...] = self._shares  # type: ignore[attr-defined]
        which, ranks = _block(shares, self.seed, block)
        dataset = int(which[place])
        epoch, nth = divmod(block * shares[dataset] + int(ranks[place]), len(self.datasets[dataset]))
        return dataset, int(_order(len(self.datasets[dataset]), self.seed, dataset, epoch)[nth])

    def __getitem__(self, position: int) -> Any:
        """The item at a position."""
        dataset, frame = self.locate(position)
        return self.datasets[dataset][frame]


@functools.lru_cache(maxsize=16)
def _block(shares: tuple[int, ...], seed: int, block: int) -> tuple[np.ndarray, np.ndarray]:
    """For each position of a block: which dataset, and how many of that dataset's came before it in the block."""
    which = np.random.default_rng((seed, 0, block)).permutation(np.repeat(np.arange(len(shares)), shares))
    ranks = np.empty_like(which)
    for dataset, share in enumerate(shares):
        ranks[which == dataset] = np.arange(share)
    return which, ranks


@functools.lru_cache(maxsize=16)
def _order(size: int, seed: int, dataset: int, epoch: int) -> np.ndarray:
    """The order of a dataset's frames in an epoch."""
    return np.random.default_rng((seed, 1, dataset, epoch)).permutation(size)
