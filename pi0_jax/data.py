"""From recordings to batches: a dataset's frames in memory, and which of them each step takes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from pi0.config import ModelConfig
from pi0.datasets import LeRobotDataset
from pi0.observation import Observation, check_actions

Batch = tuple[Observation, np.ndarray]


class FrameData:
    """Every frame of some episodes, decoded and transformed once and kept in memory (images as uint8).

    Frame i gives the model's inputs and the normalized action chunk [T, A] that starts there.
    """

    def __init__(
        self, dataset: LeRobotDataset, transform: Callable[[dict[str, Any]], dict[str, Any]], config: ModelConfig
    ):
        frames = [transform(dataset[i]) for i in range(len(dataset))]
        if not frames:
            raise ValueError("the dataset has no frames in the chosen episodes")
        self.config = config
        self._arrays = {key: np.stack([frame[key] for frame in frames]) for key in frames[0]}

    def __len__(self) -> int:
        return len(self._arrays["state"])

    def batch(self, indices: np.ndarray) -> Batch:
        """The observation and actions [B, T, A] of some frames, checked against the model's contract."""
        data = {key: array[indices] for key, array in self._arrays.items()}
        actions = data.pop("actions")
        return Observation.from_dict(data, self.config), check_actions(actions, self.config, len(indices))


def batch_indices(size: int, batch_size: int, seed: int, step: int) -> np.ndarray:
    """Which frames step `step` trains on: a pure function, so that a resumed run sees the same data.

    Each epoch is a new permutation of the `size` frames; a batch never spans two epochs. Raises ValueError for a
    batch larger than the data.
    """
    if not 0 < batch_size <= size:
        raise ValueError(f"batch_size is {batch_size}; with {size} training frames it must be 1 to {size}")
    epoch, position = divmod(step, size // batch_size)
    order = np.random.default_rng((seed, epoch)).permutation(size)
    return order[position * batch_size : (position + 1) * batch_size]


def epoch_indices(size: int, batch_size: int) -> Iterator[np.ndarray]:
    """All frames once, in order, in full batches: the last one repeats frames from the start to be as long."""
    for start in range(0, size, batch_size):
        yield np.arange(start, start + batch_size) % size
