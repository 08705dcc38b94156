"""A planted fault."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np

RECIPE = "tiny_pi05, recipe"  # with the training loss of π0.5's recipe, and a subtask before the actions
VARIANTS = ("tiny", "tiny_pi05", RECIPE, "tiny_pi0_fast", "tiny_lora")
STEPS = 3  # of Euler, or tokens of a subtask
Weights = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Mutation:
    """A fault of `variant`'s model: `weights` edits them, `target.name` is replaced by `value` in `framework`.

    `first` are the stages that may be found first; none: the mutant is equivalent, for the reason that its name gives.
    `sampler`: whether the faulty side is the framework's sampler. `gradients`: whether the other forward passes are
    the same and only gradients differ.
    """

    name: str
    variant: str
    first: tuple[str, ...]
    framework: str = "torch"
    weights: Callable[[Weights], Weights] = lambda weights: weights
    patches: tuple[tuple[Any, str, Any], ...] = ()
    sampler: bool = False
    gradients: bool = False

    def __str__(self) -> str:
        return f"{self.variant}, {self.framework}{' sampler' if self.sampler else ''}: {self.name}"
