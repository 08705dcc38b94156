"""A planted fault."""

from __future__ import annotations

import dataclasses
import functools
import inspect
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
    the same and only gradients differ. `rounding`: whether it is the same function in float64, and
    rounds at another place in bfloat16.
    """

    name: str
    variant: str
    first: tuple[str, ...]
    framework: str = "torch"
    weights: Callable[[Weights], Weights] = lambda weights: weights
    patches: tuple[tuple[Any, str, Any], ...] = ()
    sampler: bool = False
    gradients: bool = False
    rounding: bool = False

    def __str__(self) -> str:
        return f"{self.variant}, {self.framework}{' sampler' if self.sampler else ''}: {self.name}"


def with_arguments(function: Callable[..., Any], **changes: Callable[[Any], Any]) -> Callable[..., Any]:
    """`function` with some of its arguments changed, each by a function of what it is; all others as they are."""
    signature = inspect.signature(function)

    @functools.wraps(function)
    def changed(*args: Any, **kwargs: Any) -> Any:
        call = signature.bind(*args, **kwargs)
        call.arguments |= {name: change(call.arguments[name]) for name, change in changes.items()}
        return function(*call.args, **call.kwargs)

    return changed


def with_result(function: Callable[..., Any], change: Callable[[Any], Any]) -> Callable[..., Any]:
    """`function` with its result changed."""

    @functools.wraps(function)
    def changed(*args: Any, **kwargs: Any) -> Any:
        return change(function(*args, **kwargs))

    return changed


def misfits(mutation: Mutation) -> list[str]:
    """The functions whose replacement does not take all arguments that they take: a model has other ones by now."""
    return [
        f"{mutation}: {name}{inspect.signature(value)} in place of {inspect.signature(getattr(target, name))}"
        for target, name, value in mutation.patches
        if callable(getattr(target, name)) and not takes(value, getattr(target, name))
    ]


def takes(value: Callable[..., Any], original: Callable[..., Any]) -> bool:
    """Whether `value` can be called with all arguments of `original`: some by place, the others by name."""
    signature, parameters = inspect.signature(value), list(inspect.signature(original).parameters.values())
    named = [p.name for p in parameters if p.kind is p.KEYWORD_ONLY]
    either = [p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    for placed in range(len(either) + 1):
        try:
            signature.bind(*either[:placed], **dict.fromkeys(either[placed:] + named))
            return True
        except TypeError:
            continue
    return False
