from __future__ import annotations

import numpy as np
import pytest
import torch

import pi0_torch
from convert.checkpoints import open_checkpoint
from convert.layouts.registry import LAYOUTS
from convert.lora import merge_lora
from convert.tensors import Tensor
from pi0_torch.loading import parameters_of, to_torch, with_parameters
from tests.golden_case import (
    CASES,
    FAST,
    LORA,
    GoldenCase,
    check_bfloat16,
    check_float32,
    check_float64,
    check_gradients,
)


def run(model: pi0_torch.Pi0, case: GoldenCase) -> dict[str, np.ndarray]:
    observation, *arrays = case.inputs()
    observation, (actions, noise, time) = pi0_torch.to_device(observation), map(torch.from_numpy, arrays)
    stages: dict[str, torch.Tensor] = {}
    model.compute_loss(observation, actions, noise, time, stages).mean().backward()
    stages["actions_3_steps"] = model.sample_actions(observation, noise, 3)
    stages["actions_10_steps"] = model.sample_actions(observation, noise, 10)
    return {key: value.detach().float().numpy() for key, value in stages.items()}


def gradients(model: pi0_torch.Pi0) -> dict[str, Tensor]:
    """By our names in JAX. The last prefix layer's output and what follows it reach no loss: no gradient is zero."""
    named = {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in model.named_parameters()}
    return LAYOUTS["pi0_torch"].to_ours(model.config, parameters_of(named))


@pytest.mark.parametrize("name", CASES)
def test_float32(name: str):
    case = GoldenCase(name)
    model = pi0_torch.load(case.checkpoint, config=case.config("float32"))
    check_float32(case, run(model, case))
    check_gradients(case, gradients(model))


@pytest.mark.parametrize("name", [*CASES, LORA, FAST])
def test_float64(name: str):
    """Ours alone, which is JAX's too (`pi0_eval.parity`)."""
    case = GoldenCase(name)
    found = []
    for dtype in ("float64", "float32"):
        stored = open_checkpoint(case.checkpoint, case.config("float32")).in_layout("pi0_torch")
        params = {n: to_torch(t.read(()).astype(dtype)) for n, t in stored.items()}
        model = with_parameters(case.config("float32").with_runtime(dtype=dtype), params)
        observation, *arrays = case.inputs()
        observation, (actions, noise, time) = pi0_torch.to_device(observation), map(torch.from_numpy, arrays)
        stages: dict[str, torch.Tensor] = {}
        with torch.no_grad():
            model.compute_loss(observation, actions, noise, time, stages)
            if isinstance(model, pi0_torch.Pi0Fast):
                case.check_tokens(model.sample_tokens(observation.prompt_only(), 16).numpy(), "float32")
            else:
                stages |= {f"actions_{n}_steps": model.sample_actions(observation, noise, n) for n in (3, 10)}
        found.append({key: value.numpy() for key, value in stages.items()})
    check_float64(case, *found)


@pytest.mark.parametrize("name", CASES)
def test_bfloat16(name: str):
    case = GoldenCase(name)
    model = pi0_torch.load(case.checkpoint, config=case.config("float32"), dtype="bfloat16")
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    check_bfloat16(case, run(model, case))


def test_lora():
    """openpi's low-rank updates beside the weights, and merged into them: the same outputs, in float32 to 1e-5."""
    case = GoldenCase(LORA)
    config = case.config("float32")
    model = pi0_torch.load(case.checkpoint, config=config)
    check_float32(case, run(model, case))
    check_gradients(case, gradients(model), only="lora")
    plain, merged = merge_lora(config, open_checkpoint(case.checkpoint, config).ours)
    tensors = LAYOUTS["pi0_torch"].from_ours(plain, merged)
    model = with_parameters(plain, {name: to_torch(t.read(())) for name, t in tensors.items()})
    check_float32(case, run(model, case))


def test_lora_in_bfloat16():
    case = GoldenCase(LORA)
    model = pi0_torch.load(case.checkpoint, config=case.config("bfloat16"))
    check_bfloat16(case, run(model, case))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_fast(dtype: str):
    case = GoldenCase(FAST)
    model = pi0_torch.load(case.checkpoint, config=case.config("float32"), dtype=dtype)
    assert isinstance(model, pi0_torch.Pi0Fast)
    observation, stages = pi0_torch.to_device(case.inputs()[0]), {}
    model.compute_loss(observation, stages=stages)
    outputs = {name: value.detach().float().numpy() for name, value in stages.items()}
    {"float32": check_float32, "bfloat16": check_bfloat16}[dtype](case, outputs)
    case.check_tokens(model.sample_tokens(observation.prompt_only(), 16).numpy(), dtype)
