"""Training and validation splits, and shuffled mixtures of datasets, as pure functions of a seed."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import numpy as np

BLOCK = 4096  # positions; each block has the weights' exact share of frames


def split_episodes(
    episodes: Sequence[int], validation: float | Sequence[int], seed: int = 0
) -> tuple[list[int], list[int]]:
    """Split episode numbers into a training and a validation list, each in the given order.

    `validation` is a list of episodes, or a fraction to draw with `seed`: at least one episode, unless it is 0. Raises
    ValueError for unknown episodes, and if none is left for training.
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
    """An infinite shuffled sequence of frames of several datasets, in proportion to `weights` (default: by size).

    The frame at a position is the same on every worker and host. Each block of `BLOCK` positions has the weights' share
    of each dataset; each dataset is reshuffled after every pass over it. The length is that of all datasets together.
    Raises ValueError for weights that do not match the datasets, and datasets without frames.
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
        """The dataset and its frame at a position from 0 on."""
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
    """For each position of a block: its dataset, and how many frames of that dataset precede it in the block."""
    which = np.random.default_rng((seed, 0, block)).permutation(np.repeat(np.arange(len(shares)), shares))
    ranks = np.empty_like(which)
    for dataset, share in enumerate(shares):
        ranks[which == dataset] = np.arange(share)
    return which, ranks


@functools.lru_cache(maxsize=16)
def _order(size: int, seed: int, dataset: int, epoch: int) -> np.ndarray:
    """The order of a dataset's frames in an epoch."""
    return np.random.default_rng((seed, 1, dataset, epoch)).permutation(size)
