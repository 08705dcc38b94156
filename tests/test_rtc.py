"""Real-time chunking: guided and trained, in both frameworks, by the plain models and the samplers."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

import pi0_jax.loading
import pi0_jax.sampler
import pi0_torch.loading
import pi0_torch.sampler
from convert.layouts.registry import LAYOUTS
from convert.tensors import Tensor
from pi0.numerics import euler_times
from pi0.policy.rtc import RTC, Previous, RTCTraining
from pi0_eval.parity.inputs import Inputs
from pi0_jax.models.rtc import guided_velocity
from tests.pi0_eval.parity.test_compare import random_parameters
from tests.sampler_case import config, distance

pytestmark = pytest.mark.usefixtures("highest_precision")

FLOAT32 = 3e-6  # relative L2 of actions: rounding through a whole model, as without real-time chunking
KINDS = ("pi0", "pi05")
METHODS = {
    "guided": RTC("guided"),
    "identity": RTC("guided", jacobian="identity"),
    "trained": RTC("trained"),
}


class Models:
    """One set of parameters as a plain model and as samplers, in JAX and PyTorch."""

    def __init__(self, kind: str):
        self.config = config(kind)
        params = random_parameters(self.config)
        theirs = LAYOUTS["pi0_torch"].from_ours(self.config, {n: Tensor.of(x) for n, x in params.items()})
        tensors = {name: pi0_torch.loading.to_torch(t.read(())) for name, t in theirs.items()}
        self.jax = pi0_jax.loading.with_parameters(self.config, {n: jnp.asarray(x) for n, x in params.items()})
        self.torch = pi0_torch.loading.with_parameters(self.config, tensors)

    _run = staticmethod(jax.jit(lambda model, *inputs: model.sample(*inputs), static_argnums=(3, 4)))

    @functools.cache  # noqa: B019 -- as long as the module's tests
    def sampler(self, framework: str, rtc: RTC | None) -> Any:
        if framework == "jax":
            return pi0_jax.sampler.Sampler(self.jax, rtc=rtc, warm_up=False)
        return pi0_torch.sampler.Sampler(self.torch, rtc=rtc, compile=False, warm_up=False)

    def sample(self, how: str, inputs: Inputs, rtc: RTC | None, previous: Previous | None) -> np.ndarray:
        observation, noise = inputs.observation.prompt_only(), inputs.noise
        framework, _, sampler = how.partition(" ")
        if sampler:
            return np.asarray(self.sampler(framework, rtc).sample(observation, noise, previous))
        if framework == "jax":
            return np.asarray(self._run(self.jax, observation, noise, None, rtc, previous))
        there = None if previous is None else Previous(*map(torch.from_numpy, previous))
        noise = torch.from_numpy(noise)
        return self.torch.sample(pi0_torch.to_device(observation), noise, None, rtc, there).numpy()


@pytest.fixture(scope="module")
def models() -> Any:
    return functools.cache(Models)


def previous_chunk(inputs: Inputs, rtc: RTC, delay: int = 2) -> Previous:
    """Of the first row the rest of a chunk, of the last one no chunk; the last dimension is padding."""
    rng, (batch, horizon, dim) = np.random.default_rng(1), inputs.noise.shape
    weights = np.zeros((batch, horizon, dim), np.float32)
    weights[:-1] = rtc.weights(horizon, delay, horizon - 1)[:, None]
    weights[:, :, -1] *= rtc.method == "trained"
    return Previous(rng.normal(size=weights.shape).astype(np.float32), weights)


HOW = ("jax", "jax sampler", "torch", "torch sampler")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", METHODS)
def test_the_same_actions(kind: str, method: str, models: Any):
    inputs = Inputs.random(config(kind), 3, seed=1)
    rtc = METHODS[method]
    previous = previous_chunk(inputs, rtc)
    found = {how: models(kind).sample(how, inputs, rtc, previous) for how in HOW}
    for how, actions in found.items():
        assert distance(actions, found["torch"]) <= FLOAT32, how
    without = models(kind).sample("torch", inputs, None, None)
    assert distance(found["torch"][:-1], without[:-1]) > 0.01
    assert distance(found["torch"][-1:], without[-1:]) <= FLOAT32  # no previous chunk


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("how", HOW)
def test_given_actions_stay(kind: str, how: str, models: Any):
    inputs, rtc = Inputs.random(config(kind), 3, seed=2), METHODS["trained"]
    previous = previous_chunk(inputs, rtc)
    actions = models(kind).sample(how, inputs, rtc, previous)
    given = previous.weights > 0
    assert given.any()
    np.testing.assert_array_equal(actions[given], previous.actions[given])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("method", ["guided", "identity"])
def test_without_guidance_it_is_the_plain_sampler(kind: str, how: str, method: str, models: Any):
    inputs, rtc = Inputs.random(config(kind), 3, seed=3), METHODS[method]
    expected = models(kind).sample(how, inputs, None, None)
    previous = previous_chunk(inputs, rtc)
    weightless = Previous(previous.actions, np.zeros_like(previous.weights))
    np.testing.assert_array_equal(models(kind).sample(how, inputs, rtc, weightless), expected)
    silent = RTC("guided", rtc.jacobian, max_guidance=0)
    np.testing.assert_array_equal(models(kind).sample(how, inputs, silent, previous), expected)


def test_guidance_is_the_gradient_of_the_weighted_error():
    """Against finite differences of ½·Σ W ⊙ (A_prev − Â(x))² in float64: its gradient is −g. The model is as released
    ones are, so constants such as the time's frequencies are float32."""
    with jax.enable_x64(True):
        model = config("pi05", "float64")
        params = {n: jnp.asarray(x, jnp.float64) for n, x in random_parameters(model).items()}
        made = pi0_jax.loading.merge(model, pi0_jax.loading.unflatten(params))
        inputs = Inputs.random(model, 1, seed=4)
        previous = Previous(*(np.asarray(x, np.float64) for x in previous_chunk(Inputs.random(model, 2, 4), RTC())))
        previous = Previous(*(x[:1] for x in previous))
        prefix, valid = made.embed_prefix(inputs.observation.prompt_only())
        _, cache = made.read_prefix(prefix, valid, valid[:, None] & valid[:, :, None])
        x, time, scale = jnp.asarray(inputs.noise, jnp.float64), 0.6, 0.5

        @jax.jit
        def velocity(x: Any) -> Any:
            """One Euler step of the model of size 1, so that the difference is the velocity."""
            return x - made.integrate(inputs.observation, x, 1, cache, valid)

        guided = guided_velocity(velocity, x, time, scale, RTC(), previous)
        guidance = np.asarray((velocity(x) - guided) / scale)

        @jax.jit
        def error(x: Any) -> Any:
            return 0.5 * (previous.weights * (previous.actions - (x - time * velocity(x))) ** 2).sum()

        rng, step = np.random.default_rng(0), 1e-5
        for _ in range(5):
            direction = rng.normal(size=x.shape)
            slope = float(error(x + step * direction) - error(x - step * direction)) / (2 * step)
            assert abs(slope + (guidance * direction).sum()) <= 1e-6 * abs(slope)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_training_without_delay_is_plain_training_in_jax(kind: str, models: Any):
    """Bit for bit, gradients too; operation by operation: two compiled programs fuse, and so round, unlike."""
    both, inputs = models(kind), Inputs.random(config(kind), 3, seed=5)
    data = (inputs.observation, inputs.actions, inputs.noise, inputs.time)

    def run(delay: Any) -> Any:
        with jax.disable_jit():
            return jax.value_and_grad(lambda model: model.compute_loss(*data, delay=delay).mean())(both.jax)

    jax.tree.map(np.testing.assert_array_equal, run(None), run(jnp.zeros(3, jnp.int32)))


@pytest.mark.parametrize("kind", KINDS)
def test_training_without_delay_is_plain_training_in_torch(kind: str, models: Any):
    """Bit for bit, gradients too."""
    model, inputs = models(kind).torch, Inputs.random(config(kind), 3, seed=5)
    data = (inputs.actions, inputs.noise, inputs.time)
    tensors = (pi0_torch.to_device(inputs.observation), *map(torch.from_numpy, data))

    def run(delay: Any) -> Any:
        model.requires_grad_().zero_grad()
        loss = model.compute_loss(*tensors, delay=delay).mean()
        loss.backward()
        gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        model.requires_grad_(False)
        return loss, gradients

    (plain_loss, plain), (loss, none) = run(None), run(torch.zeros(3, dtype=torch.int64))
    assert torch.equal(plain_loss, loss) and all(torch.equal(plain[n], none[n]) for n in plain)


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_loss_with_delays(kind: str, models: Any):
    """Both frameworks, and the mean over what is not given; what is given has no influence but as an input."""
    both, inputs = models(kind), Inputs.random(config(kind), 3, seed=6)
    delay = np.array([0, 1, 3], np.int32)
    data = (inputs.actions, inputs.noise, inputs.time)
    of_jax = jax.jit(lambda model, *batch: model.compute_loss(*batch[:-1], delay=batch[-1]))
    found = np.asarray(of_jax(both.jax, inputs.observation, *data, delay))
    tensors = (pi0_torch.to_device(inputs.observation), *map(torch.from_numpy, data))
    with torch.no_grad():
        same = both.torch.compute_loss(*tensors, delay=torch.from_numpy(delay)).numpy()
    assert distance(found, same) <= FLOAT32
    given = np.arange(found.shape[1]) < delay[:, None]
    assert (found[given] == 0).all() and (found[~given] > 0).all()
    noise = np.where(given[..., None], 7, inputs.noise).astype(np.float32)  # which is not seen there
    again = np.asarray(of_jax(both.jax, inputs.observation, inputs.actions, noise, inputs.time, delay))
    np.testing.assert_array_equal(again, found)


def test_weights_and_scales():
    """By hand, from the paper's formulas."""
    c = (3 - 2) / (3 - 1 + 1)
    expected = [1, (2 / 3) * np.expm1(2 / 3) / np.expm1(1), c * np.expm1(c) / np.expm1(1), 0, 0]
    np.testing.assert_allclose(RTC().weights(5, 1, 3), expected, rtol=1e-6)
    np.testing.assert_array_equal(RTC("trained").weights(5, 2, 4), [1, 1, 0, 0, 0])
    np.testing.assert_allclose(RTC().scales(euler_times(4)), [5, (9 + 1) / 3, 2, (9 + 1) / 3], rtol=1e-6)
    np.testing.assert_allclose(RTCTraining(3).probabilities(), [0.25] * 4)
    few = RTCTraining(2, "exponential").probabilities()
    np.testing.assert_allclose(few[1:] / few[:-1], np.exp([-1, -1]), rtol=1e-6)


@pytest.mark.parametrize(
    ("options", "what"),
    [
        ({"method": "guess"}, "method"),
        ({"jacobian": "none"}, "jacobian"),
        ({"max_guidance": -1}, "max_guidance"),
        ({"method": "trained", "max_guidance": 3}, "options of the method guided"),
    ],
)
def test_options_are_checked(options: dict[str, Any], what: str):
    with pytest.raises(ValueError, match=what):
        RTC(**options)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("how", ["torch", "torch sampler"])
def test_inference_mode(kind: str, how: str, models: Any):
    inputs, rtc = Inputs.random(config(kind), 2, seed=7), METHODS["guided"]
    previous = previous_chunk(inputs, rtc)
    expected = models(kind).sample(how, inputs, rtc, previous)
    with torch.inference_mode():
        np.testing.assert_array_equal(models(kind).sample(how, inputs, rtc, previous), expected)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", METHODS)
def test_compiled(kind: str, method: str, models: Any):
    """One graph, whatever the delay and the rest of the previous chunk."""
    rtc, inputs = METHODS[method], Inputs.random(config(kind), 2, seed=8)
    sampler = pi0_torch.sampler.Sampler(models(kind).torch, rtc=rtc, compile=True, warm_up=False)
    observation = inputs.observation.prompt_only()
    for delay in (0, 2):
        previous = previous_chunk(inputs, rtc, delay)
        expected = models(kind).sample("torch sampler", inputs, rtc, previous)
        with torch._dynamo.config.patch(error_on_recompile=delay > 0):
            assert distance(sampler.sample(observation, inputs.noise, previous).numpy(), expected) <= FLOAT32
