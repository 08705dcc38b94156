"""Show a model's operations to whoever records them: `record` and `section` in model code, `recording` around a call.

Where nobody records, nothing happens. JAX shows values only where nothing is traced (`jax.disable_jit`).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, NamedTuple, TypeVar

T = TypeVar("T")


class Operation(NamedTuple):
    """What an operation gave: an array, or a list of one (or None) for each expert. Section and name may repeat."""

    section: str
    name: str
    value: Any


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
