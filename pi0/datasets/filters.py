"""The frames of a dataset that are trained on: of successful episodes, not idle, with some instructions."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from pi0.datasets.base import Dataset


class FilteredDataset:
    """The frames of a dataset that all filters keep, in order. Chunks of actions go on into frames that are left out.

    `success_only` keeps episodes that are marked as successful. `idle` leaves out frames from which on no dimension of
    the actions changes by more than it, in the actions' units, for `idle_frames` frames: a policy learns to stand still
    of them (openpi leaves them out of DROID). `instruction` is a regular expression, searched in each instruction
    without regard to case. Norm stats are of all recorded frames. Raises ValueError where the dataset does not say
    success, and where no frame is left.
    """

    def __init__(
        self,
        dataset: Dataset,
        *,
        success_only: bool = False,
        idle: float | None = None,
        idle_frames: int = 8,
        instruction: str = "",
    ):
        if idle is not None and not (idle >= 0 and idle_frames >= 1):
            raise ValueError(f"idle is {idle} and idle_frames {idle_frames}; expected 0 or more, and 1 or more")
        self.dataset = dataset
        keep = np.ones(len(dataset), bool)
        if success_only:
            try:
                keep &= dataset.table("success").astype(bool)
            except KeyError as error:
                raise ValueError(
                    f"{dataset.root} does not say which episodes are successful: {error.args[0]}"
                ) from error
        if idle is not None:
            keep &= _moving(dataset, idle, idle_frames)
        if instruction:
            keep &= _with_instruction(dataset, instruction)
        if not keep.any():
            raise ValueError(f"the filters leave none of the {len(dataset)} frames of {dataset.root}")
        self._frames = np.flatnonzero(keep).astype(np.uint32 if len(keep) < 2**32 else np.int64)

    def __len__(self) -> int:
        return len(self._frames)

    def __getitem__(self, i: int) -> dict[str, Any]:
        """Frame i of those that are left."""
        if not 0 <= i < len(self):
            raise IndexError(f"frame {i} is not within 0 to {len(self) - 1}")
        return self.item(i)

    def fetch(self, frames: Sequence[int]) -> dict[int, bytes]:
        """See `Dataset`."""
        found = self.dataset.fetch([int(self._frames[i]) for i in frames])
        return {i: found[int(self._frames[i])] for i in frames if int(self._frames[i]) in found}

    def item(self, i: int, stored: bytes | None = None) -> dict[str, Any]:
        """See `Dataset`."""
        return self.dataset.item(int(self._frames[i]), stored)


def _moving(dataset: Dataset, threshold: float, frames: int) -> np.ndarray:
    """Whether an action changes between a frame and `frames` later, or the episode's end: bool [F]."""
    changes = np.zeros(len(dataset), bool)  # to the next frame
    for name in dataset.actions:
        values = dataset.table(name)
        changes[:-1] |= (np.abs(np.diff(values, axis=0)) > threshold).any(axis=-1)
    ends = np.asarray(dataset.starts[1:])
    changes[ends - 1] = False  # the next frame is of another episode
    sums = np.concatenate([[0], np.cumsum(changes)])
    last = np.minimum(np.arange(len(changes)) + frames, np.repeat(ends, np.diff(dataset.starts)))
    return sums[last] > sums[:-1]


def _with_instruction(dataset: Dataset, pattern: str) -> np.ndarray:
    try:
        found = re.compile(pattern, re.IGNORECASE)
    except re.error as error:
        raise ValueError(f"instruction is {pattern!r}, which is no regular expression: {error}") from error
    kept = [n for n, text in dataset.tasks.items() if any(map(found.search, dataset.instructions.get(n, (text,))))]
    return np.isin(dataset.table("task_index"), kept)
