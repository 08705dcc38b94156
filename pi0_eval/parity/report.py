"""The result of a comparison, as text and JSON. Axes: B batch, T action horizon, A action dim."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping

import numpy as np

PROOF = 1e-12  # relative L2 in float64: one function differs by 1e-15 to 1e-14, another one by what makes it another


@dataclasses.dataclass(frozen=True)
class Row:
    """One stage, in relative L2 (of tokens and settings: the fraction that differs).

    `proof`: B against A, both in float64, at most `limit`. `error_a`, `error_b`: each against its own float64, its
    rounding error. `apart`: B against A in the dtype of the comparison, of which `allowed` is allowed. `detail` says
    what differs, by name, where that is not one of many numbers.
    """

    stage: str
    proof: float
    error_a: float
    error_b: float
    apart: float
    allowed: float
    detail: str = ""
    limit: float = PROOF

    @property
    def proved(self) -> bool:
        """Whether the proof in float64 is within its limit; NaN is not."""
        return self.proof <= self.limit  # NaN fails

    @property
    def judged(self) -> tuple[float, float]:
        """What was found and what is allowed: of rounding, or of a proof that failed."""
        return (self.apart, self.allowed) if self.proved else (self.proof, self.limit)

    @property
    def share(self) -> float:
        """What was found, as a share of what is allowed: at most 1 where the stage passed; NaN counts as infinite."""
        found, allowed = self.judged
        if self.passed and found == 0:  # also of 0
            return 0.0
        share = found / allowed if allowed > 0 else math.inf
        return share if share >= 0 else math.inf

    @property
    def passed(self) -> bool:
        """Whether the stage is proved, and within what rounding allows."""
        return self.proved and self.apart <= self.allowed


@dataclasses.dataclass(frozen=True)
class Report:
    """The comparison of B against A, with the sampled actions [B, T, A]; None for π0-FAST, which samples tokens.

    `robot_dims`: how many of the action dims the robot has, the others are padding; None where nothing says it.
    `normalization`: what 1 means in actions, "quantile" or "zscore"; None where nothing says it.
    `left_out`: what a comparison by slices cannot compare. `exported`: whether B is an export, which has no float64:
    its own error stands for the proof.
    """

    a: str
    b: str
    dtype: str
    rows: list[Row]
    actions_a: np.ndarray | None = dataclasses.field(repr=False, compare=False)
    actions_b: np.ndarray | None = dataclasses.field(repr=False, compare=False)
    robot_dims: int | None = None
    normalization: str | None = None
    left_out: tuple[str, ...] = ()
    exported: bool = False

    @property
    def first_failure(self) -> Row | None:
        """The first stage that is not proved, or else the first whose rounding exceeds the budget; None of none."""
        unproved = next((row for row in self.rows if not row.proved), None)
        return unproved or next((row for row in self.rows if not row.passed), None)

    @property
    def passed(self) -> bool:
        """Whether all stages passed."""
        return self.first_failure is None

    @property
    def share(self) -> float:
        """The largest share of what is allowed that a stage takes."""
        return max((row.share for row in self.rows), default=0.0)

    @property
    def verdict(self) -> str:
        """The result in a sentence."""
        row = self.first_failure
        if self.exported:
            if row is None:
                return "PASSED: the export gives A's numbers, within its tolerance"
            return f"FAILED: the first stage of the export that is out of tolerance is {row.stage} ({numbers(row)})"
        if row is None:
            return "PASSED: in float64 the two are one function, and their rounding is within the budget"
        if not row.proved:
            why = row.detail or f"{row.proof:.2e} in float64"
            return f"FAILED: another function: the first stage that parts is {row.stage} ({why})"
        return f"FAILED: other rounding: the first stage out of the budget is {row.stage} ({numbers(row)})"

    def to_json(self) -> str:
        """The report without actions as JSON, for CI."""
        rows = [dataclasses.asdict(row) | {"passed": row.passed} for row in self.rows]
        first = None if self.passed else self.first_failure.stage  # type: ignore[union-attr]
        verdict = {"passed": self.passed, "share": self.share, "first_failure": first}
        values = {"a": self.a, "b": self.b, "dtype": self.dtype, **verdict, "left_out": self.left_out, "stages": rows}
        return json.dumps(values, indent=2)

    def table(self) -> str:
        """The report as text."""
        lines = [f"A  {self.a}", f"B  {self.b}", f"computed in {self.dtype}; relative L2", ""]
        if self.left_out:
            lines.insert(3, f"each layer fed with what A computed before it; not compared: {', '.join(self.left_out)}")
        return "\n".join([*lines, *self._lines(self.rows), "", self.verdict])

    def failure(self) -> str:
        """The verdict and the row it comes from, then the whole table: a test's log may be cut after a few lines."""
        first = self.first_failure
        return "\n".join([self.verdict, "", *self._lines([first] if first else []), "", self.table()])

    def _lines(self, rows: list[Row]) -> list[str]:
        width = max(len(row.stage) for row in self.rows)
        names = ("proof", "A's error", "B's error", "apart", "allowed")
        lines = [f"{'stage':<{width}}" + "".join(f"  {name:>9}" for name in names)]
        for row in rows:
            values = (row.proof, row.error_a, row.error_b, row.apart, row.allowed)
            figures = "".join(f"  {x:9.2e}" for x in values)
            lines.append(f"{row.stage:<{width}}{figures}  {'ok' if row.passed else 'OUT'}")
        return lines


def numbers(row: Row) -> str:
    """What a stage is judged by."""
    if row.detail:
        return row.detail
    return f"{row.apart:.2e} apart, allowed {row.allowed:.2e}; {row.proof:.2e} in float64"


def matrix_table(reports: Mapping[str, Report]) -> str:
    """The last stage of several comparisons, a line each, and the first failure of those that fail."""
    width = max(map(len, reports))
    lines = [f"{'B run as':<{width}}  {'proof':>9}  {'apart':>9}  {'allowed':>9}"]
    for side, report in reports.items():
        row = report.first_failure or report.rows[-1]
        figures = f"{row.proof:9.2e}  {row.apart:9.2e}  {row.allowed:9.2e}"
        lines.append(f"{side:<{width}}  {figures}  {row.stage}: {'ok' if report.passed else 'OUT'}")
    return "\n".join(lines)
