"""How often π0.5 predicts a new subtask while a robot runs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


class SubtaskSampler:
    """Subtask and actions chunk by chunk, the subtask predicted anew every `every` chunks and kept in between.

    `sample(observation, noise, subtask, previous)` is `Policy.sample_with_subtask`: it predicts the subtask where that
    is None, and returns the subtask's tokens and the actions.
    """

    def __init__(self, sample: Callable[..., tuple[Any, Any]], every: int = 1):
        if every < 1:
            raise ValueError(f"every is {every}; a subtask is kept for at least 1 chunk")
        self.sample, self.every = sample, every
        self.reset()

    def reset(self) -> None:
        """Begin a new episode: the next call predicts a subtask."""
        self.chunks, self.subtask = 0, None

    def __call__(self, observation: Any, noise: Any, previous: Any = None) -> tuple[Any, Any]:
        """The tokens of the subtask, int32 [B, D], and the actions, float32 [B, T, A]."""
        if self.chunks % self.every == 0:
            self.subtask = None
        self.subtask, actions = self.sample(
            observation, noise, self.subtask, *(() if previous is None else (previous,))
        )
        self.chunks += 1
        return self.subtask, actions
