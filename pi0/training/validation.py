"""Validation: the loss of held-out frames, metrics of sampled actions, and images of both."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from pi0.assets import Assets
from pi0.config import ModelConfig
from pi0.plots import plot_actions, plot_cameras
from pi0.training.data import Loader
from pi0.training.draws import Batch
from pi0.training.metrics import Metrics

WITHIN = 0.1  # tolerance of `action_within`, in normalized units
SHOWN = 4  # rows of a batch in images


def validate(
    held_out: Loader,
    loss_fn: Callable[[Batch], Any],
    action_fn: Callable[[Batch], tuple[dict[str, Any], Any]] | None,
    local: Callable[[Any], np.ndarray],
    metrics: Metrics,
    step: int,
) -> dict[str, float]:
    """The mean loss over all held-out frames, and metrics of the first batch, whose sampled actions are plotted.

    `loss_fn` and `action_fn` are those of a framework, and `local` gives the rows [B, ...] that this process has of its
    arrays.
    """
    losses, scalars = [], {}
    for i, batch in enumerate(held_out.one_pass()):
        losses.append(loss_fn(batch))
        if i == 0 and action_fn is not None:
            values, sampled = action_fn(batch)
            scalars = {name: float(value) for name, value in values.items()}
            show_actions(metrics, local(batch[1]), local(sampled), step)
    return {"validation_loss": float(np.mean([float(loss) for loss in losses])), **scalars}


def action_dims(assets: Assets) -> int:
    """How many of the model's action dimensions the robot has."""
    assert assets.norm_stats is not None
    return min(len(assets.norm_stats["actions"].mean), assets.model.action_dim)


def action_draws(model: ModelConfig, batch: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Noise [B, T, A], flow times [B], and the noise [B, T, A] of sampled actions, float32: always the same."""
    rng = np.random.default_rng(0)
    shape = (batch, model.action_horizon, model.action_dim)
    time = rng.uniform(0.001, 1, batch).astype(np.float32)
    return rng.standard_normal(shape, np.float32), time, rng.standard_normal(shape, np.float32)


def show_cameras(metrics: Metrics, images: dict[str, np.ndarray], step: int) -> None:
    """Plot the first rows' camera images [B, H, W, 3] of this process, augmented as the model's inputs are."""
    file = metrics.image("cameras", step)
    if file is not None:
        plot_cameras({name: x[:SHOWN] for name, x in images.items()}, file)
        metrics.show("cameras", step, file)


def show_actions(metrics: Metrics, recorded: np.ndarray, sampled: np.ndarray, step: int) -> None:
    """Plot the first rows' recorded and sampled chunks [B, T, A], one after the other, in normalized units."""
    file = metrics.image("actions", step)
    if file is not None:
        dims = sampled.shape[-1]
        chunks = [x[:SHOWN, :, :dims].reshape(-1, dims) for x in (recorded, sampled)]
        names, title = [f"action {i}" for i in range(dims)], f"{SHOWN} held-out chunks, step {step}"
        plot_actions(chunks[0], {"sampled": chunks[1]}, names, file, title)
        metrics.show("actions", step, file)
