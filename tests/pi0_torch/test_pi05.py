from __future__ import annotations

import dataclasses

import pytest
import torch

import pi0_torch
from pi0.run_config import RecipeConfig
from pi0_torch.loading import to_torch, with_parameters
from tests.recipe_case import CONFIG, mixed_batch, torch_parameters

FLOW = RecipeConfig(text_weight=0, fast_weight=0, flow_weight=1, insulated=False)


@pytest.fixture(scope="module")
def model():
    return with_parameters(CONFIG, {name: to_torch(value) for name, value in torch_parameters().items()})


def batch():
    observation, *rest = mixed_batch()
    return pi0_torch.to_device(observation), *(torch.from_numpy(array) for array in rest)


def gradients(model, loss):
    names, params = zip(*model.named_parameters(), strict=True)
    return dict(zip(names, torch.autograd.grad(loss, params, materialize_grads=True), strict=True))


def test_without_text_it_is_plain_pi05(model):
    """Loss and gradients, bit for bit."""
    observation, *rest = batch()
    observation = observation.prompt_only()
    plain = model.compute_loss(observation, *rest)
    empty = dataclasses.replace(
        observation,
        token_group=torch.zeros_like(observation.tokenized_prompt),
        has_actions=torch.ones(len(plain), dtype=torch.bool),
    )
    same = model.loss_parts(empty, *rest, FLOW)["flow"]
    assert torch.equal(plain, same)
    expected, found = gradients(model, plain.mean()), gradients(model, same.mean())
    assert [name for name in expected if not torch.equal(expected[name], found[name])] == []


def test_knowledge_insulation(model):
    """Of every parameter: PaliGemma's and the tower's gradient is exactly zero, the action expert's as without."""
    free = gradients(model, model.loss_parts(*batch(), FLOW)["flow"].mean())
    recipe = dataclasses.replace(FLOW, insulated=True)
    insulated = gradients(model, model.loss_parts(*batch(), recipe)["flow"].mean())
    largest = max(value.abs().max() for value in free.values())
    for name, value in insulated.items():
        if name.startswith(("vision.", "paligemma.")):
            assert not value.any(), name
        else:
            torch.testing.assert_close(value, free[name], rtol=0, atol=1e-6 * largest.item(), msg=name)
