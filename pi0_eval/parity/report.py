"""The result of a comparison, as text and JSON. Axes: B batch, T action horizon, A action dim."""

from __future__ import annotations

import dataclasses
import json

import numpy as np


@dataclasses.dataclass(frozen=True)
class Row:
    """The error of one stage of B against A: maximum error relative to the maximum of A, and relative L2 error."""

    stage: str
    max_error: float
    l2_error: float
    tolerance: float

    @property
    def passed(self) -> bool:
        return self.l2_error <= self.tolerance  # NaN fails


@dataclasses.dataclass(frozen=True)
class Report:
    """The comparison of B against A, with the sampled actions [B, T, A]; None for π0-FAST, which samples tokens."""

    a: str
    b: str
    dtype: str
    rows: list[Row]
    actions_a: np.ndarray | None = dataclasses.field(repr=False, compare=False)
    actions_b: np.ndarray | None = dataclasses.field(repr=False, compare=False)

    @property
    def first_failure(self) -> Row | None:
        """The first stage out of tolerance; None where all are within."""
        return next((row for row in self.rows if not row.passed), None)

    @property
    def passed(self) -> bool:
        return self.first_failure is None

    def to_json(self) -> str:
        """The report without actions as JSON, for CI."""
        rows = [dataclasses.asdict(row) | {"passed": row.passed} for row in self.rows]
        first = None if self.passed else self.first_failure.stage  # type: ignore[union-attr]
        values = {"a": self.a, "b": self.b, "dtype": self.dtype, "passed": self.passed, "first_failure": first}
        return json.dumps(values | {"stages": rows}, indent=2)

    def table(self) -> str:
        """The report as text."""
        width = max(len(row.stage) for row in self.rows)
        lines = [f"A  {self.a}", f"B  {self.b}", f"computed in {self.dtype}", ""]
        lines.append(f"{'stage':<{width}}  {'max error':>10}  {'rel. L2':>10}  {'tolerance':>10}")
        for row in self.rows:
            numbers = f"{row.max_error:10.2e}  {row.l2_error:10.2e}  {row.tolerance:10.2e}"
            lines.append(f"{row.stage:<{width}}  {numbers}  {'ok' if row.passed else 'OUT'}")
        failure = self.first_failure
        verdict = "PASSED: every stage is within tolerance"
        if failure is not None:
            verdict = (
                f"FAILED: the first stage out of tolerance is {failure.stage} "
                f"({failure.l2_error:.2e}, allowed {failure.tolerance:.2e})"
            )
        return "\n".join([*lines, "", verdict])
