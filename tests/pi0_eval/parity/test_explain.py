"""Planted faults are found at the operation that they are in."""

from __future__ import annotations

import contextlib
from functools import cache
from pathlib import Path
from unittest.mock import patch

import pytest

from convert.checkpoints import Checkpoint
from convert.layouts.registry import LAYOUTS
from convert.tensors import Tensor
from pi0.assets import Assets
from pi0.variants import get_variant
from pi0_eval.parity.compare import errors
from pi0_eval.parity.explain import operations
from pi0_eval.parity.frameworks import Results
from pi0_eval.parity.inputs import Inputs
from pi0_eval.parity.report import PROOF
from tests.mutations import jax_code, random_weights, torch_code

FAULTS = {
    "exact GELU, vision": "vision layer 0: GELU",
    "exact GELU, Gemma": "layer 0: GELU",
    "softmax in float32, Gemma": "layer 0: softmax",
    "no RoPE": "layer 0: RoPE of query",
    "RMS norm in float32": "layer 0: attention norm of prefix",
    "no residual": "layer 0: attention residual",
}
CASES = [m for make in (torch_code, jax_code) for m in make("tiny_pi05") if m.name in FAULTS]


def run(framework: str) -> Results:
    config = get_variant("tiny_pi05", remat="none").with_runtime(dtype="float64")
    weights = {name: Tensor.of(value) for name, value in random_weights(config).items()}
    checkpoint = Checkpoint(Path("memory"), LAYOUTS["pi0_jax"], Assets(config), weights)
    return operations(checkpoint, config, Inputs.random(config, batch=2, seed=1), framework, 1)


correct = cache(run)


def test_correct_pairs_have_the_same_operations():
    ours, theirs = correct("jax"), correct("torch")
    assert list(ours.stages) == list(theirs.stages)
    assert max(errors(ours, theirs, "float64").values()) <= PROOF


@pytest.mark.parametrize("mutation", CASES, ids=str)
def test_a_fault_is_found_at_its_operation(mutation):
    other = correct("torch" if mutation.framework == "jax" else "jax")
    with contextlib.ExitStack() as stack:
        for target, name, value in mutation.patches:
            stack.enter_context(patch.object(target, name, value))
        found = run(mutation.framework)
    first = next(name for name, error in errors(other, found, "float64").items() if not error <= PROOF)
    assert first == FAULTS[mutation.name]
