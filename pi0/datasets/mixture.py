"""Training and validation splits, and shuffled mixtures of datasets, as pure functions of a seed."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import numpy as np

BLOCK = 4096  # positions; each block has the weights' exact share of frames
ROUNDS = 8  # of the Feistel network
_MASK = 2**64 - 1


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
    of each dataset; each dataset is reshuffled after every pass over it, by `shuffle`: "feistel" computes the frame at
    a position, "permutation" draws an array of all frames for each pass, as version 0.1 did. The length is that
    of all datasets together. Raises ValueError for weights that do not match the datasets, datasets without frames, and
    an unknown shuffle.
    """

    datasets: Sequence[Any]
    weights: Sequence[float] | None = None
    seed: int = 0
    shuffle: str = "feistel"

    def __post_init__(self) -> None:
        if self.shuffle not in SHUFFLES:
            raise ValueError(f"unknown shuffle {self.shuffle!r}; known are {', '.join(SHUFFLES)}")
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
        """The dataset and its frame at a position from 0 on. Raises IndexError for a negative one."""
        if position < 0:
            raise IndexError(f"position {position} is negative")
        block, place = divmod(int(position), BLOCK)
        shares: tuple[int, ...] = self._shares  # type: ignore[attr-defined]
        which, ranks = _block(shares, self.seed, block)
        dataset = int(which[place])
        epoch, nth = divmod(block * shares[dataset] + int(ranks[place]), len(self.datasets[dataset]))
        return dataset, SHUFFLES[self.shuffle](nth, len(self.datasets[dataset]), (self.seed, 1, dataset, epoch))

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


def feistel(position: int, size: int, key: tuple[int, ...]) -> int:
    """The image of a position in a permutation of 0 to size - 1 that depends on the key, without an array.

    A Feistel network permutes the numbers below the least power of four from `size` on; one that lands beyond `size` is
    permuted again until it does not ("cycle walking", Black and Rogaway 2002): less than four times on average.
    """
    half = max((size - 1).bit_length() + 1, 2) // 2
    mask, value = (1 << half) - 1, position
    while True:
        left, right = value >> half, value & mask
        for round_key in _round_keys(key):
            mixed = ((right + round_key) * 0x9E3779B97F4A7C15) & _MASK  # the finalizer of SplitMix64
            mixed = ((mixed ^ (mixed >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
            mixed = ((mixed ^ (mixed >> 27)) * 0x94D049BB133111EB) & _MASK
            left, right = right, left ^ ((mixed ^ (mixed >> 31)) & mask)
        value = left << half | right
        if value < size:
            return value


def _permutation(position: int, size: int, key: tuple[int, ...]) -> int:
    return int(_permuted(size, key)[position])


SHUFFLES = {"feistel": feistel, "permutation": _permutation}


@functools.lru_cache(maxsize=64)
def _round_keys(key: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(int(k) for k in np.random.SeedSequence(key).generate_state(ROUNDS, np.uint64))


@functools.lru_cache(maxsize=16)
def _permuted(size: int, key: tuple[int, ...]) -> np.ndarray:
    return np.random.default_rng(key).permutation(size)
