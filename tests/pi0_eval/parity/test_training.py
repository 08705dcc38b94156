"""Twenty steps of training in JAX and in PyTorch, of every kind of run, from the same parameters and batches."""

from __future__ import annotations

import functools

import numpy as np
import pytest

from convert.tensors import Tensor
from pi0.run_config import DataConfig, OptimizerConfig, RecipeConfig, RunConfig
from pi0.variants import get_variant
from pi0_eval.parity.training import (
    Step,
    compare_steps,
    random_batches,
    steps_in_jax,
    steps_in_torch,
)
from tests.pi0_eval.parity.test_compare import random_parameters

DATA = DataConfig("metaworld", "metaworld", action_tokenizer="bundled://fast_tokenizer")
OPTIMIZER = OptimizerConfig(peak_lr=1e-4, warmup_steps=5, weight_decay=1e-4)
KINDS = {
    "pi0": ("tiny", {}),
    "pi05, recipe, insulated": ("tiny_pi05", {"recipe": RecipeConfig()}),
    "pi0_fast": ("tiny_pi0_fast", {}),
    "lora": ("tiny_lora", {"freeze": "lora"}),
    "frozen vision tower": ("tiny", {"freeze": "^vision"}),
}


def run_of(kind: str, **changes) -> tuple[RunConfig, dict[str, Tensor]]:
    """The config of a run and the parameters it begins with."""
    variant, options = KINDS[kind]
    model = get_variant(variant, remat="none")
    options = {"optimizer": OPTIMIZER, "ema_decay": 0.9, "steps": 20} | options | changes
    ours = {name: Tensor.of(np.asarray(x)) for name, x in random_parameters(model).items()}
    return RunConfig(model, DATA, **options), ours


@functools.cache
def trained(kind: str) -> tuple[list[Step], list[Step]]:
    config, ours = run_of(kind)
    batches = random_batches(config, config.steps, 4, 0)
    return list(steps_in_jax(config, ours, batches)), list(steps_in_torch(config, ours, batches))


@pytest.mark.parametrize("kind", KINDS)
def test_twenty_steps(kind: str):
    """AdamW with clipping and a moving average: everything within 1e-5, float32 in both."""
    report = compare_steps("JAX", "PyTorch", *map(iter, trained(kind)))
    print(report.table())
    assert report.passed and len(report.rows) == 20, report.table()
    assert {"loss", "grad_norm", "mu", "nu", "params", "ema"} == report.rows[0].keys()
