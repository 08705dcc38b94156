"""π0 and π0.5 in PyTorch: `load` a checkpoint, `Pi0.compute_loss`, `Pi0.sample_actions`. Needs no jax."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from pi0.observation import Observation
from pi0_torch.loading import load
from pi0_torch.models.pi0 import Pi0


def to_device(observation: Observation, device: str | torch.device = "cpu") -> Observation:
    """A NumPy observation as PyTorch tensors on `device`."""

    def move(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: move(item) for key, item in value.items()}
        return torch.as_tensor(value).to(device)

    return Observation(**{f.name: move(getattr(observation, f.name)) for f in dataclasses.fields(observation)})


__all__ = ["Observation", "Pi0", "load", "to_device"]
