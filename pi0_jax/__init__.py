"""π0 and π0.5 in JAX: `load` a checkpoint, `Pi0.compute_loss`, `Pi0.sample_actions`. Needs no torch."""

from __future__ import annotations

import jax

from pi0.observation import Observation
from pi0_jax.loading import load
from pi0_jax.models.pi0 import Pi0

jax.tree_util.register_dataclass(
    Observation,
    data_fields=["images", "image_masks", "state", "tokenized_prompt", "tokenized_prompt_mask"],
    meta_fields=[],
)

__all__ = ["Observation", "Pi0", "load"]
