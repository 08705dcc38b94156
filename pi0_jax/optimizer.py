"""The optimizer as a config describes it: AdamW, warmup and cosine decay, clipping by global norm."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import optax


def make_schedule(config: ml_collections.ConfigDict, total_steps: int) -> optax.Schedule:
    """Learning rate by step: linear warmup to `peak_lr`, then cosine decay to `final_lr` at `total_steps`.

    Raises ValueError where the warmup is longer than the training.
    """
    if not 0 <= config.warmup_steps < total_steps:
        raise ValueError(f"optimizer.warmup_steps is {config.warmup_steps}; it must be under the {total_steps} steps")
    return optax.warmup_cosine_decay_schedule(
        init_value=config.peak_lr / (config.warmup_steps + 1),
        peak_value=config.peak_lr,
        warmup_steps=config.warmup_steps,
        decay_steps=total_steps,
        end_value=config.final_lr,
    )


def make_optimizer(config: ml_collections.ConfigDict, schedule: optax.Schedule) -> optax.GradientTransformation:
    """Clipping, then AdamW with decoupled weight decay on all parameters."""
    return optax.chain(
        optax.clip_by_global_norm(config.clip_norm),
        optax.adamw(schedule, b1=config.b1, b2=config.b2, eps=config.eps, weight_decay=config.weight_decay),
    )


def accumulate(
    value_and_grad: Callable[[Any, Any], tuple[Any, Any]], params: Any, rows: Any, count: int
) -> tuple[Any, Any]:
    """The mean value and gradient over `count` micro-batches of `rows`, which are computed one after the other.

    A micro-batch takes every `count`-th row, so that each device brings its share of each.
    """
    if count == 1:
        return value_and_grad(params, rows)

    def add(total: Any, micro_batch: Any) -> tuple[Any, None]:
        return jax.tree.map(jnp.add, total, value_and_grad(params, micro_batch)), None

    micro_batches = jax.tree.map(lambda x: x.reshape(-1, count, *x.shape[1:]).swapaxes(0, 1), rows)
    shapes = jax.eval_shape(value_and_grad, params, jax.tree.map(lambda x: x[0], micro_batches))
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    return jax.tree.map(lambda x: x / count, jax.lax.scan(add, zeros, micro_batches)[0])


def update_ema(ema: Any, params: Any, decay: float) -> Any:
    """ema · decay + params · (1 − decay), leaf by leaf."""
    return jax.tree.map(lambda e, p: decay * e + (1 - decay) * p, ema, params)
