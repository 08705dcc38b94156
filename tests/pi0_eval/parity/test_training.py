"""Twenty steps of training in JAX and in PyTorch, of every kind of run, from the same parameters and batches."""

from __future__ import annotations

import dataclasses
import functools
import json

import numpy as np
import pytest

from convert.tensors import Tensor
from pi0.run_config import DataConfig, OptimizerConfig, RecipeConfig, RunConfig
from pi0.variants import get_variant
from pi0_eval.parity.command import main
from pi0_eval.parity.training import (
    TOLERANCE,
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


LARGE = {"tiny": "bench", "tiny_pi05": "bench_pi05", "tiny_pi0_fast": "bench_pi0_fast", "tiny_lora": "bench"}


def run_of(kind: str, large: bool = False, **changes) -> tuple[RunConfig, dict[str, Tensor]]:
    """The config of a run and the parameters it begins with; `large`, of 58 M parameters."""
    variant, options = KINDS[kind]
    model = get_variant(LARGE[variant] if large else variant, remat="none")
    if large:
        model = dataclasses.replace(model, image_resolution=(112, 112))
    if large and kind == "lora":
        expert = dataclasses.replace(model.paligemma, lora_rank=8, lora_alpha=8.0)
        model = dataclasses.replace(
            model, paligemma=expert, action_expert=dataclasses.replace(model.action_expert, lora_rank=8, lora_alpha=8.0)
        )
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
    assert all(difference.value <= TOLERANCE for row in report.rows for difference in row.values()), report.table()
    assert {"loss", "grad_norm", "mu", "nu", "params", "ema"} == report.rows[0].keys()


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_twenty_steps_of_58_million_parameters(kind: str):
    config, ours = run_of(kind, large=True)
    batches = random_batches(config, config.steps, 2, 0)
    sides = steps_in_jax(config, ours, batches), steps_in_torch(config, ours, batches)
    report = compare_steps("JAX", "PyTorch", *sides)
    print(report.table())
    assert report.passed and len(report.rows) == 20, report.table()


def test_the_first_that_parts_is_named():
    """In the order of computation; noise of rounding is not compared, and what is missing is an error."""
    one, other = (steps[1] for steps in trained("pi0"))
    changed = {name: dict(part) for name, part in other.tensors.items()}
    changed["nu"]["state_proj.kernel"] = changed["nu"]["state_proj.kernel"] * 2
    changed["params"]["vision.head.kernel"] = changed["params"]["vision.head.kernel"] * (1 + 1e-4)
    report = compare_steps("A", "B", iter([one, one]), iter([other, Step(other.scalars, changed)]))
    assert not report.passed and report.first.step == 2 and report.first.name == "nu/state_proj.kernel"
    assert "FAILED: after step 2, nu/state_proj.kernel is apart by 1.00e+00; 6e-05 is allowed" in report.table()
    noisy = {name: dict(part) for name, part in other.tensors.items()}
    noisy["params"]["vision.layers.attention.key.bias"] = np.ones(1, np.float32)
    assert compare_steps("A", "B", iter([one]), iter([Step(other.scalars, noisy)])).passed
    del noisy["params"]["vision.layers.attention.key.bias"]
    with pytest.raises(ValueError, match="params is of different parameters"):
        compare_steps("A", "B", iter([one]), iter([Step(other.scalars, noisy)]))
    nan = Step({**other.scalars, "loss": float("nan")}, other.tensors)
    assert compare_steps("A", "B", iter([one]), iter([nan])).first.name == "loss"


def test_the_command(tmp_path, capsys):
    """Both in PyTorch, which compiles nothing; and checkpoints that are apart."""
    export = "tests/written_before/export"
    arguments = ["--framework-b", "torch", "--train-steps", "2", "--json", str(tmp_path / "report.json")]
    with pytest.raises(SystemExit) as stop:
        main([export, export, *arguments])
    report = json.loads((tmp_path / "report.json").read_text())
    assert stop.value.code == 0 and report["passed"] and len(report["steps"]) == 2
    assert "PASSED: after 2 steps" in capsys.readouterr().out
    for options, said in ((["--sliced"], "takes no --sliced"), (["--dtype", "bfloat16"], "takes no --dtype")):
        with pytest.raises(SystemExit) as stop:
            main([export, export, *arguments, *options])
        assert stop.value.code == 2 and said in capsys.readouterr().err
