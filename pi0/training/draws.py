"""The random numbers of flow matching, drawn in NumPy: the same in JAX and in PyTorch, in any number of processes.

Those of an example are a pure function of the seed and its position in the sequence of all examples, as its frame is
(`pi0.datasets.batches`). They are drawn where the data is read, and are inputs of the training step.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import numpy as np

from pi0 import numerics
from pi0.config import ModelConfig
from pi0.observation import Observation
from pi0.policy.rtc import RTCTraining

STREAM = 4  # of the seed; 0 to 3 are those of the mixture, augmentation and instructions


class Drawn(NamedTuple):
    """What is drawn for each example: Gaussian noise [B, T, A] and flow time [B], float32, and a delay int32 [B].

    None is what the model is not trained with: π0-FAST has none of them, and delays are those of `RunConfig.rtc`.
    """

    noise: Any = None
    time: Any = None
    delay: Any = None


Batch = tuple[Observation, Any, Drawn]  # the model's inputs, normalized actions [B, T, A], and what is drawn


@dataclasses.dataclass(frozen=True)
class Draws:
    """Draws for the examples at any positions; with `period`, positions that far apart have the same.

    The flow time is Beta(1.5, 1)·0.999 + 0.001 (openpi `Pi0.compute_loss`). Noise and times are the same with and
    without delays, which are drawn after them.
    """

    model: ModelConfig
    seed: int
    rtc: RTCTraining | None = None
    period: int | None = None

    def __call__(self, positions: np.ndarray) -> Drawn:
        """What is drawn for the examples at `positions` [B]."""
        if self.model.family.action_tokens:
            return Drawn()
        count, delays = len(positions), None
        if self.rtc is not None and self.rtc.max_delay:
            delays = np.cumsum(self.rtc.probabilities(), dtype=np.float64)
        noise = np.empty((count, self.model.action_horizon, self.model.action_dim), np.float32)
        time, delay = np.empty(count, np.float32), np.empty(count, np.int32)
        for i, position in enumerate(map(int, positions)):
            rng = np.random.default_rng((self.seed, STREAM, position % self.period if self.period else position))
            rng.standard_normal(out=noise[i], dtype=np.float32)
            time[i] = rng.beta(*numerics.TIME_BETA) * numerics.TIME_SCALE + numerics.TIME_OFFSET
            if delays is not None:
                delay[i] = np.searchsorted(delays[:-1], rng.random(), side="right")
        return Drawn(noise, time, None if delays is None else delay)
