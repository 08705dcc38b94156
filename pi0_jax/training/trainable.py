"""Trained and frozen parameters: split by a pattern of their dotted names, and joined again."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp

from pi0.training.trainable import frozen_names, is_kernel
from pi0_jax.loading import flatten, unflatten


def split(params: dict[str, Any], pattern: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Nested parameters as (trained, frozen); see `frozen_names`, also for what it raises."""
    flat = flatten(params)
    frozen = frozen_names(flat, pattern)
    trained = {name: value for name, value in flat.items() if name not in frozen}
    return unflatten(trained), unflatten({name: x for name, x in flat.items() if name in frozen})


def join(trained: dict[str, Any], frozen: dict[str, Any]) -> dict[str, Any]:
    """The inverse of `split`."""
    return unflatten(flatten(trained) | flatten(frozen))


def kernels(params: dict[str, Any]) -> dict[str, Any]:
    """The kernels and low-rank updates of nested parameters by dotted names, as float32; see `is_kernel`."""
    return {name: x.astype(jnp.float32) for name, x in flatten(params).items() if is_kernel(name)}


def shapes(params: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """The shapes of nested parameters by dotted names."""
    return {name: tuple(x.shape) for name, x in flatten(params).items()}
