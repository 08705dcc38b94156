"""Which operation parts: every operation of the failing stage, judged as stages are."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np

from convert.checkpoints import Checkpoint
from pi0.config import PROOF_DTYPE, ModelConfig
from pi0.recording import Operation, recording
from pi0_eval.parity.compare import judge
from pi0_eval.parity.frameworks import FRAMEWORKS, Results, exact_matmuls
from pi0_eval.parity.inputs import Inputs
from pi0_eval.parity.report import Report
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
    checkpoints: tuple[Checkpoint, Checkpoint],
    config: ModelConfig,
    inputs: Inputs,
    frameworks: tuple[str, str],
    steps: int = 10,
) -> Report:
    """A report whose rows are operations, in order of computation, in float64 and float32."""
    results = [
        operations(checkpoints[i], config.with_runtime(dtype=dtype), inputs, frameworks[i], steps)
        for dtype in (PROOF_DTYPE, "float32")
        for i in (0, 1)
    ]
    return Report("A", "B", "float32", judge(*results), None, None)
