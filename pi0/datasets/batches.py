"""Batches of model inputs from recordings, by training step. NumPy only: worker processes load no framework."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np

from pi0.robots.pipeline import Pipeline
from pi0.robots.transforms import augment_images


class Order(Protocol):
    """The dataset and frame at each position of an infinite sequence: `InOrder` or `Mixture`."""

    @property
    def datasets(self) -> Sequence[Any]:
        """The datasets that positions are in."""

    def __len__(self) -> int: ...

    def locate(self, position: int) -> tuple[int, int]:
        """The dataset, by its number, and its frame at a position from 0 on."""


@dataclasses.dataclass(frozen=True)
class InOrder:
    """All frames of the datasets in order, repeated forever.

    The last batch of each pass is filled up with frames from the start, so that passes are whole batches.
    """

    datasets: Sequence[Any]
    batch_size: int

    def __len__(self) -> int:
        return sum(len(dataset) for dataset in self.datasets)

    def locate(self, position: int) -> tuple[int, int]:
        """The dataset and its frame at a position."""
        whole = -(-len(self) // self.batch_size) * self.batch_size
        frame = position % whole % len(self)
        starts = np.cumsum([0] + [len(dataset) for dataset in self.datasets])
        dataset = int(np.searchsorted(starts, frame, side="right")) - 1
        return dataset, int(frame - starts[dataset])


class Fetched(NamedTuple):
    """Of a step: the bytes that its rows are decoded from, by row; the other rows are read when they are decoded."""

    step: int
    stored: dict[int, bytes]


@dataclasses.dataclass(frozen=True)
class Batches:
    """The batch of any step, a pure function of the step: no state but the step is saved.

    Step s has the frames at positions s·B to (s + 1)·B of `order`, each with one of its instructions, through the
    pipeline of its dataset, and randomly augmented by `augment_images` where there is an `augment_seed`. `draw` gives
    what is drawn for the examples at positions (`pi0.training.draws`).
    """

    order: Order
    pipelines: Sequence[Pipeline]  # one for each dataset
    batch_size: int
    augment_seed: int | None = None
    draw: Callable[[np.ndarray], Any] | None = None

    def __len__(self) -> int:
        """The number of steps of about one pass over all frames."""
        return -(-len(self.order) // self.batch_size)

    def read(self, step: int, rows: np.ndarray | None = None, count: bool = False) -> dict[str, np.ndarray]:
        """The model's inputs in flat keys and `actions`, [R, ...]: all rows of a batch, or those of one host.

        With `count` also what is drawn, and `truncated` bool [R], where a prompt with its state and targets was cut.
        Raises DataError for damaged recordings. It is `fetch`, which may wait for a bucket, and then `decode`, which
        keeps a processor busy.
        """
        rows = np.arange(self.batch_size) if rows is None else rows
        return self.decode(self.fetch(step, rows), rows, count)

    def fetch(self, step: int, rows: np.ndarray) -> Fetched:
        """What rows of a batch are decoded from, where their dataset reads many frames faster than one by one.

        `rows` are int [R], within the batch.
        """
        wanted: dict[int, dict[int, int]] = {}  # by dataset: the frame of each row
        for row in map(int, rows):
            dataset, frame = self.order.locate(step * self.batch_size + row)
            wanted.setdefault(dataset, {})[row] = frame
        stored: dict[int, bytes] = {}
        for number, frames in wanted.items():
            fetch = getattr(self.order.datasets[number], "fetch", None)  # `Questions` have none
            found = fetch([*frames.values()]) if fetch else {}
            stored |= {row: found[frame] for row, frame in frames.items() if frame in found}
        return Fetched(step, stored)

    def decode(
        self, fetched: Fetched, rows: np.ndarray, count: bool = False, empty: Callable[..., np.ndarray] = np.empty
    ) -> dict[str, np.ndarray]:
        """What `read` returns, of rows int [R] that were fetched, in arrays [R, ...] made by `empty(shape, dtype)`.

        Raises ValueError where two rows differ in shape or dtype.
        """
        first, arrays = fetched.step * self.batch_size, dict[str, np.ndarray]()
        for n, row in enumerate(map(int, rows)):  # each into its place at once: its own memory is soon used again
            found = {key: np.asarray(x) for key, x in self.row(first + row, fetched.stored.get(row)).items()}
            if n == 0:
                kept = [key for key in found if count or key != "truncated"]
                arrays = {key: empty((len(rows), *found[key].shape), found[key].dtype) for key in kept}
            for key, array in arrays.items():
                if found[key].shape != array.shape[1:] or found[key].dtype != array.dtype:
                    one, other = (f"{x.dtype} {list(x.shape)}" for x in (array[0], found[key]))
                    raise ValueError(f"{key} is {one} in one row of a batch and {other} in another")
                array[n] = found[key]
        drawn = self.draw(first + rows)._asdict() if self.draw is not None and count else {}
        return arrays | {name: values for name, values in drawn.items() if values is not None}

    def frames(self, step: int) -> list[tuple[int, int]]:
        """The dataset and its frame for each row of a batch."""
        return [self.order.locate(step * self.batch_size + row) for row in range(self.batch_size)]

    def row(self, position: int, stored: bytes | None = None) -> dict[str, np.ndarray]:
        """The model's inputs of the frame at a position, and `truncated`.

        Arrays have the shapes of `Observation` without B; `actions` are [T, A].
        """
        number, frame = self.order.locate(position)
        dataset, pipeline = self.order.datasets[number], self.pipelines[number]
        item = dataset[frame] if stored is None else dataset.item(frame, stored)
        if texts := item.get("tasks"):  # several instructions: one is drawn, in validation the first
            seed = getattr(self.order, "seed", None)
            chosen = 0 if seed is None else np.random.default_rng((seed, 3, position)).integers(len(texts))
            item |= {"task": texts[chosen]}
        before = pipeline.tokenizer.truncated
        row = pipeline(item) | {"truncated": np.bool_(pipeline.tokenizer.truncated > before)}
        if self.augment_seed is not None:
            row = augment_images(row, np.random.default_rng((self.augment_seed, 2, position)))  # 0, 1: of Mixture
        # A camera of another robot of the mixture is a zero image here; its mask is false already.
        own = [key for key in row if key.startswith("image/")]
        missing = {f"image/{camera}" for pipeline in self.pipelines for camera in pipeline.robot.cameras.values()}
        return row | {key: np.zeros_like(row[own[0]]) for key in missing.difference(own)}
