"""What validation looks at besides the loss: each action dimension's own, and the actions that a model samples."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from pi0.config import ModelConfig
from pi0.observation import Observation
from pi0_jax.loading import merge
from pi0_jax.models.pi0 import Pi0

WITHIN = 0.1  # how far off an action may be to count as met, in normalized units


def action_metrics(
    model: ModelConfig, dims: int, params: Any, batch: tuple[Observation, jax.Array]
) -> tuple[dict[str, jax.Array], jax.Array]:
    """Of a batch, over the robot's `dims` action dimensions and in normalized units: scalars, and sampled actions.

    `action_loss/{i}`, the flow-matching loss of dimension i; of a sampled chunk against the recorded one `action_mse`,
    `action_mae`, `action_mae/{i}` and `action_within`, the share of numbers off by at most WITHIN. The noise and times
    are the same at every evaluation. Sampled are [B, T, dims]. For π0 and π0.5.
    """
    observation, recorded = batch
    pi0 = merge(model, params)
    assert isinstance(pi0, Pi0), "π0-FAST samples tokens"
    time_key, loss_key, noise_key = jax.random.split(jax.random.key(0), 3)
    time = jax.random.uniform(time_key, recorded.shape[:1], minval=0.001)
    noise = jax.random.normal(loss_key, recorded.shape)
    stages: dict[str, jax.Array] = {}
    pi0.compute_loss(observation, recorded, noise, time, stages)
    loss = jnp.square(stages["velocity"] - (noise - recorded))[..., :dims].mean((0, 1))
    sampled = pi0.sample_actions(observation, jax.random.normal(noise_key, recorded.shape))[..., :dims]
    error = jnp.abs(sampled - recorded[..., :dims])
    scalars = {
        "action_mse": jnp.square(error).mean(),
        "action_mae": error.mean(),
        "action_within": (error <= WITHIN).mean(),
    }
    mae = error.mean((0, 1))
    scalars |= {f"action_loss/{i}": loss[i] for i in range(dims)} | {f"action_mae/{i}": mae[i] for i in range(dims)}
    return scalars, sampled
