"""π0, π0.5 and π0-FAST in JAX: `load` and `compute_loss`, or a robot's `Policy` and `infer`. Needs no torch."""

from __future__ import annotations

import dataclasses

import jax

from pi0.observation import Observation
from pi0_jax.loading import load
from pi0_jax.models.pi0 import Pi0
from pi0_jax.models.pi0_fast import Pi0Fast
from pi0_jax.models.pi05 import Pi05
from pi0_jax.policy import Policy
from pi0_jax.sampler import Sampler, TokenSampler

jax.tree_util.register_dataclass(
    Observation,
    data_fields=[field.name for field in dataclasses.fields(Observation)],
    meta_fields=[],
)

__all__ = ["Observation", "Pi0", "Pi0Fast", "Pi05", "Policy", "Sampler", "TokenSampler", "load"]
