"""π0.5's recipe in JAX and in PyTorch: the same losses, subtasks and actions."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

import pi0_torch
from pi0.policy.subtasks import SubtaskSampler
from pi0.run_config import RecipeConfig
from pi0_eval.parity.report import PROOF
from pi0_jax.loading import with_parameters
from pi0_torch.loading import to_torch
from pi0_torch.loading import with_parameters as torch_with_parameters
from tests.recipe_case import CONFIG, mixed_batch, random_parameters, torch_parameters

pytestmark = pytest.mark.usefixtures("highest_precision")


EXACT = CONFIG.with_runtime(dtype="float64")


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


@pytest.fixture
def models():
    ours = with_parameters(EXACT, {n: jnp.asarray(x.astype(np.float64)) for n, x in random_parameters().items()})
    theirs = {name: to_torch(value.astype(np.float64)) for name, value in torch_parameters().items()}
    return ours, torch_with_parameters(EXACT, theirs)


def error(a, b) -> float:
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    return float(np.linalg.norm(a - b) / np.linalg.norm(a))


def test_losses(models):
    ours, theirs = models
    observation, *rest = mixed_batch()
    a = jax.jit(lambda m, *batch: m.loss_parts(*batch, RecipeConfig()))(ours, observation, *rest)
    b = theirs.loss_parts(pi0_torch.to_device(observation), *map(torch.from_numpy, rest), RecipeConfig())
    assert list(a) == ["fast", "flow", "text"] and set(b) == set(a)  # jit sorts
    for name, loss in a.items():
        assert error(loss, b[name].detach()) <= PROOF, name
    np.testing.assert_array_equal(
        jax.jit(type(ours).next_tokens)(ours, observation), theirs.next_tokens(pi0_torch.to_device(observation))
    )


def test_subtasks_and_actions(models):
    """Written together, and then kept for a chunk of a new observation: identical tokens, one function in float64."""
    ours, theirs = models
    sample = jax.jit(partial(type(ours).sample_with_subtask, ours), static_argnames=("num_steps", "max_decoding_steps"))
    planners = (
        SubtaskSampler(lambda o, n, s: sample(o, n, s, num_steps=3, max_decoding_steps=6), every=2),
        SubtaskSampler(
            lambda o, n, s: theirs.sample_with_subtask(
                pi0_torch.to_device(o), torch.from_numpy(n), s, num_steps=3, max_decoding_steps=6
            ),
            every=2,
        ),
    )
    seen = []
    for chunk in range(3):
        observation, _, noise, _ = mixed_batch(chunk)
        (tokens, actions), (same_tokens, same) = (planner(observation, noise) for planner in planners)
        np.testing.assert_array_equal(tokens, same_tokens)
        assert error(actions, same) <= PROOF
        seen.append(np.asarray(tokens).tolist())
    assert seen[0] == seen[1] != seen[2]
