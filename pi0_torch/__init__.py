"""π0, π0.5 and π0-FAST in PyTorch: `load` and `compute_loss`, or a robot's `Policy` and `infer`. Needs no jax.

Names are imported on first use: models alone need neither the checkpoint code nor what a policy needs.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from pi0.observation import Observation

if TYPE_CHECKING:
    from pi0_torch.loading import load, to_device
    from pi0_torch.models.pi0 import Pi0
    from pi0_torch.models.pi0_fast import Pi0Fast
    from pi0_torch.models.pi05 import Pi05
    from pi0_torch.policy import Policy
    from pi0_torch.sampler import Sampler

_WHERE = {
    "Pi0": "models.pi0",
    "Pi05": "models.pi05",
    "Pi0Fast": "models.pi0_fast",
    "Policy": "policy",
    "Sampler": "sampler",
    "load": "loading",
    "to_device": "loading",
}

__all__ = ["Observation", "Pi0", "Pi0Fast", "Pi05", "Policy", "Sampler", "load", "to_device"]


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_WHERE[name]}"), name)
