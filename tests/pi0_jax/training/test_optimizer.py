from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from configs.metaworld_demo import get_config
from pi0.config import ATTENTIONS, REMATS, ConfigError
from pi0.observation import Observation
from pi0.run_config import OptimizerConfig, RunConfig
from pi0.training.draws import Drawn, Draws
from pi0.variants import get_variant
from pi0_jax.loading import flatten, merge
from pi0_jax.planning.plan import plan
from pi0_jax.training.optimizer import accumulate, make_optimizer, make_schedule
from pi0_jax.training.train import init_state, train, train_step

CONFIG = RunConfig.from_dict(get_config("tiny").to_dict())
MODEL = CONFIG.model


def batch_of(size: int) -> tuple[Observation, np.ndarray, Drawn]:
    rng = np.random.default_rng(0)
    data = {f"image/{k}": rng.integers(0, 256, (size, *MODEL.image_resolution, 3), np.uint8) for k in MODEL.image_keys}
    data |= {
        "state": rng.standard_normal((size, MODEL.action_dim)),
        "tokenized_prompt": rng.integers(0, MODEL.vocab_size, (size, MODEL.max_token_len)),
        "tokenized_prompt_mask": rng.random((size, MODEL.max_token_len)) < 0.7,
    }
    actions = rng.standard_normal((size, MODEL.action_horizon, MODEL.action_dim)).astype(np.float32)
    return Observation.from_dict(data, MODEL), actions, Draws(MODEL, 0)(np.arange(size))


def update(count: int):
    """A training step on 32 rows in `count` micro-batches: its scalars and parameters.

    Plain steps along the gradient: Adam, which divides by its size, would make steps of rounding.
    """
    config, optimizer = dataclasses.replace(CONFIG, accumulate=count), optax.sgd(1e-2)
    state = jax.jit(functools.partial(init_state, config, optimizer))()
    step = jax.jit(functools.partial(train_step, config, optimizer))
    state, scalars = step(state, batch_of(32))
    return scalars, flatten(state["params"])


def test_accumulation_equals_the_large_batch(highest_precision):
    """4 × 8 and 32 rows, with the same noise: loss and parameters to 1e-6, float32 sums in another order."""
    (scalars, params), (ours, accumulated) = update(1), update(4)
    for name in ("loss", "grad_norm", "param_norm"):
        np.testing.assert_allclose(ours[name], scalars[name], rtol=1e-6, err_msg=name)
    for name, value in params.items():
        np.testing.assert_allclose(accumulated[name], value, rtol=0, atol=1e-6, err_msg=name)


def test_every_micro_batch_has_a_share_of_each_device():
    """Rows 0 and 1 of two devices' halves, not one device's rows alone."""
    seen = []

    def value_and_grad(params, rows):
        jax.debug.callback(lambda x: seen.append(x.tolist()), rows, ordered=True)
        return rows.mean(), params * rows.mean()

    value, grad = accumulate(value_and_grad, jnp.ones(3), jnp.arange(8.0), 4)
    jax.effects_barrier()
    assert seen == [[0, 4], [1, 5], [2, 6], [3, 7]] and value == 3.5 and grad.tolist() == [3.5] * 3


def test_moments_in_bfloat16():
    """Half of the memory; after ten steps within two of bfloat16's roundings (2^-9 each) of float32's steps."""
    rng = np.random.default_rng(0)
    params = {"w": jnp.asarray(rng.standard_normal(1000), jnp.float32)}
    moved = {}
    for dtype in ("float32", "bfloat16"):
        config = dataclasses.replace(CONFIG.optimizer, moments_dtype=dtype)
        optimizer, now = make_optimizer(config, lambda _: 1e-3), params
        state = optimizer.init(params)
        for i in range(10):
            grads = {"w": jnp.asarray(np.random.default_rng(i).standard_normal(1000) + 1, jnp.float32)}
            updates, state = optimizer.update(grads, state, now)
            now = optax.apply_updates(now, updates)
        assert {x.dtype.name for x in jax.tree.leaves(state) if x.ndim} == {dtype}
        moved[dtype] = now["w"] - params["w"]
    np.testing.assert_allclose(moved["bfloat16"], moved["float32"], rtol=0, atol=2 * 2**-9 * 1e-3 * 10)


@pytest.mark.parametrize(("changes", "said"), [({"moments_dtype": "int8"}, "moments_dtype"), ({"b2": 0.999}, "b2 is")])
def test_moments_that_cannot_be_kept_are_refused(changes, said: str):
    with pytest.raises(ValueError, match=said):
        dataclasses.replace(CONFIG.optimizer, **{"moments_dtype": "bfloat16"} | changes)


@pytest.fixture(scope="module")
def loss_of_model():
    """The loss and its gradient of a batch for a model with the runtime options given, compiled with some of XLA's."""
    config = MODEL.with_runtime(remat="none")
    observation, actions, _ = batch_of(4)
    noise, time = np.ones_like(actions), np.full(4, 0.3, np.float32)
    init = functools.partial(init_state, dataclasses.replace(CONFIG, model=config), optax.sgd(1.0))
    params = jax.jit(init)()["params"]

    @functools.cache
    def of(xla: tuple[tuple[str, str], ...] = (), **runtime: str):
        def loss(params):
            return merge(config.with_runtime(**runtime), params).compute_loss(observation, actions, noise, time).mean()

        with jax.default_matmul_precision("highest"):
            value, grads = jax.jit(jax.value_and_grad(loss)).lower(params).compile(compiler_options=dict(xla))(params)
        return float(value), flatten(jax.device_get(grads))

    return of


@pytest.mark.parametrize(
    "remat", [name if name in ("mlp", "full") else pytest.param(name, marks=pytest.mark.slow) for name in REMATS[1:]]
)
def test_rematerialization_changes_no_bit(remat: str, loss_of_model):
    """Loss and gradients are those without it, to the bit, where XLA does not fuse operations.

    Where it does, it fuses recomputed ones otherwise, and rounds sums inside of a fusion in another order.
    """
    unfused = (("xla_disable_hlo_passes", "fusion,cpu-instruction-fusion"),)
    (loss, grads), (other_loss, other) = loss_of_model(unfused), loss_of_model(unfused, remat=remat)
    assert other_loss == loss
    for name, value in grads.items():
        np.testing.assert_array_equal(other[name], value, err_msg=name)


def test_offload_is_refused_on_a_cpu(tmp_path):
    config = dataclasses.replace(CONFIG, model=MODEL.with_runtime(remat="offload"))
    with pytest.raises(ValueError, match=r"remat is offload, .* a CPU has no other"):
        train(config, tmp_path / "run")
    with pytest.raises(ValueError, match="remat is offload"):
        plan(config, "gpu:1x80")
    assert not (tmp_path / "run").exists()


def test_another_attention_computes_the_same(loss_of_model):
    """XLA's, to float32 rounding."""
    (loss, grads), (other_loss, other) = loss_of_model(), loss_of_model(attention="xla")
    np.testing.assert_allclose(other_loss, loss, rtol=1e-6)
    scale = float(optax.tree.norm(grads))
    for name, value in grads.items():
        np.testing.assert_allclose(other[name], value, rtol=0, atol=1e-6 * scale, err_msg=name)


def test_attention_that_cannot_be_is_refused():
    assert ATTENTIONS[0] == "plain"
    for variant, attention in (("tiny", "flash"), ("tiny", "cudnn"), ("tiny_pi0_fast", "xla")):
        with pytest.raises(ConfigError, match="attention is"):
            get_variant(variant, attention=attention)


def test_the_decay_may_outlast_training():
    """openpi's ends at 30,000 steps, however long it trains (`CosineDecaySchedule`)."""
    config = OptimizerConfig(decay_steps=30_000)
    schedule = make_schedule(config, 20_000)
    fraction = (20_000 - 1000) / (30_000 - 1000)
    expected = 2.5e-6 + (2.5e-5 - 2.5e-6) * (1 + np.cos(np.pi * fraction)) / 2
    np.testing.assert_allclose(schedule(20_000), expected, rtol=1e-5)
    np.testing.assert_allclose(make_schedule(OptimizerConfig(), 20_000)(20_000), 2.5e-6, rtol=1e-5)


def test_inverse_square_root_decay():
    """openpi `RsqrtDecaySchedule`: it counts from the end of warmup."""
    schedule = make_schedule(OptimizerConfig(schedule="rsqrt", peak_lr=5e-5), 20_000)
    expected = {0: 5e-5 / 1001, 500: (5e-5 / 1001 + 5e-5) / 2, 1000: 5e-5, 31_000: 2.5e-5}
    for step, rate in expected.items():
        np.testing.assert_allclose(schedule(step), rate, rtol=1e-4)  # a float32 difference at step 0


@pytest.mark.parametrize("nesterov", [False, True])
def test_sgd(nesterov: bool):
    """openpi `SGD`: momentum, and neither clipping nor weight decay."""
    config = OptimizerConfig(name="sgd", momentum=0.9, nesterov=nesterov)
    optimizer = make_optimizer(config, optax.constant_schedule(0.1))
    params, trace = jnp.array([1.0, -2.0]), np.zeros(2)
    state = optimizer.init(params)
    for grad in (np.array([30.0, -40.0]), np.array([1.0, 2.0])):
        update, state = optimizer.update(jnp.asarray(grad), state, params)
        trace = grad + 0.9 * trace
        np.testing.assert_allclose(update, -0.1 * (grad + 0.9 * trace if nesterov else trace), rtol=1e-6)
