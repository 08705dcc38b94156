"""A part of `tests/mutations.py` and `tests/pairs.py`: planted faults are found where they are, correct pairs pass."""

from __future__ import annotations

import dataclasses
import json
import re
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest

import pi0_torch.models.flow as torch_flow
from convert.checkpoints import Checkpoint
from convert.layouts.registry import LAYOUTS
from convert.tensors import Tensor
from pi0.assets import Assets
from pi0.variants import get_variant
from pi0_eval.parity.compare import judge
from pi0_eval.parity.frameworks import FRAMEWORKS, exact_matmuls
from pi0_eval.parity.inputs import Inputs
from tests import mutations, pairs
from tests.faults import forward, gradients, sampling, weights
from tests.faults.mutation import RECIPE, Mutation, misfits
from tests.mutations import verdict
from tests.pairs import Pair, random_weights

WEIGHTS = list(weights.weight_mutations("tiny_pi05"))
TORCH = [m for m in mutations.mutations("tiny_pi05") if m.framework == "torch" and m.patches]
TEXT = [m for make in (gradients.torch_gradients, sampling.decoding, sampling.recipe) for m in make(RECIPE)]
JAX = [m for m in forward.jax_code("tiny_pi05") if m.name in ("RMS norm in float32", "time from data to noise")]


def test_there_are_enough():
    """And each has a name of its own, by which its line is kept."""
    names = [str(m) for variant in mutations.VARIANTS for m in mutations.mutations(variant)]
    assert len(set(names)) == len(names) >= 1400


def test_faults_fit_the_models():
    """Each replacement takes the arguments of what it replaces, in JAX too, where few of them run here."""
    everything = [m for variant in mutations.VARIANTS for m in mutations.mutations(variant)]
    assert [line for m in everything for line in misfits(m)] == []


def test_a_fault_that_no_longer_fits_is_reported():
    old = Mutation("old", "tiny", (), patches=((torch_flow, "interpolate", lambda actions, noise, time, dtype: None),))
    assert re.match(r"tiny, torch: old: interpolate\(actions.* in place of \(.*delay", misfits(old)[0])


def test_all_of_one_model_in_pytorch_are_found():
    """Its code, roundings, constants and gradients, and its sampler."""
    assert [line for m in TORCH if (line := verdict(m)) != "ok"] == []


@pytest.mark.parametrize("mutation", [*WEIGHTS[::24], *TEXT[1::5], *JAX[:1]], ids=str)
def test_a_fault_is_found_where_it_is(mutation: Mutation):
    assert verdict(mutation) == "ok"


def test_a_fault_at_another_stage_is_reported():
    wrong = Mutation("", "tiny_pi05", ("velocity",), weights=WEIGHTS[0].weights)
    assert "vision layer 0 is found first, not velocity" in verdict(wrong)


def test_a_wrong_gradient_is_named():
    """Each row of gradients that parts says the parameter."""
    (fault,) = (m for m in TORCH if m.name == "no gradient to the time's MLP")
    right = mutations.reference("tiny_pi05", "jax")
    with patch.object(*fault.patches[0]):
        wrong = mutations.compute("tiny_pi05", mutations.Side("torch"), mutations.weights_of("tiny_pi05"), True)
    first = next(row for row in judge(right, wrong, right, wrong) if not row.proved)
    assert first.stage == "gradients, all" and "most in time_mlp_" in first.detail


@pytest.mark.parametrize("number", [25, *(pytest.param(n, marks=pytest.mark.slow) for n in (61, 67))])
def test_correct_pairs_pass(number: int):
    """Trained weights: plain models in float32, other layouts, and a sampler in bfloat16."""
    line = pairs.run(Pair.of(number))
    assert line["out"] == [] and max(line["shares"].values()) <= 1


def test_lines_of_faults_are_kept(tmp_path):
    """Of those that were found; what was not, or raised an exception, is tried again."""
    out, tried = tmp_path / "faults.jsonl", []

    def found(mutation: Mutation) -> str:
        tried.append(mutation.name)
        if len(tried) == 2:
            raise TypeError("an argument too many")
        return "ok"

    with patch.object(mutations, "verdict", found):
        for _ in range(2):
            lines = list(mutations.results(["tiny_lora"], ["lora"], "torch", out))
    assert len(lines) == len(tried) - 1 and tried[1] == tried[-1]
    assert json.loads(out.read_text().splitlines()[1])["verdict"].endswith("TypeError: an argument too many")
    assert re.search(rf"^lora +{len(lines)} +0 +0 ", mutations.table(lines), re.MULTILINE)


def test_lines_are_kept(tmp_path):
    """A second call computes what the first one did not."""
    ran, out = [], tmp_path / "pairs.jsonl"

    def run(pair: Pair) -> dict[str, Any]:
        ran.append(pair.number)
        return dataclasses.asdict(pair) | {"out": ["loss"] * (pair.number == 7), "shares": {"loss": 0.5}}

    with patch.object(pairs, "run", run):
        for count in (8, 20):
            lines = list(pairs.results(count, ("tiny_pi05",), out))
    assert sorted(ran) == sorted(line["number"] for line in lines) == [1, 7, 13, 19] and {*ran[:2]} == {1, 7}
    assert re.search(r"^all +4 +1 +0\.50 +0\.50$", pairs.table(lines), re.MULTILINE)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_fault_of_rounding_alone_is_out_of_the_budget(dtype: str):
    """Logits rounded to half the bits of the dtype: the same function in float64, but its error is another."""
    import pi0_torch.models.gemma as gemma

    config = get_variant("tiny_pi05", remat="none")
    ours, inputs = random_weights(config), Inputs.random(config, batch=3, seed=1)
    tensors = {name: Tensor.of(value) for name, value in ours.items()}

    def compute(framework: str, dtype: str):
        model = config.with_runtime(dtype=dtype)
        checkpoint = Checkpoint(mutations.Path("memory"), LAYOUTS["pi0_jax"], Assets(model), tensors)
        with exact_matmuls():
            return FRAMEWORKS[framework](checkpoint, model, inputs, 3, False)

    exact = [compute(framework, "float64") for framework in ("jax", "torch")]
    a, right = compute("jax", dtype), compute("torch", dtype)
    attention, bits = gemma.attention, {"float32": 12, "bfloat16": 4}[dtype]

    def coarse(q, k, v, mask=None):
        out = attention(q, k, v, mask)
        step = 2.0 ** (np.floor(np.log2(out.detach().abs().max().item())) - bits)
        return (out / step).round() * step

    with patch.object(gemma, "attention", coarse):
        wrong = compute("torch", dtype)
    assert all(row.passed for row in judge(*exact, a, right, dtype, dtype))
    rows = judge(*exact, a, wrong, dtype, dtype)
    assert next(row for row in rows if not row.passed).stage == "prefix layer 0"
