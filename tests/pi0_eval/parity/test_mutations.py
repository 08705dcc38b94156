"""A part of `tests/mutations.py`: planted faults are found at the right stage, correct pairs pass."""

from __future__ import annotations

from unittest.mock import patch

import numpy as np
import pytest

from pi0.variants import get_variant
from pi0_eval.parity.compare import judge
from pi0_eval.parity.inputs import Inputs
from tests import mutations
from tests.mutations import Mutation, alarms, compute, random_weights, verdict

WEIGHTS = list(mutations.weight_mutations("tiny_pi05"))
TORCH = [m for make in (mutations.constants, mutations.torch_code) for m in make("tiny_pi05") if m.framework == "torch"]
JAX = [m for m in mutations.jax_code("tiny_pi05") if m.name in ("RMS norm in float32", "time from data to noise")]


def test_there_are_enough():
    assert sum(len(mutations.mutations(variant)) for variant in mutations.VARIANTS) >= 150


@pytest.mark.parametrize("mutation", [*WEIGHTS[::12], *TORCH[::3], *JAX], ids=str)
def test_a_fault_is_found_where_it_is(mutation: Mutation):
    assert verdict(mutation) == "ok"


def test_a_fault_at_another_stage_is_reported():
    wrong = Mutation("", "tiny_pi05", ("velocity",), weights=WEIGHTS[0].weights)
    assert "vision layer 0 is found first, not velocity" in verdict(wrong)


def test_correct_pairs_pass():
    assert [(name, out) for name, out, _ in alarms(8, ("tiny_pi05",), sizes=1) if out] == []


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_fault_of_rounding_alone_is_out_of_the_budget(dtype: str):
    """Logits rounded to half the bits of the dtype: the same function in float64, but its error is another."""
    import pi0_torch.models.gemma as gemma

    config = get_variant("tiny_pi05", remat="none")
    weights, inputs = random_weights(config), Inputs.random(config, batch=3, seed=1)
    exact = [compute(f, config.with_runtime(dtype="float64"), weights, inputs) for f in ("jax", "torch")]
    rounded = config.with_runtime(dtype=dtype)
    a, right = compute("jax", rounded, weights, inputs), compute("torch", rounded, weights, inputs)
    attention, bits = gemma.attention, {"float32": 12, "bfloat16": 4}[dtype]

    def coarse(q, k, v, mask=None):
        out = attention(q, k, v, mask)
        step = 2.0 ** (np.floor(np.log2(out.detach().abs().max().item())) - bits)
        return (out / step).round() * step

    with patch.object(gemma, "attention", coarse):
        wrong = compute("torch", rounded, weights, inputs)
    assert all(row.passed for row in judge(*exact, a, right, dtype, dtype))
    rows = judge(*exact, a, wrong, dtype, dtype)
    assert next(row for row in rows if not row.passed).stage == "prefix layer 0"
