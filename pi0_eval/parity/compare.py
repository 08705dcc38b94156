"""Compare two checkpoints stage by stage on the same inputs, in either framework: `compare`, `assert_parity`.

Stages follow the order of computation, so the first one that parts is where the models diverge.
"""

from __future__ import annotations

import dataclasses
import gc
import math
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from convert.checkpoints import Checkpoint, open_checkpoint
from pi0.assets import Assets
from pi0.config import ModelConfig
from pi0.parameters import parameters
from pi0.plugins import require_extra
from pi0_eval.parity.frameworks import FRAMEWORKS, SAMPLED, TEXTS, Results, exact_matmuls
from pi0_eval.parity.inputs import Inputs, ParityError
from pi0_eval.parity.policies import policy_rows
from pi0_eval.parity.report import PROOF, Report, Row
from pi0_eval.parity.sides import Side, SideError, available
from pi0_eval.parity.sliced import left_out, slices

# A and B may be apart by FACTOR·√(a² + b²), where a, b are their rounding errors. By the triangle inequality two that
# are one function are never further apart than a + b ≤ √2·√(a² + b²): this part of the budget gives no false alarm.
FACTOR = math.sqrt(2)
# But a fault of rounding alone (a sum in bfloat16) is no other function, and enlarges its own budget: in the same dtype
# no error counts for more than EXCESS times the other one's. docs/ci.md has the rate of false alarms.
EXCESS = {"float32": 8.0, "bfloat16": 2.0}
# The error of a few numbers may be small by luck: with fewer than this it counts as at least a rounding of each.
FEW = 512
FINER = 2.0**-29  # a rounding of float64, in those of float32
ROUNDOFF = {"float32": 2.0**-24, "bfloat16": 2.0**-8}
SMALL = 100_000_000  # parameters: smaller models run two at a time, for twice the memory
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
    side_a: str | Side = Side(),  # noqa: B008 -- frozen
    side_b: str | Side = Side(),  # noqa: B008
    framework_a: str | None = None,
    framework_b: str | None = None,
    inputs: Inputs | Path | None = None,
    batch: int = 2,
    seed: int = 0,
    num_steps: int = 10,
    gradients: bool = True,
    sliced: bool = False,
    progress: Callable[[str], None] = lambda line: None,
) -> Report:
    """Run two checkpoints on the same inputs, in float64 and in `dtype`, and compare every stage.

    In float64 they are one function or not (`report.PROOF`). In `dtype` each has a rounding error, its distance from
    its own float64, and both errors together say how far apart the two may be (`budget`).

    Args:
        a, b: addresses of checkpoints, as in `open_checkpoint`.
        side_a, side_b: how each is computed, as in `Side.parse`; `framework_a`, `framework_b` say the framework alone
            (default: by the layout's file format). A sampler has actions or tokens, and no other stage.
        inputs: given, or an npz file of `Inputs.load`; random by default, of `batch` rows from `seed`.
        num_steps: Euler steps, or for π0-FAST the number of decoded tokens.
        gradients: whether to compare gradients, for twice the memory.
        sliced: compare layer by layer (`pi0_eval.parity.sliced`), each fed with what A computed before it, with one
            layer's weights in memory; without gradients and, of π0-FAST, without tokens.
        progress: is told what is computed, and what has been.

    Raises ParityError for different models, SideError for a side that there is not, or not in slices.
    """
    checkpoints = open_checkpoint(a), open_checkpoint(b)
    config = common_config(*(checkpoint.assets for checkpoint in checkpoints))
    inputs = Inputs.of(inputs, config, batch, seed, all(c.assets.subtasks for c in checkpoints))
    sides = []
    for side, framework, checkpoint in zip((side_a, side_b), (framework_a, framework_b), checkpoints, strict=True):
        side = Side.parse(side) if isinstance(side, str) else side
        sides.append(side.of(framework or framework_of(checkpoint), dtype))
        require_extra(sides[-1].framework or "", sides[-1].framework or "")
        if sliced and sides[-1].path != "plain":
            raise SideError(f"side {sides[-1]}: a sliced comparison runs plain models; a sampler holds all weights")

    def run(i: int, side: Side) -> Results:
        assert side.framework is not None and side.dtype is not None
        started = time.perf_counter()
        progress(f"computing {'AB'[i]} as {side}")
        with exact_matmuls():
            model = config.with_runtime(dtype=side.dtype)
            results = FRAMEWORKS[side.framework](checkpoints[i], model, inputs, num_steps, gradients, side)
        gc.collect()
        progress(f"{'AB'[i]} computed as {side}: {time.perf_counter() - started:.1f} s")
        return results

    names = [f"{c.folder} ({c.layout.name}, run as {s})" for c, s in zip(checkpoints, sides, strict=True)]
    dtypes = [side.dtype or dtype for side in sides]
    before, after = policy_rows(checkpoints[0].assets, checkpoints[1].assets, inputs)
    if sliced:
        found = list(slices(checkpoints, config, inputs, sides, num_steps, progress))
        rows = [*before, *_in_order([row for four in found for row in judge(*four, *dtypes)]), *after]
        left = left_out(config, any(c.assets.subtasks for c in checkpoints))
        return Report(names[0], names[1], dtype, rows, *_actions(*found[-1][2:]), *units(checkpoints[0].assets), left)
    jobs = [(i, s) for i, side in enumerate(sides) for s in (side, side.proof)]
    small = sum(math.prod(p.shape) for p in parameters(config).values()) < SMALL
    with exact_matmuls(), ThreadPoolExecutor(2 if small else 1) as pool:
        a_rounded, a_exact, b_rounded, b_exact = pool.map(run, *zip(*jobs, strict=True))
    rows = [*before, *judge(a_exact, b_exact, a_rounded, b_rounded, *dtypes), *after]
    return Report(names[0], names[1], dtype, rows, *_actions(a_rounded, b_rounded), *units(checkpoints[0].assets))


def _actions(a: Results, b: Results) -> tuple[np.ndarray | None, np.ndarray | None]:
    return a.stages.get("actions"), b.stages.get("actions")


def _in_order(rows: list[Row]) -> list[Row]:
    """The rows of slices in the order of a whole comparison: the prefix's layers before the suffix's."""
    suffix = [row for row in rows if row.stage.startswith("suffix layer")]
    rest = [row for row in rows if row not in suffix]
    after = max(i for i, row in enumerate(rest) if row.stage.startswith("prefix layer")) + 1
    return rest[:after] + suffix + rest[after:]


def compare_all(a: str | Path, b: str | Path, **options: Any) -> dict[str, Report]:
    """`compare` A with every way in which this machine can run B, by side."""
    tokens = open_checkpoint(b).assets.model.family.action_tokens
    return {str(side): compare(a, b, side_b=side, **options) for side in available(tokens)}


def assert_parity(a: str | Path, b: str | Path, **options: Any) -> Report:
    """`compare`, raising AssertionError where a stage is out: with it first, then with the table; for pytest."""
    report = compare(a, b, **options)
    assert report.passed, report.failure()
    return report


def judge(
    exact_a: Results, exact_b: Results, a: Results, b: Results, dtype_a: str = "float32", dtype_b: str = "float32"
) -> list[Row]:
    """A row for every stage that both sides have: two results in float64, and the same two in their dtypes."""
    four = exact_a, exact_b, a, b
    proof, apart = errors(exact_a, exact_b, "float64"), errors(a, b, dtype_a, four)
    # A parameter without gradient but for rounding is left out of a row by the same rule in all four.
    own_a, own_b = errors(exact_a, a, dtype_a, four), errors(exact_b, b, dtype_b, four)
    rows = []
    for stage, error in proof.items():
        allowed = budget(stage, own_a, own_b, a, dtype_a, dtype_b)
        limit, detail = _proof_limit(min(own_a[stage], own_b[stage]), dtype_a, dtype_b), ""
        if stage.startswith("gradients") and not error <= limit:
            each = _gradient_errors(exact_a.gradients, exact_b.gradients, GRADIENT_NOISE["float64"])
            worst = max(each, key=lambda name: np.nan_to_num(each[name], nan=np.inf))
            detail = f"{error:.2e} in float64, most in {worst}"
        rows.append(Row(stage, error, own_a[stage], own_b[stage], apart[stage], allowed, detail, limit))
    return rows


def _proof_limit(own: float, dtype_a: str, dtype_b: str) -> float:
    """How far apart two sides may be in float64, whose smaller rounding error in their dtypes is `own`.

    float64 rounds 2^29 times finer than float32, and a model multiplies the roundings of both by the same. Where
    float32 is off by more than 5e-4, as gradients that explode are, float64 may be off by more than 1e-12.
    """
    return max(PROOF, EXCESS["float32"] * own * FINER) if {dtype_a, dtype_b} == {"float32"} else PROOF


def budget(
    stage: str, own_a: Mapping[str, float], own_b: Mapping[str, float], a: Results, dtype_a: str, dtype_b: str
) -> float:
    """How far apart two sides with these rounding errors may be in a stage."""
    error_a, error_b = own_a[stage], own_b[stage]
    if stage in TEXTS:  # from the first that differs on, all may
        return 1.0 if error_a or error_b else 0.0
    if dtype_a == dtype_b:
        few = stage in a.stages and a.stages[stage].size < FEW
        floor, most = ROUNDOFF[dtype_a] if few else 0.0, EXCESS[dtype_a]
        limits = most * max(error_b, floor), most * max(error_a, floor)
        error_a, error_b = max(min(error_a, limits[0]), floor), max(min(error_b, limits[1]), floor)
    return FACTOR * math.hypot(error_a, error_b) + PROOF


def errors(a: Results, b: Results, dtype: str = "float32", among: Sequence[Results] = ()) -> dict[str, float]:
    """Relative L2 error of B against A of every stage that both have: layers, then gradients, then actions or tokens.

    `dtype`: the wider rounding of the two, which says below what a gradient is noise. `among`: results that are judged
    together, of which what follows from a text is compared where it is the same in all (default: in A and B).
    """
    common = [stage for stage in a.stages if stage in b.stages]
    result = {stage: _error(a.stages[stage], b.stages[stage]) for stage in common if stage not in SAMPLED}
    if a.gradients and b.gradients:
        norm = _norm([_norm(g) for g in a.gradients.values()])
        differences = [_norm(b.gradients[n].astype(np.float64) - a.gradients[n]) for n in a.gradients]
        each = _gradient_errors(a.gradients, b.gradients, GRADIENT_NOISE[dtype])
        result["gradients, all"] = _norm(differences) / norm
        result["gradients, worst parameter"] = float(np.max(list(each.values())))
    all_stages = [one.stages for one in among or (a, b)]
    return result | {
        stage: _sampled_error(stage, a.stages, b.stages, all_stages) for stage in SAMPLED if stage in common
    }


def _sampled_error(
    stage: str,
    a: Mapping[str, np.ndarray],
    b: Mapping[str, np.ndarray],
    among: Sequence[Mapping[str, np.ndarray]],
) -> float:
    """Of tokens the fraction that differs; of other stages the relative L2 error, where the tokens before are the same.

    From a near tie on, which rounding may decide either way, two texts have nothing to do with each other.
    """
    x, y = a[stage], b[stage]
    if stage in TEXTS:
        return float((x != y).mean())
    for text, logits in TEXTS.items():
        if text in a and stage in (logits, "actions"):
            differs = np.any([a[text] != one[text] for one in among], axis=0)
            seen = np.cumsum(differs, axis=1) - differs == 0 if stage == logits else ~differs.any(axis=1)
            x, y = x[seen], y[seen]
    return _error(x, y)


def _gradient_errors(a: Mapping[str, np.ndarray], b: Mapping[str, np.ndarray], noise: float) -> dict[str, float]:
    """The error of each parameter that has a gradient."""
    norm = _norm([_norm(g) for g in a.values()])
    return {
        name: _error(a[name], b[name], GRADIENT_FLOOR * norm)
        for name in a
        if not max(_norm(a[name]), _norm(b[name])) <= noise * norm  # NaN counts
    }


def _error(a: np.ndarray, b: np.ndarray, floor: float = 0.0) -> float:
    """Relative L2 error; the denominator is at least `floor`. Arrays of different shapes are infinitely far apart."""
    if a.shape != b.shape:
        return math.inf
    a = a.astype(np.float64)
    return _norm(b.astype(np.float64) - a) / max(_norm(a), floor, float(np.finfo(np.float64).tiny))


def _norm(x: ArrayLike) -> float:
    return float(np.linalg.norm(np.asarray(x, np.float64).ravel()))


def common_config(a: Assets, b: Assets) -> ModelConfig:
    """The common model config, with the runtime of A. Raises ParityError for different models."""
    ours = a.model
    theirs = dataclasses.replace(b.model, runtime=ours.runtime)
    if ours != theirs:
        fields = [(f.name, getattr(ours, f.name), getattr(theirs, f.name)) for f in dataclasses.fields(ours)]
        different = [f"{name}: {one} against {other}" for name, one, other in fields if one != other]
        raise ParityError("the two checkpoints are of different models:\n  " + "\n  ".join(different))
    return ours


def units(assets: Assets) -> tuple[int | None, str | None]:
    """How many action dims the robot has, and how they are normalized, where the checkpoint says so."""
    if assets.norm_stats is None or "actions" not in assets.norm_stats:
        return None, None
    mode = assets.normalization
    mode = mode.get("actions") if isinstance(mode, Mapping) else mode
    return min(len(assets.norm_stats["actions"].mean), assets.model.action_dim), mode


def framework_of(checkpoint: Checkpoint) -> str:
    """The framework whose file format a checkpoint has."""
    return "torch" if checkpoint.layout.format == "safetensors" else "jax"
