"""Show a model's operations to whoever records them: `record` and `section` in model code, `recording` around a call.

Where nobody records, nothing happens. JAX shows values only where nothing is traced (`jax.disable_jit`).
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, TypeVar

T = TypeVar("T")


class Operation(NamedTuple):
    """What an operation gave: an array, or a list of one (or None) for each expert. Section and name may repeat."""

    section: str
    name: str
    value: Any


LAYERED = ("layer", "keys", "values")  # the last words of stages that each layer has
STAGES = ("tokens", "actions", *LAYERED)  # and of all stages of a sampler

_operations: list[Operation] | None = None
_section = ""


@contextlib.contextmanager
def recording() -> Iterator[list[Operation]]:
    """Collect the operations of all models that run inside, in order."""
    global _operations, _section
    assert _operations is None, "one recording at a time"
    _operations, _section = [], ""
    try:
        yield _operations
    finally:
        _operations = None


def section(name: str) -> None:
    """Begin a part of the model; it lasts until the next one begins."""
    global _section
    if _operations is not None:
        _section = name


def record(name: str, value: T) -> T:
    """`value`, the result of the operation of this name."""
    if _operations is not None:
        _operations.append(Operation(_section, name, value))
    return value


def stages_of(operations: Sequence[Operation]) -> dict[str, Any]:
    """The stages among the operations of a sampler, by section and name, and where each layer has one its number."""
    stages, seen = dict[str, Any](), Counter[str]()
    for operation in operations:
        if operation.name.endswith(STAGES):
            name = f"{operation.section} {operation.name}".strip()
            stages[f"{name} {seen[name]}" if name.endswith(LAYERED) else name] = operation.value
            seen[name] += 1
    return stages
