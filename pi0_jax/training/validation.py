"""Validation: the loss of held-out frames, metrics of sampled actions, and images of both."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pi0.assets import Assets
from pi0.config import ModelConfig
from pi0.observation import Observation
from pi0.plots import plot_actions, plot_cameras
from pi0_jax.loading import merge
from pi0_jax.training.data import Loader
from pi0_jax.training.metrics import Metrics

WITHIN = 0.1  # tolerance of `action_within`, in normalized units
SHOWN = 4  # rows of a batch in images


def validate(
    params: Any,
    held_out: Loader,
    loss_fn: Callable[[Any, Any], jax.Array],
    action_fn: Callable[[Any, Any], tuple[dict[str, jax.Array], jax.Array]] | None,
    metrics: Metrics,
    step: int,
) -> dict[str, float]:
    """The mean loss over all held-out frames, and `action_metrics` of the first batch, whose actions are plotted."""
    losses, scalars = [], {}
    for i, batch in enumerate(held_out.one_pass()):
        losses.append(loss_fn(params, batch))
        if i == 0 and action_fn is not None:
            values, sampled = action_fn(params, batch)
            scalars = {name: float(value) for name, value in values.items()}
            show_actions(metrics, batch[1], sampled, step)
    return {"validation_loss": float(np.mean(losses)), **scalars}


def action_dims(assets: Assets) -> int:
    """How many of the model's action dimensions the robot has."""
    assert assets.norm_stats is not None
    return min(len(assets.norm_stats["actions"].mean), assets.model.action_dim)


def action_metrics(
    model: ModelConfig, dims: int, params: Any, batch: tuple[Observation, jax.Array]
) -> tuple[dict[str, jax.Array], jax.Array]:
    """Scalars of a batch, over the robot's `dims` action dimensions in normalized units, and sampled actions.

    `action_loss/{i}` is the flow-matching loss of dimension i. `action_mse`, `action_mae`, `action_mae/{i}` and
    `action_within`, the share of values off by at most WITHIN, compare sampled chunks [B, T, dims] with recorded ones.
    The noise and times are the same at every evaluation. For models that sample actions by flow matching.
    """
    observation, recorded = batch
    flow: Any = merge(model, params)
    time_key, loss_key, noise_key = jax.random.split(jax.random.key(0), 3)
    time = jax.random.uniform(time_key, recorded.shape[:1], minval=0.001)
    noise = jax.random.normal(loss_key, recorded.shape)
    stages: dict[str, jax.Array] = {}
    flow.compute_loss(observation, recorded, noise, time, stages)
    loss = jnp.square(stages["velocity"] - (noise - recorded))[..., :dims].mean((0, 1))
    sampled = flow.sample(observation, jax.random.normal(noise_key, recorded.shape))[..., :dims]
    error = jnp.abs(sampled - recorded[..., :dims])
    scalars = {
        "action_mse": jnp.square(error).mean(),
        "action_mae": error.mean(),
        "action_within": (error <= WITHIN).mean(),
    }
    mae = error.mean((0, 1))
    scalars |= {f"action_loss/{i}": loss[i] for i in range(dims)} | {f"action_mae/{i}": mae[i] for i in range(dims)}
    return scalars, sampled


def show_cameras(metrics: Metrics, observation: Observation, step: int) -> None:
    """Plot the first rows' camera images of this process, augmented as the model's inputs are."""
    file = metrics.image("cameras", step)
    if file is not None:
        plot_cameras({name: local_part(x)[:SHOWN] for name, x in observation.images.items()}, file)
        metrics.show("cameras", step, file)


def show_actions(metrics: Metrics, recorded: jax.Array, sampled: jax.Array, step: int) -> None:
    """Plot the first rows' recorded and sampled chunks, one after the other, in normalized units."""
    file = metrics.image("actions", step)
    if file is not None:
        dims = sampled.shape[-1]
        chunks = [local_part(x)[:SHOWN, :, :dims].reshape(-1, dims) for x in (recorded, sampled)]
        names, title = [f"action {i}" for i in range(dims)], f"{SHOWN} held-out chunks, step {step}"
        plot_actions(chunks[0], {"sampled": chunks[1]}, names, file, title)
        metrics.show("actions", step, file)


def local_part(x: jax.Array) -> np.ndarray:
    """The rows of a batch on this process's first device."""
    return np.asarray(x.addressable_data(0))
