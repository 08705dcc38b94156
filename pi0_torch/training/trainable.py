"""Trained and frozen parameters: split by a pattern of their names in `pi0.parameters`, and joined again."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pi0.config import ModelConfig
from pi0.training.trainable import frozen_names, is_kernel
from pi0_torch.loading import our_names


def split(params: Mapping[str, Any], config: ModelConfig, pattern: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Parameters as (trained, frozen); see `frozen_names`, also for what it raises."""
    ours = our_names(config)
    frozen = frozen_names({ours[name]: None for name in params}, pattern)
    trained = {name: value for name, value in params.items() if ours[name] not in frozen}
    return trained, {name: value for name, value in params.items() if ours[name] in frozen}


def join(trained: Mapping[str, Any], frozen: Mapping[str, Any]) -> dict[str, Any]:
    """The inverse of `split`."""
    return {**trained, **frozen}


def kernels(params: Mapping[str, Any], config: ModelConfig) -> dict[str, Any]:
    """The kernels and low-rank updates; see `is_kernel`."""
    ours = our_names(config)
    return {name: x for name, x in params.items() if is_kernel(ours[name])}


def shapes(params: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """The shapes of parameters by name."""
    return {name: tuple(x.shape) for name, x in params.items()}
