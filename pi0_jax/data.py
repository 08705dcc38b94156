"""From recordings to batches: a dataset's frames in memory, and which of them each step takes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from pi0.config import ModelConfig
from pi0.datasets import Annotated, LeRobotDataset, Mixture
from pi0.observation import Observation, check_actions

Batch = tuple[Observation, np.ndarray]


class FrameData:
    """Every frame of a dataset or a mixture, decoded and transformed once and kept in memory (images as uint8).

    Frame i gives the model's inputs and the normalized action chunk [T, A] that starts there; the frames of a mixture
    are those of its datasets, one after the other. Pictures that only some frames have are black in the others.
    Attribute `order`: what `batch_indices` takes the frames from.
    """

    def __init__(
        self,
        dataset: LeRobotDataset | Annotated | Mixture,
        transform: Callable[[dict[str, Any]], dict[str, Any]],
        config: ModelConfig,
    ):
        datasets: Sequence[Any] = dataset.datasets if isinstance(dataset, Mixture) else [dataset]
        frames = [transform(part[i]) for part in datasets for i in range(len(part))]
        if not frames:
            raise ValueError("the dataset has no frames in the chosen episodes")
        self.config = config
        self.order = dataset if isinstance(dataset, Mixture) else len(frames)
        whole = {key: frame[key] for frame in frames for key in frame}
        black = {key: np.zeros_like(value) for key, value in whole.items() if key.startswith("image/")}
        self._arrays = {key: np.stack([(black | frame)[key] for frame in frames]) for key in whole}

    def __len__(self) -> int:
        return len(self._arrays["state"])

    def batch(self, indices: np.ndarray) -> Batch:
        """The observation and actions [B, T, A] of some frames, checked against the model's contract."""
        data = {key: array[indices] for key, array in self._arrays.items()}
        actions = data.pop("actions")
        return Observation.from_dict(data, self.config), check_actions(actions, self.config, len(indices))


def batch_indices(order: int | Mixture, batch_size: int, seed: int, step: int) -> np.ndarray:
    """Which frames step `step` trains on: a pure function, so that a resumed run sees the same data.

    Each epoch is a new permutation of `order` frames; a batch never spans two epochs. Of a mixture, the positions that
    come next. Raises ValueError for a batch larger than the data.
    """
    if isinstance(order, Mixture):
        starts = np.cumsum([0, *map(len, order.datasets)])
        places = map(order.locate, range(step * batch_size, (step + 1) * batch_size))
        return np.array([starts[dataset] + frame for dataset, frame in places])
    if not 0 < batch_size <= order:
        raise ValueError(f"batch_size is {batch_size}; with {order} training frames it must be 1 to {order}")
    epoch, position = divmod(step, order // batch_size)
    permutation = np.random.default_rng((seed, epoch)).permutation(order)
    return permutation[position * batch_size : (position + 1) * batch_size]


def epoch_indices(size: int, batch_size: int) -> Iterator[np.ndarray]:
    """All frames once, in order, in full batches: the last one repeats frames from the start to be as long."""
    for start in range(0, size, batch_size):
        yield np.arange(start, start + batch_size) % size
