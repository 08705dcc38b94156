"""Which operation parts: every operation of the failing stage, judged as stages are."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from convert.checkpoints import Checkpoint, open_checkpoint
from pi0.config import PROOF_DTYPE, ModelConfig
from pi0.recording import Operation, recording
from pi0_eval.parity.compare import framework_of, judge
from pi0_eval.parity.frameworks import FRAMEWORKS, Results, exact_matmuls
from pi0_eval.parity.inputs import Inputs
from pi0_eval.parity.report import Report, numbers
from pi0_eval.parity.sides import Side

COUNTED = ("vision layer", "layer")  # sections of which there are many
EXPERTS = ("prefix", "suffix")


def operations(checkpoint: Checkpoint, config: ModelConfig, inputs: Inputs, framework: str, steps: int) -> Results:
    """Every operation of the loss and then of sampling, by its section and name, in the config's dtype, uncompiled."""
    config = config.with_runtime(remat="none")
    with exact_matmuls(), recording() as found:
        FRAMEWORKS[framework](checkpoint, config, inputs, steps, False, Side(framework, compiled=False))
    return Results(named(found), {})


def named(found: Iterable[Operation]) -> dict[str, np.ndarray]:
    """The operations as arrays, a name each: what repeats within a section is numbered."""
    result: dict[str, np.ndarray] = {}
    section, counts = "", dict.fromkeys(COUNTED, 0)
    for operation in found:
        starts = operation.name == "attention norm" and operation.section in COUNTED
        if starts:
            section = f"{operation.section} {counts[operation.section]}"
            counts[operation.section] += 1
        elif operation.section not in COUNTED:
            section = operation.section
        values = operation.value if isinstance(operation.value, (list, tuple)) else [operation.value]
        for i, value in enumerate(values):
            if value is None:
                continue
            name = f"{section}: {operation.name}" + (f" of {EXPERTS[i]}" if len(values) > 1 else "")
            number, numbered = 1, name
            while numbered in result:
                number += 1
                numbered = f"{name} ({number})"
            result[numbered] = _array(value)
    return result


def _array(value: Any) -> np.ndarray:
    return np.asarray(value.detach().cpu()) if hasattr(value, "detach") else np.asarray(value)


def explain(
    a: str | Path,
    b: str | Path,
    report: Report,
    *,
    side_a: Side,
    side_b: Side,
    inputs: Inputs | Path | None = None,
    batch: int = 2,
    seed: int = 0,
    num_steps: int = 10,
) -> str:
    """The first operation of two models that parts, with the values, for a `report` that failed.

    Sides are plain. Operations of vision whose stage passed are left out: the bias of its keys changes logits alone.
    """
    checkpoints = open_checkpoint(a), open_checkpoint(b)
    config = checkpoints[0].assets.model
    inputs = Inputs.of(inputs, config, batch, seed)
    frameworks = [side.framework or framework_of(c) for side, c in zip((side_a, side_b), checkpoints, strict=True)]
    models = [config.with_runtime(dtype=dtype) for dtype in (PROOF_DTYPE, report.dtype)]
    exact_a, exact_b, rounded_a, rounded_b = (
        operations(checkpoints[i], model, inputs, frameworks[i], num_steps) for model in models for i in (0, 1)
    )
    passed = {row.stage for row in report.rows if row.passed}
    rows = judge(exact_a, exact_b, rounded_a, rounded_b, report.dtype, report.dtype)
    rows = [row for row in rows if row.stage.partition(":")[0] not in passed]
    found = Report(report.a, report.b, report.dtype, rows, None, None)
    row = found.first_failure
    if row is None:
        return "no operation of the forward pass parts: the difference is in gradients, or in rounding of compiled code"
    pair = (exact_a, exact_b) if not row.proved else (rounded_a, rounded_b)
    x, y = (np.asarray(results.stages[row.stage], np.float64) for results in pair)
    place = np.unravel_index(np.argmax(np.nan_to_num(abs(y - x), nan=np.inf)), x.shape)
    where = ", ".join(map(str, place))
    return (
        f"the first operation that parts is {row.stage} ({numbers(row)}); most at [{where}]: A {x[place]}, B {y[place]}"
    )
