"""π0, π0.5 and π0-FAST in JAX: `load` and `compute_loss`, or a robot's `Policy` and `infer`. Needs no torch.

Names are imported on first use: models alone need neither the checkpoint code nor what a policy needs.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pi0.observation import Observation
    from pi0_jax.loading import load
    from pi0_jax.models.pi0 import Pi0
    from pi0_jax.models.pi0_fast import Pi0Fast
    from pi0_jax.models.pi05 import Pi05
    from pi0_jax.policy import Policy
    from pi0_jax.sampler import Sampler

_WHERE = {
    "Observation": "models",
    "Pi0": "models.pi0",
    "Pi05": "models.pi05",
    "Pi0Fast": "models.pi0_fast",
    "Policy": "policy",
    "Sampler": "sampler",
    "load": "loading",
}

__all__ = ["Observation", "Pi0", "Pi0Fast", "Pi05", "Policy", "Sampler", "load"]


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_WHERE[name]}"), name)
