"""Metrics of sampled actions on held-out frames."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pi0.config import ModelConfig
from pi0.observation import Observation
from pi0.training.draws import Drawn
from pi0.training.validation import WITHIN, action_draws
from pi0_jax.loading import merge


def action_metrics(
    model: ModelConfig, dims: int, params: Any, batch: tuple[Observation, jax.Array, Drawn]
) -> tuple[dict[str, jax.Array], jax.Array]:
    """Scalars of a batch, over the robot's `dims` action dimensions in normalized units, and sampled actions.

    `action_loss/{i}` is the flow-matching loss of dimension i. `action_mse`, `action_mae`, `action_mae/{i}` and
    `action_within`, the share of values off by at most WITHIN, compare sampled chunks [B, T, dims] with recorded ones.
    The noise and times are the same at every evaluation. For models that sample actions by flow matching.
    """
    observation, recorded, _ = batch
    flow: Any = merge(model, params)
    noise, time, start = action_draws(model, len(recorded))
    stages: dict[str, jax.Array] = {}
    flow.compute_loss(observation, recorded, noise, time, stages)
    loss = jnp.square(stages["velocity"] - (noise - recorded))[..., :dims].mean((0, 1))
    sampled = flow.sample(observation, start)[..., :dims]
    error = jnp.abs(sampled - recorded[..., :dims])
    scalars = {
        "action_mse": jnp.square(error).mean(),
        "action_mae": error.mean(),
        "action_within": (error <= WITHIN).mean(),
    }
    mae = error.mean((0, 1))
    scalars |= {f"action_loss/{i}": loss[i] for i in range(dims)} | {f"action_mae/{i}": mae[i] for i in range(dims)}
    return scalars, sampled


def local_part(x: jax.Array) -> np.ndarray:
    """The rows of a batch [B, ...] on this process's first device."""
    return np.asarray(x.addressable_data(0))
