"""π0, π0.5 and π0-FAST in PyTorch: `load`, `compute_loss`, `sample_actions`, `sample`, `sample_tokens`. No jax."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from pi0.observation import Observation
from pi0_torch.loading import load
from pi0_torch.models.pi0 import Pi0
from pi0_torch.models.pi0_fast import Pi0Fast
from pi0_torch.models.pi05 import Pi05


def to_device(observation: Observation, device: str | torch.device = "cpu") -> Observation:
    """A NumPy observation as PyTorch tensors on `device`."""

    def move(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: move(item) for key, item in value.items()}
        return None if value is None else torch.as_tensor(value).to(device)

    return Observation(**{f.name: move(getattr(observation, f.name)) for f in dataclasses.fields(observation)})


__all__ = ["Observation", "Pi0", "Pi0Fast", "Pi05", "load", "to_device"]
