"""The optimizer against optax, which trains in JAX."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch

import pi0_jax.training.optimizer as of_jax
from pi0.run_config import OptimizerConfig
from pi0_torch.training.optimizer import accumulate, buckets, global_norm, make_optimizer, make_schedule, update_ema

SCHEDULES = [
    OptimizerConfig(),
    OptimizerConfig(decay_steps=30_000),
    OptimizerConfig(schedule="rsqrt", peak_lr=5e-5),
    OptimizerConfig(warmup_steps=0),
]


@pytest.mark.parametrize("config", SCHEDULES, ids=["cosine", "longer", "rsqrt", "no warmup"])
def test_schedules(config: OptimizerConfig):
    """Optax's to one float32 rounding of the peak, at every kind of step."""
    ours, theirs = make_schedule(config, 20_000), of_jax.make_schedule(config, 20_000)
    for step in (0, 1, 500, 999, 1000, 1001, 10_000, 19_999, 20_000, 40_000):
        assert abs(ours(step) - float(theirs(step))) <= 2**-23 * config.peak_lr, step


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"clip_norm": 1e9},
        {"moments_dtype": "bfloat16"},
        {"name": "sgd", "weight_decay": 1e-10, "clip_norm": 1.0},
        {"name": "sgd", "weight_decay": 1e-10, "clip_norm": 1.0, "nesterov": True},
    ],
    ids=["adamw", "not clipped", "bfloat16 moments", "sgd", "nesterov"],
)
def test_ten_updates(changes):
    """Optax's to 1e-6 of what the parameters moved by, in float32; bfloat16 moments may round to a neighbour."""
    config = dataclasses.replace(OptimizerConfig(peak_lr=1e-3, weight_decay=1e-2, warmup_steps=3), **changes)
    rng = np.random.default_rng(0)
    start = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in (("a", (30, 20)), ("b", (50,)))}
    params = {name: torch.from_numpy(value.copy()) for name, value in start.items()}
    optimizer = make_optimizer(config, make_schedule(config, 10))
    state = optimizer.init(params)
    reference = of_jax.make_optimizer(config, of_jax.make_schedule(config, 10))
    theirs = {name: jnp.asarray(value) for name, value in start.items()}
    their_state = reference.init(theirs)
    for _ in range(10):
        grads = {name: rng.standard_normal(value.shape).astype(np.float32) for name, value in start.items()}
        tensors = {name: torch.from_numpy(value) for name, value in grads.items()}
        optimizer.update(tensors, global_norm(tensors), state, params)
        updates, their_state = reference.update({n: jnp.asarray(g) for n, g in grads.items()}, their_state, theirs)
        theirs = optax.apply_updates(theirs, updates)
    assert state["count"] == 10
    tolerance = 1e-2 if "moments_dtype" in changes else 1e-6
    for name, value in theirs.items():
        moved = np.abs(np.asarray(value) - start[name]).max()
        # A float32 rounding of a parameter for each update, beside that of the updates.
        np.testing.assert_allclose(params[name], value, rtol=10 * 2**-24, atol=tolerance * moved, err_msg=name)
        assert "moments_dtype" not in changes or state["mu"][name].dtype == torch.bfloat16


def test_every_micro_batch_has_a_share_of_each_device():
    """As in JAX: rows 0 and 1 of two devices' halves, not one device's rows alone."""
    seen, weight = [], torch.ones(3, requires_grad=True)

    def value_and_grad(rows):
        seen.append(rows.tolist())
        (weight.sum() * rows.mean()).backward()
        return {"loss": rows.mean()}, {"weight": weight.grad}

    value, grads = accumulate(value_and_grad, torch.arange(8.0), 4)
    assert seen == [[0, 4], [1, 5], [2, 6], [3, 7]]
    assert value["loss"] == 3.5 and grads["weight"].tolist() == [3.5] * 3


def test_buckets_hold_every_parameter_once(monkeypatch):
    monkeypatch.setattr("pi0_torch.training.optimizer.BUCKET", 10)
    params = {"a": torch.zeros(6), "b": torch.zeros(4), "c": torch.zeros(20), "d": torch.zeros(1, dtype=torch.bfloat16)}
    assert list(buckets(params)) == [["a", "b"], ["c"], ["d"]] and list(buckets({})) == []


def test_moving_average():
    ema, params = {"a": torch.tensor([1.0, 2.0])}, {"a": torch.tensor([3.0, 2.0])}
    update_ema(ema, params, 0.75)
    assert ema["a"].tolist() == [1.5, 2.0]


def test_norms_are_accurate():
    """To 1e-6, of many numbers and of bfloat16: summed in float32 they are off by 8e-5, in bfloat16 by 4e-3."""
    tensors = {"a": torch.full((10_000,), 1.0, dtype=torch.bfloat16), "b": torch.tensor([3.0])}
    np.testing.assert_allclose(global_norm(tensors), 10_009**0.5, rtol=1e-6)
    many = np.random.default_rng(0).standard_normal(2**22, np.float32)
    exact = np.linalg.norm(many.astype(np.float64))
    np.testing.assert_allclose(global_norm({"a": torch.from_numpy(many)}), exact, rtol=1e-6)
