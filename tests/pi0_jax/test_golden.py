from __future__ import annotations

from functools import partial

import jax
import numpy as np
import pytest

import pi0_jax
from convert.checkpoints import open_checkpoint
from convert.lora import merge_lora
from convert.tensors import Tensor
from pi0_jax.loading import parameters_of, with_parameters
from tests.golden_case import CASES, FAST, LORA, GoldenCase, check_bfloat16, check_float32, check_gradients

pytestmark = pytest.mark.usefixtures("highest_precision")


@partial(jax.jit, static_argnames="gradients")
def run(model, observation, actions, noise, time, gradients):
    def mean_loss(model):
        stages = {}
        return model.compute_loss(observation, actions, noise, time, stages).mean(), stages

    if gradients:
        gradient, stages = jax.grad(mean_loss, has_aux=True)(model)
    else:
        gradient, stages = None, mean_loss(model)[1]
    stages["actions_3_steps"] = model.sample_actions(observation, noise, 3)
    stages["actions_10_steps"] = model.sample_actions(observation, noise, 10)
    return stages, gradient


@pytest.mark.parametrize("name", CASES)
def test_float32(name: str):
    case = GoldenCase(name)
    model = pi0_jax.load(case.checkpoint, config=case.config("float32"))
    stages, gradient = run(model, *case.inputs(), gradients=True)
    check_float32(case, stages)
    check_gradients(case, {n: Tensor.of(np.asarray(g)) for n, g in parameters_of(gradient).items()})


@pytest.mark.parametrize("name", CASES)
def test_bfloat16(name: str):
    case = GoldenCase(name)
    model = pi0_jax.load(case.checkpoint, config=case.config("float32"), dtype="bfloat16")
    assert {x.dtype.name for x in parameters_of(model).values()} == {"float32"}
    check_bfloat16(case, run(model, *case.inputs(), gradients=False)[0])


def test_lora():
    """openpi's low-rank updates beside the weights, and merged into them: the same outputs, in float32 to 1e-5."""
    case = GoldenCase(LORA)
    config = case.config("float32")
    model = pi0_jax.load(case.checkpoint, config=config)
    stages, gradient = run(model, *case.inputs(), gradients=True)
    check_float32(case, stages)
    check_gradients(case, {n: Tensor.of(np.asarray(g)) for n, g in parameters_of(gradient).items()}, only="lora")
    plain, merged = merge_lora(config, open_checkpoint(case.checkpoint, config).ours)
    model = with_parameters(plain, {name: jax.numpy.asarray(t.read(())) for name, t in merged.items()})
    check_float32(case, run(model, *case.inputs(), gradients=False)[0])


def test_lora_in_bfloat16():
    case = GoldenCase(LORA)
    model = pi0_jax.load(case.checkpoint, config=case.config("bfloat16"))
    check_bfloat16(case, run(model, *case.inputs(), gradients=False)[0])


@jax.jit
def run_fast(model, observation):
    stages = {}
    model.compute_loss(observation, stages=stages)
    return stages, model.sample_tokens(observation.prompt_only(), 16)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_fast(dtype: str):
    case = GoldenCase(FAST)
    model = pi0_jax.load(case.checkpoint, config=case.config("float32"), dtype=dtype)
    assert isinstance(model, pi0_jax.Pi0Fast)
    stages, tokens = run_fast(model, case.inputs()[0])
    {"float32": check_float32, "bfloat16": check_bfloat16}[dtype](case, stages)
    case.check_tokens(np.asarray(tokens), dtype)
