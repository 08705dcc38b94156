"""Real-time chunking (RTC): an action chunk that goes on from the one that the robot executes while it is predicted.

Two methods, of which the models have the formulas (`models/rtc.py` of either framework):

guided   any checkpoint; each Euler step is guided towards the previous chunk ("Real-Time Execution of Action Chunking
         Flow Policies", arXiv 2506.07339)
trained  checkpoints that were trained with `RunConfig.rtc`; the actions that are executed meanwhile are given to the
         model as they are ("Training-Time Action Conditioning for Efficient Real-Time Chunking", arXiv 2512.05964)

Axes: B batch, T action horizon, A action dim, E Euler steps.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from pi0.config import ConfigError

METHODS = ("guided", "trained")
JACOBIANS = ("exact", "identity")
DELAYS = ("uniform", "exponential")  # distributions of the delays that are trained


@dataclasses.dataclass(frozen=True)
class RTC:
    """How chunks are continued. Raises ValueError for unknown or unused options.

    Attributes:
        method: "guided" or "trained".
        jacobian: of the guidance, how the estimated actions Â depend on x_t: "exact", the vector-Jacobian product of
            the model as in the paper, or "identity", which takes the velocity for a constant: cheaper, and what
            LeRobot computes.
        max_guidance: β, the most that guidance weighs in an Euler step.
    """

    method: str = "guided"
    jacobian: str = "exact"
    max_guidance: float = 5.0

    def __post_init__(self) -> None:
        for field, known in (("method", METHODS), ("jacobian", JACOBIANS)):
            if getattr(self, field) not in known:
                raise ValueError(f"rtc.{field} is {getattr(self, field)!r}; it must be one of {', '.join(known)}")
        if not (isinstance(self.max_guidance, int | float) and 0 <= self.max_guidance < math.inf):
            raise ValueError(f"rtc.max_guidance is {self.max_guidance!r}; it must be 0 or positive")
        if self.method == "trained" and (self.jacobian, self.max_guidance) != (RTC.jacobian, RTC.max_guidance):
            raise ValueError("rtc.jacobian and rtc.max_guidance are options of the method guided")

    @classmethod
    def of(cls, value: RTC | str | None) -> RTC | None:
        """RTC by the name of its method, with its defaults; an RTC or None as it is. Raises ValueError."""
        return cls(value) if isinstance(value, str) else value

    def scales(self, times: np.ndarray) -> np.ndarray:
        """The weight of the guidance at the `times` of Euler steps, float32 [E]: min(β, (t² + (1−t)²) / (t·(1−t))).

        In the paper's time τ = 1 − t it is min(β, (1−τ)/τ · (τ² + (1−τ)²)/(1−τ)²); at t = 1 it is β.
        """
        t = times.astype(np.float64)
        inverse = (t * (1 - t)) / (t**2 + (1 - t) ** 2)  # 0 at t = 1
        return (1 / np.maximum(inverse, 1 / max(self.max_guidance, 1e-9))).astype(np.float32)

    def weights(self, horizon: int, delay: int, length: int) -> np.ndarray:
        """How much each action of a new chunk follows the previous one, float32 [T].

        `delay` d is the number of actions that are executed before the new chunk is there, `length` that of the rest
        of the previous chunk, which has actions for the first of the new one. The d first weigh 1. Of "guided" the
        others weigh c·(eᶜ − 1)/(e − 1) with c = (length − i)/(length − d + 1), and those after `length` 0; of "trained"
        all others 0.
        """
        i = np.arange(horizon)
        if self.method == "trained":
            return (i < delay).astype(np.float32)
        c = np.clip((length - i) / (length - delay + 1), 0, 1)
        return np.where(i < delay, 1, c * np.expm1(c) / math.expm1(1)).astype(np.float32)


@dataclasses.dataclass(frozen=True)
class RTCTraining:
    """The delays that a model is trained for; of each example one is drawn. Raises ConfigError for impossible ones.

    Attributes:
        max_delay: the largest delay, in actions.
        distribution: "uniform" from 0 to `max_delay`, or "exponential": in proportion to exp(−delay).
    """

    max_delay: int
    distribution: str = "uniform"

    def __post_init__(self) -> None:
        if self.max_delay < 0:
            raise ConfigError(f"rtc.max_delay is {self.max_delay}; it must be 0 or positive")
        if self.distribution not in DELAYS:
            raise ConfigError(f"rtc.distribution is {self.distribution!r}; it must be one of {', '.join(DELAYS)}")

    def probabilities(self) -> np.ndarray:
        """The probability of each delay, float32 [max_delay + 1]."""
        weights = np.exp(-np.arange(self.max_delay + 1.0) * (self.distribution == "exponential"))
        return (weights / weights.sum()).astype(np.float32)


class Previous(NamedTuple):
    """The rest of the previous chunks, as the model's normalized actions, and the weight of each, float32 [B, T, A].

    Rows without a previous chunk, actions that it does not have and padded dimensions weigh 0.
    """

    actions: Any
    weights: Any

    @classmethod
    def none(cls, batch: int, horizon: int, dim: int) -> Previous:
        """No previous chunks."""
        zeros = np.zeros((batch, horizon, dim), np.float32)
        return cls(zeros, zeros)

    @classmethod
    def join(cls, rows: Sequence[Previous]) -> Previous:
        """Rows as one batch."""
        return cls(*(np.concatenate(arrays) for arrays in zip(*rows, strict=True)))
