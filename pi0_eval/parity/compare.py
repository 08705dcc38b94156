"""Compare two checkpoints stage by stage on the same inputs, in either framework: `compare`, `assert_parity`.

Stages follow the order of computation, so the first one out of tolerance is where the models diverge.
"""

from __future__ import annotations

import dataclasses
import gc
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from convert.checkpoints import Checkpoint, open_checkpoint
from pi0.config import ModelConfig
from pi0.plugins import require_extra
from pi0_eval.parity.frameworks import FRAMEWORKS, Results, exact_matmuls
from pi0_eval.parity.inputs import Inputs, ParityError
from pi0_eval.parity.report import Report, Row

# float32: relative L2 error by stage. Correct implementations differ by rounding, about 1e-6 after a whole model; wrong
# operations show as 1e-3 or more. Errors of actions accumulate over steps, from shared noise. The error of tokens is
# the fraction that differs.
FLOAT32_TOLERANCE = {"stage": 1e-5, "gradients": 1e-5, "actions": 3e-6, "tokens": 0.0}
# Gradients with a norm below this fraction of the whole gradient's are measured relative to that fraction of it.
GRADIENT_FLOOR = 1e-4
# Gradients below this fraction in both models are rounding noise and not compared: SigLIP's key bias has no gradient in
# exact arithmetic (softmax ignores a constant), and about 1e-9 of the whole in float32.
GRADIENT_NOISE = {"float64": 1e-14, "float32": 1e-7, "bfloat16": 1e-4}


def compare(
    a: str | Path,
    b: str | Path,
    *,
    dtype: str = "float32",
    framework_a: str | None = None,
    framework_b: str | None = None,
    inputs: Inputs | Path | None = None,
    batch: int = 2,
    seed: int = 0,
    num_steps: int = 10,
    gradients: bool = True,
) -> Report:
    """Run two checkpoints on the same inputs and compare every stage.

    In float32 the tolerances are `FLOAT32_TOLERANCE`. In bfloat16 both models also run in float32, and may differ by
    √(dA² + dB²), as independent rounding errors of the size of their own distances dA, dB from float32 would.

    Args:
        a, b: addresses of checkpoints, as in `open_checkpoint`.
        framework_a, framework_b: "jax" or "torch" (default: by the layout's file format).
        inputs: given, or an npz file of `Inputs.load`; random by default, of `batch` rows from `seed`.
        num_steps: Euler steps, or for π0-FAST the number of decoded tokens, which are compared in float32 only.
        gradients: whether to compare gradients, for twice the memory.

    Raises ParityError for different models.
    """
    checkpoints = open_checkpoint(a), open_checkpoint(b)
    config = _common_config(*checkpoints)
    if inputs is None:
        inputs = Inputs.random(config, batch, seed)
    elif not isinstance(inputs, Inputs):
        inputs = Inputs.load(inputs, config)
    frameworks = [f or _framework_of(c) for f, c in zip((framework_a, framework_b), checkpoints, strict=True)]
    for framework in frameworks:
        require_extra(framework, framework)

    def run(i: int, dtype: str) -> Results:
        with exact_matmuls():
            model = config.with_runtime(dtype=dtype)
            results = FRAMEWORKS[frameworks[i]](checkpoints[i], model, inputs, num_steps, gradients)
        gc.collect()
        return results

    result_a, result_b = run(0, dtype), run(1, dtype)
    found = errors(result_a, result_b, dtype)
    tolerances = {stage: _float32_tolerance(stage) for stage in found}
    if dtype != "float32":
        own = [errors(run(i, "float32"), r, dtype) for i, r in enumerate((result_a, result_b))]
        tolerances = {stage: math.hypot(own[0][stage][1], own[1][stage][1]) + t for stage, t in tolerances.items()}
    rows = [Row(stage, *error, tolerances[stage]) for stage, error in found.items()]
    names = [f"{c.folder} ({c.layout.name}, run in {f})" for c, f in zip(checkpoints, frameworks, strict=True)]
    return Report(names[0], names[1], dtype, rows, result_a.stages.get("actions"), result_b.stages.get("actions"))


def assert_parity(a: str | Path, b: str | Path, **options: Any) -> Report:
    """`compare`, raising AssertionError with the table where a stage is out of tolerance; for pytest."""
    report = compare(a, b, **options)
    assert report.passed, "\n" + report.table()
    return report


def errors(a: Results, b: Results, dtype: str = "float32") -> dict[str, tuple[float, float]]:
    """Maximum and relative L2 error of B against A: an entry per stage and layer, then gradients, then actions.

    Tokens are compared in float32 only: in bfloat16, rounding may decide between near-equal logits, and with it all
    following tokens.
    """
    result = {}
    for stage, reference in a.stages.items():
        if stage not in ("actions", "tokens"):
            result[stage] = _error(reference, b.stages[stage])
    if a.gradients:
        result |= _gradient_errors(a.gradients, b.gradients, GRADIENT_NOISE[dtype])
    if "actions" in a.stages:
        result["actions"] = _error(a.stages["actions"], b.stages["actions"])
    elif dtype == "float32":
        different = float((a.stages["tokens"] != b.stages["tokens"]).mean())
        result["tokens"] = (different, different)
    return result


def _gradient_errors(
    a: Mapping[str, np.ndarray], b: Mapping[str, np.ndarray], noise: float
) -> dict[str, tuple[float, float]]:
    """The error over all parameters, and of the worst one."""
    norm, largest = _norm([_norm(g) for g in a.values()]), max(float(np.abs(g).max()) for g in a.values())
    each = [
        _error(a[name], b[name], GRADIENT_FLOOR * largest, GRADIENT_FLOOR * norm)
        for name in a
        if max(_norm(a[name]), _norm(b[name])) > noise * norm
    ]
    differences = [(float(np.abs(d).max()), _norm(d)) for d in (b[n].astype(np.float64) - a[n] for n in a)]
    return {
        "gradients, all": (max(d[0] for d in differences) / largest, _norm([d[1] for d in differences]) / norm),
        "gradients, worst parameter": max(each, key=lambda error: error[1]),
    }


def _error(a: np.ndarray, b: np.ndarray, floor: float = 0.0, norm_floor: float = 0.0) -> tuple[float, float]:
    """Maximum error relative to the maximum of A, and relative L2 error; denominators are at least the floors."""
    a, difference = a.astype(np.float64), b.astype(np.float64) - a
    tiny = float(np.finfo(np.float64).tiny)
    largest = float(np.abs(difference).max()) / max(float(np.abs(a).max()), floor, tiny)
    return largest, _norm(difference) / max(_norm(a), norm_floor, tiny)


def _norm(x: ArrayLike) -> float:
    return float(np.linalg.norm(np.asarray(x, np.float64).ravel()))


def _float32_tolerance(stage: str) -> float:
    return FLOAT32_TOLERANCE.get(stage.split(",")[0], FLOAT32_TOLERANCE["stage"])


def _common_config(a: Checkpoint, b: Checkpoint) -> ModelConfig:
    """The common model config, with the runtime of A. Raises ParityError for different models."""
    ours = a.assets.model
    theirs = dataclasses.replace(b.assets.model, runtime=ours.runtime)
    if ours != theirs:
        fields = [(f.name, getattr(ours, f.name), getattr(theirs, f.name)) for f in dataclasses.fields(ours)]
        different = [f"{name}: {one} against {other}" for name, one, other in fields if one != other]
        raise ParityError("the two checkpoints are of different models:\n  " + "\n  ".join(different))
    return ours


def _framework_of(checkpoint: Checkpoint) -> str:
    return "torch" if checkpoint.layout.format == "safetensors" else "jax"
