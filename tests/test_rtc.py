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
