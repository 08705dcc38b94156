"""Metrics of sampled actions on held-out frames."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from pi0.training.draws import Batch
from pi0.training.validation import WITHIN, action_draws
from pi0_torch.loading import Model, to_numpy
from pi0_torch.training.sharding import local_rows, mean_over_processes, process_count


@torch.no_grad()
def action_metrics(model: Model, dims: int, batch: Batch) -> tuple[dict[str, Tensor], Tensor]:
    """Scalars of a batch, over the robot's `dims` action dimensions in normalized units, and sampled actions.

    `action_loss/{i}` is the flow-matching loss of dimension i. `action_mse`, `action_mae`, `action_mae/{i}` and
    `action_within`, the share of values off by at most WITHIN, compare sampled chunks [B, T, dims] with recorded ones.
    The noise and times are the same at every evaluation. For models that sample actions by flow matching.
    """
    observation, recorded, _ = batch
    flow: Any = model
    whole_batch = len(recorded) * process_count()
    drawn = action_draws(model.config, whole_batch)
    noise, time, start = (torch.from_numpy(x[local_rows(whole_batch)]).to(recorded.device) for x in drawn)
    stages: dict[str, Tensor] = {}
    flow.compute_loss(observation, recorded, noise, time, stages)
    loss = (stages["velocity"] - (noise - recorded)).square()[..., :dims].mean((0, 1))
    sampled = flow.sample(observation, start)[..., :dims]
    error = (sampled - recorded[..., :dims]).abs()
    scalars = {
        "action_mse": error.square().mean(),
        "action_mae": error.mean(),
        "action_within": (error <= WITHIN).float().mean(),
    }
    mae = error.mean((0, 1))
    scalars |= {f"action_loss/{i}": loss[i] for i in range(dims)} | {f"action_mae/{i}": mae[i] for i in range(dims)}
    return mean_over_processes(scalars), sampled


def local_part(x: Tensor) -> np.ndarray:
    """The rows of a batch [B, ...] of this process."""
    return to_numpy(x)
