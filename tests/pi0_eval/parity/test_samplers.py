"""Samplers and plain models, in either framework, in float64: one function, to 1e-12, or the same tokens."""

from __future__ import annotations

import numpy as np
import pytest

from pi0.variants import get_variant
from pi0_eval.parity.compare import errors
from pi0_eval.parity.frameworks import FRAMEWORKS, exact_matmuls
from pi0_eval.parity.inputs import Inputs
from pi0_eval.parity.report import PROOF
from pi0_eval.parity.sides import IN_FLOAT64, Side
from tests.pi0_eval.parity.test_compare import random_checkpoint

SIDES = {
    "tiny_lora": [Side("jax", "sampler"), *(Side("torch", "sampler", name) for name in ("sdpa", "eager"))],
    "tiny_pi0_fast": [Side("jax", "sampler"), Side("torch", "sampler", "eager")],
}


@pytest.mark.parametrize("variant", [pytest.param("tiny_lora", marks=pytest.mark.slow), "tiny_pi0_fast"])
def test_in_float64(variant: str):
    checkpoint = random_checkpoint(get_variant(variant))
    config = checkpoint.assets.model.with_runtime(dtype="float64", remat="none")
    inputs = Inputs.random(config, batch=3, seed=1)
    sides = [Side("torch"), Side("jax"), *SIDES[variant]]
    assert all(side.attention in (None, *IN_FLOAT64) for side in sides)
    with exact_matmuls():
        results = [
            FRAMEWORKS[s.framework](checkpoint, config, inputs, 6, False, s.of("", "float64").proof) for s in sides
        ]
    (sampled,) = {"actions", "tokens"} & results[0].stages.keys()
    for side, found in zip(sides, results, strict=True):
        assert errors(results[0], found, "float64")[sampled] <= PROOF, side
    assert len(np.unique(results[0].stages[sampled])) > 3  # not all the same
