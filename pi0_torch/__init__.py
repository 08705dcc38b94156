"""π0, π0.5 and π0-FAST in PyTorch: `load` and `compute_loss`, or a robot's `Policy` and `infer`. Needs no jax."""

from __future__ import annotations

from pi0.observation import Observation
from pi0_torch.loading import load, to_device
from pi0_torch.models.pi0 import Pi0
from pi0_torch.models.pi0_fast import Pi0Fast
from pi0_torch.policy import Policy
from pi0_torch.sampler import Sampler, TokenSampler

__all__ = ["Observation", "Pi0", "Pi0Fast", "Pi05", "Policy", "Sampler", "TokenSampler", "load", "to_device"]
