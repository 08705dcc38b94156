"""The optimizer, AdamW with clipping or SGD, and its schedule: warmup, then cosine or inverse square root decay.

The arithmetic is optax's, operation by operation, which `pi0_jax` trains with: `torch.optim.AdamW` multiplies weights
by 1 − lr·decay before its step, and has one denominator for both bias corrections.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from pi0.run_config import OptimizerConfig
from pi0_torch.loading import map_tensors

Params = dict[str, Tensor]
BUCKET = 1 << 26  # elements that are updated by one kernel, which has temporary values of this size
FLOAT = np.float32  # in which schedules are computed


class Optimizer(NamedTuple):
    """`init(params)` is the optimizer's state, and `update(grads, norm, state, params)` changes it and the parameters.

    The state is the number of updates `count`, and tensors by the parameter's name: Adam's moments `mu` and `nu`, or
    the `trace` of SGD. `norm` is the global norm of the gradient.
    """

    init: Callable[[Params], dict[str, Any]]
    update: Callable[[Params, Tensor, dict[str, Any], Params], None]


def make_schedule(config: OptimizerConfig, total_steps: int) -> Callable[[int], float]:
    """Learning rate by step: linear warmup to `peak_lr`, then the config's decay; see `OptimizerConfig`.

    Cosine decay ends at `decay_steps`, by default at `total_steps`. In float32, as optax computes it.
    """
    peak, warmup = config.peak_lr, config.warmup_steps
    init = peak / (warmup + 1)

    def warmed(step: int) -> np.float32:
        return FLOAT(init - peak) * (FLOAT(1) - FLOAT(step) / FLOAT(warmup)) + FLOAT(peak)

    def decayed(step: int) -> np.float32:
        if config.schedule == "rsqrt":
            return FLOAT(peak) / np.sqrt((FLOAT(config.timescale) + FLOAT(step)) / FLOAT(config.timescale))
        steps = (total_steps if config.decay_steps is None else config.decay_steps) - warmup
        alpha = config.final_lr / peak if peak else 0.0
        cosine = FLOAT(0.5) * (FLOAT(1) + np.cos(FLOAT(math.pi) * FLOAT(min(step, steps)) / FLOAT(steps)))
        return FLOAT(peak) * (FLOAT(1 - alpha) * cosine + FLOAT(alpha))

    return lambda step: float(warmed(step) if step < warmup else decayed(step - warmup))


def make_optimizer(config: OptimizerConfig, schedule: Callable[[int], float]) -> Optimizer:
    """Clipping, then AdamW with decoupled weight decay on all parameters; or SGD with momentum and neither."""
    if config.name == "sgd":
        return sgd(config, schedule)
    moments = getattr(torch, config.moments_dtype) if config.moments_dtype == "bfloat16" else None

    def init(params: Params) -> dict[str, Any]:
        zeros = {name: torch.zeros_like(p, dtype=moments) for name, p in params.items()}
        return {"count": 0, "mu": zeros, "nu": {name: torch.zeros_like(x) for name, x in zeros.items()}}

    def update(grads: Params, norm: Tensor, state: dict[str, Any], params: Params) -> None:
        rate = schedule(state["count"])
        state["count"] += 1
        correction = [float(FLOAT(1) - FLOAT(b) ** FLOAT(state["count"])) for b in (config.b1, config.b2)]
        clipped = norm >= config.clip_norm  # compared where it is: the host waits for nothing
        divisor = torch.where(clipped, norm, torch.ones_like(norm))
        factor = torch.where(clipped, torch.full_like(norm, config.clip_norm), torch.ones_like(norm))
        for names in buckets(params):
            p, g, kept_mu, kept_nu = ([t[name] for name in names] for t in (params, grads, state["mu"], state["nu"]))
            mu, nu = ([x.to(p[0].dtype) for x in kept] if moments else kept for kept in (kept_mu, kept_nu))
            scaled = torch._foreach_div(g, divisor.to(g[0].dtype))
            torch._foreach_mul_(scaled, factor.to(g[0].dtype))
            torch._foreach_mul_(mu, config.b1)
            torch._foreach_add_(mu, scaled, alpha=1 - config.b1)
            torch._foreach_mul_(nu, config.b2)
            torch._foreach_addcmul_(nu, scaled, scaled, 1 - config.b2)
            size = torch._foreach_sqrt(torch._foreach_div(nu, correction[1]))
            torch._foreach_add_(size, config.eps)
            step = torch._foreach_div(mu, correction[0])
            torch._foreach_div_(step, size)
            torch._foreach_add_(step, p, alpha=config.weight_decay)
            torch._foreach_add_(p, step, alpha=-rate)
            if moments:
                torch._foreach_copy_(kept_mu, mu)
                torch._foreach_copy_(kept_nu, nu)

    return Optimizer(init, update)


def sgd(config: OptimizerConfig, schedule: Callable[[int], float]) -> Optimizer:
    """SGD with momentum, as `optax.sgd`."""

    def init(params: Params) -> dict[str, Any]:
        return {"count": 0, "trace": {name: torch.zeros_like(p) for name, p in params.items()}}

    def update(grads: Params, norm: Tensor, state: dict[str, Any], params: Params) -> None:
        rate = schedule(state["count"])
        state["count"] += 1
        for names in buckets(params):
            p, g, trace = ([t[name] for name in names] for t in (params, grads, state["trace"]))
            torch._foreach_mul_(trace, config.momentum)
            torch._foreach_add_(trace, g)
            step = torch._foreach_add(g, trace, alpha=config.momentum) if config.nesterov else trace
            torch._foreach_add_(p, step, alpha=-rate)

    return Optimizer(init, update)


def buckets(params: Params) -> Iterator[list[str]]:
    """Names of parameters of one dtype, of at most BUCKET elements together, or of one."""
    bucket: list[str] = []
    size = 0
    for name, p in params.items():
        if bucket and (p.dtype != params[bucket[0]].dtype or size + p.numel() > BUCKET):
            yield bucket
            bucket, size = [], 0
        bucket.append(name)
        size += p.numel()
    if bucket:
        yield bucket


def accumulate(value_and_grad: Callable[[Any], tuple[Any, Params]], rows: Any, count: int) -> tuple[Any, Params]:
    """The mean value and gradient over `count` micro-batches of `rows`, computed one after the other.

    A micro-batch has every `count`-th row, so that each device has an equal part of each. `value_and_grad` adds the
    gradient to that of the micro-batches before it, and returns the sum.
    """
    if count == 1:
        return value_and_grad(rows)
    values: list[dict[str, Tensor]] = []
    grads: Params = {}
    for i in range(count):
        value, grads = value_and_grad(map_tensors(lambda x: x[i::count], rows))  # noqa: B023
        values.append(value)
    torch._foreach_div_([*grads.values()], count)
    return {name: torch.stack([value[name] for value in values]).sum(0) / count for name in values[0]}, grads


def update_ema(ema: Params, params: Params, decay: float) -> None:
    """ema · decay + params · (1 − decay), in place."""
    for names in buckets(params):
        moving = [ema[name] for name in names]
        torch._foreach_mul_(moving, decay)
        torch._foreach_add_(moving, [params[name] for name in names], alpha=1 - decay)


def global_norm(tensors: Params) -> Tensor:
    """The square root of the sum of all squares, float32 []."""
    if not tensors:
        return torch.zeros(())
    # On CPUs, PyTorch sums the squares of a tensor one after the other: in float32, 16 M of them are off by 6e-4.
    wide = torch.float64 if next(iter(tensors.values())).device.type == "cpu" else torch.float32
    return torch.stack(torch._foreach_norm([*tensors.values()], 2, wide)).norm().float()
