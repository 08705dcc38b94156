"""The optimizer, AdamW with clipping or SGD, and its schedule: warmup, then cosine or inverse square root decay."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from pi0.run_config import OptimizerConfig


def make_schedule(config: OptimizerConfig, total_steps: int) -> optax.Schedule:
    """Learning rate by step: linear warmup to `peak_lr`, then the config's decay; see `OptimizerConfig`.

    Cosine decay ends at `decay_steps`, by default at `total_steps`. Source: openpi `training/optimizer.py`.
    """
    if config.schedule == "rsqrt":
        init = config.peak_lr / (config.warmup_steps + 1)
        warmup = optax.linear_schedule(init, config.peak_lr, config.warmup_steps)
        scale = config.timescale
        return optax.join_schedules(
            [warmup, lambda step: config.peak_lr / jnp.sqrt((scale + step) / scale)], [config.warmup_steps]
        )
    return optax.warmup_cosine_decay_schedule(
        init_value=config.peak_lr / (config.warmup_steps + 1),
        peak_value=config.peak_lr,
        warmup_steps=config.warmup_steps,
        decay_steps=total_steps if config.decay_steps is None else config.decay_steps,
        end_value=config.final_lr,
    )


def make_optimizer(config: OptimizerConfig, schedule: optax.Schedule) -> optax.GradientTransformation:
    """Clipping, then AdamW with decoupled weight decay on all parameters; or SGD with momentum and neither."""
    if config.name == "sgd":
        return optax.sgd(schedule, momentum=config.momentum, nesterov=config.nesterov)
    adam = optax.scale_by_adam(b1=config.b1, b2=config.b2, eps=config.eps)
    if config.moments_dtype == "bfloat16":
        adam = in_bfloat16(adam)
    return optax.chain(
        optax.clip_by_global_norm(config.clip_norm),
        adam,
        optax.add_decayed_weights(config.weight_decay),
        optax.scale_by_learning_rate(schedule),
    )


def in_bfloat16(adam: optax.GradientTransformation) -> optax.GradientTransformation:
    """`adam`, computed in float32, with both moments rounded to bfloat16 between steps."""

    def rounded(state: Any, dtype: Any) -> Any:
        cast = functools.partial(jax.tree.map, lambda x: x.astype(dtype))
        return state._replace(mu=cast(state.mu), nu=cast(state.nu))

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        updates, state = adam.update(updates, rounded(state, jnp.float32), params)
        return updates, rounded(state, jnp.bfloat16)

    return optax.GradientTransformation(lambda params: rounded(adam.init(params), jnp.bfloat16), update)


def accumulate(
    value_and_grad: Callable[[Any, Any], tuple[Any, Any]], params: Any, rows: Any, count: int
) -> tuple[Any, Any]:
    """The mean value and gradient over `count` micro-batches of `rows`, computed one after the other.

    A micro-batch has every `count`-th row, so that each device has an equal part of each.
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
