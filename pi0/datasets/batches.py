"""From recordings to the rows of model input that each step takes. NumPy only: worker processes need no framework."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np

from pi0.robots.pipeline import Pipeline
from pi0.robots.transforms import augment_images


class Order(Protocol):
    """Which frame of which of its `datasets` stands at each position from 0 on, without end: `InOrder`, `Mixture`."""

    @property
    def datasets(self) -> Sequence[Any]: ...

    def __len__(self) -> int: ...

    def locate(self, position: int) -> tuple[int, int]: ...


@dataclasses.dataclass(frozen=True)
class InOrder:
    """All frames of some datasets one after the other, for ever, each time as whole batches.

    The last batch of each time is filled up with frames from the start.
    """

    datasets: Sequence[Any]
    batch_size: int

    def __len__(self) -> int:
        return sum(len(dataset) for dataset in self.datasets)

    def locate(self, position: int) -> tuple[int, int]:
        """The dataset and the frame of it at a position."""
        whole = -(-len(self) // self.batch_size) * self.batch_size
        frame = position % whole % len(self)
        starts = np.cumsum([0] + [len(dataset) for dataset in self.datasets])
        dataset = int(np.searchsorted(starts, frame, side="right")) - 1
        return dataset, int(frame - starts[dataset])


@dataclasses.dataclass(frozen=True)
class Batches:
    """The batch of any step: a pure function of it, in every process, so the step is all there is to save.

    Step s has the frames that `order` has at positions s·B to (s + 1)·B, each through the pipeline of its dataset, and
    varied at random by `augment_images` where there is an `augment_seed`.
    """

    order: Order
    pipelines: Sequence[Pipeline]  # one for each dataset
    batch_size: int
    augment_seed: int | None = None

    def __len__(self) -> int:
        """The steps that it takes to see about all frames once."""
        return -(-len(self.order) // self.batch_size)

    def read(self, step: int, rows: np.ndarray | None = None) -> dict[str, np.ndarray]:
        """The model's inputs in flat keys and `actions`, [R, ...]: all rows of a batch, or some, as one host needs.

        Raises DataError for damaged recordings.
        """
        rows = np.arange(self.batch_size) if rows is None else rows
        read = [self.row(step * self.batch_size + int(row)) for row in rows]
        return {key: np.stack([row[key] for row in read]) for key in read[0]}

    def frames(self, step: int) -> list[tuple[int, int]]:
        """The dataset and the frame of it, for each row of a batch."""
        return [self.order.locate(step * self.batch_size + row) for row in range(self.batch_size)]

    def row(self, position: int) -> dict[str, np.ndarray]:
        """The row at a position."""
        dataset, frame = self.order.locate(position)
        row = self.pipelines[dataset](self.order.datasets[dataset][frame])
        if self.augment_seed is not None:
            row = augment_images(row, np.random.default_rng((self.augment_seed, 2, position)))  # 0, 1: of Mixture
        # A camera that other robots of the mixture have is black here; its mask is false already.
        own = [key for key in row if key.startswith("image/")]
        lacking = {f"image/{camera}" for pipeline in self.pipelines for camera in pipeline.robot.cameras.values()}
        return row | {key: np.zeros_like(row[own[0]]) for key in lacking.difference(own)}
