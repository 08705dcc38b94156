"""The models. An `Observation` is a pytree from here on, so that JAX's transformations take it."""

from __future__ import annotations

import dataclasses

import jax

from pi0.observation import Observation

jax.tree_util.register_dataclass(Observation, [field.name for field in dataclasses.fields(Observation)], [])
