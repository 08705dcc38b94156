"""Render a parity report as one self-contained HTML file, without scripts; `to_html`.

Axes: B batch, T action horizon, A action dim.
"""

from __future__ import annotations

import math
import re
from html import escape

import numpy as np

from pi0 import __version__
from pi0.look import page
from pi0_eval.parity.report import Report, Row, numbers

# Colors of cells: class, background, text, legend, by the share of what is allowed. Two independent roundings of the
# same size take 71 % of it. Lightness decreases with the share, to be readable without hue; a cell that is out also has
# a cross and a frame.
SHARES = (0.25, 0.5, 0.75)
INSIDE = (
    ("in3", "#d3efcf", "#111", "up to 25 % of what is allowed"),
    ("in2", "#a9dca3", "#111", "up to 50 %"),
    ("in1", "#7cc47a", "#111", "up to 75 %"),
    ("in0", "#f2e08a", "#111", "up to 100 %"),
)
OUTSIDE = (
    ("out0", "#d0512f", "#fff", "out, up to 10 times"),
    ("out1", "#9c1c2e", "#fff", "out, up to 100 times"),
    ("out2", "#4f0a1d", "#fff", "out, more than 100 times or not a number"),
)
UNITS = {  # by `Report.normalization`
    None: "in the model's normalized units",
    "zscore": "normalized: 1 is one standard deviation of the training data",
    "quantile": "normalized: −1 and 1 are the 1 % and 99 % quantiles of the training data",
}
PLOT = (220, 110)  # width, height of a plot of actions in pixels, without labels

STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; color: #111; background: #fff; max-width: 76rem; margin: 2rem auto;
  padding: 0 1rem; }
h1 { padding: .5rem .8rem; color: #fff; }
h1.passed { background: #1b6e2e; }
h1.failed { background: #9c1c2e; }
h2 { margin-top: 2.2rem; }
code { overflow-wrap: anywhere; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th { text-align: left; font-weight: 600; }
.wide { overflow-x: auto; }
.facts th, .numbers th, .numbers td { padding: .15rem 1.2rem .15rem 0; }
.numbers td { text-align: right; font-family: ui-monospace, monospace; }
.map { margin-bottom: 1rem; }
.map th { font-weight: 400; padding-right: .6rem; white-space: nowrap; }
.map thead th { text-align: center; padding: 0; color: #555; font-size: .8em; }
.map td { min-width: 2.2rem; height: 1.9rem; text-align: center; border: 2px solid #fff; white-space: nowrap; }
.map td.out, .legend td.out { border: 2px solid #000; font-weight: 700; }
.legend td { width: 1.6rem; height: 1.2rem; text-align: center; }
.legend th { font-weight: 400; padding: 0 1.2rem 0 .4rem; }
.plots { display: flex; flex-wrap: wrap; gap: .8rem; }
svg text { font-size: 11px; fill: #333; }
svg .frame { fill: none; stroke: #bbb; }
svg polyline { fill: none; }
svg.padding { opacity: .45; }
svg.padding .frame { stroke-dasharray: 2 3; }
svg .a { stroke: #0b5fa5; stroke-width: 2.6; }
svg .b { stroke: #d95f02; stroke-width: 1.6; stroke-dasharray: 5 3; }
"""
STYLE += "".join(f".{name} {{ background: {back}; color: {text}; }}\n" for name, back, text, _ in INSIDE + OUTSIDE)


def to_html(report: Report) -> str:
    """The verdict, a heat map of errors, plots of the actions of A and B, and a table of all errors."""
    failure = report.first_failure
    verdict = "PASSED" if failure is None else "FAILED"
    explanation = report.verdict.split(": ", 1)[1] + "."
    facts = (("A", report.a), ("B", report.b), ("computed in", report.dtype), ("written by", f"pi0 {__version__}"))
    rows = "\n".join(f"<tr><th>{escape(name)}</th><td><code>{escape(value)}</code></td></tr>" for name, value in facts)
    body = f"""<h1 class="{verdict.lower()}">{verdict}</h1>
<p>{escape(explanation)}</p>
<table class="facts"><tbody>
{rows}
</tbody></table>
<h2>Where they differ</h2>
<p>How far B is apart from A, relative L2, without units. The number in a cell is its power of ten; the color is its
share of what the rounding of both allows, or where the two are not one function in float64, of what a proof allows.
Hover over a cell for the exact numbers.</p>
{_heat_map(report.rows)}
{_plots(report)}
<h2>All numbers</h2>
<p>Relative L2; of tokens, the fraction that differs. The proof is in float64, each error against its own float64.</p>
{_table(report.rows)}"""
    return page(f"{verdict}: pi0-parity", STYLE, body)


def _heat_map(rows: list[Row]) -> str:
    """A row per stack of layers with a cell per layer, then a row per other stage, then the legend."""
    stacks: dict[str, dict[int, Row]] = {}
    singles = []
    for row in rows:
        layer = re.fullmatch(r"(.+) layer (\d+)", row.stage)
        if layer:
            stacks.setdefault(layer[1], {})[int(layer[2])] = row
        else:
            singles.append(row)
    parts = []
    if stacks:
        count = 1 + max(max(layers) for layers in stacks.values())
        header = "".join(f'<th scope="col">{i}</th>' for i in range(count))
        lines = [
            f'<tr><th scope="row">{escape(name)}</th>{"".join(_cell(layers[i]) for i in sorted(layers))}</tr>'
            for name, layers in stacks.items()
        ]
        body = "\n".join(lines)
        parts.append(f"<thead><tr><th>layer</th>{header}</tr></thead>\n<tbody>\n{body}\n</tbody>")
    body = "\n".join(f'<tr><th scope="row">{escape(row.stage)}</th>{_cell(row)}</tr>' for row in singles)
    parts.append(f"<tbody>\n{body}\n</tbody>")
    tables = "\n".join(f'<div class="wide"><table class="map">{part}</table></div>' for part in parts)
    legend = "".join(
        f'<tr><td class="{name}{mark}">{cross}</td><th>{label}</th></tr>'
        for colors, mark, cross in ((INSIDE, "", ""), (OUTSIDE, " out", "✗"))
        for name, _, _, label in colors
    )
    return f'{tables}\n<table class="legend"><tbody>{legend}</tbody></table>'


def _cell(row: Row) -> str:
    exponent = _exponent(row.judged[0])
    title = escape(f"{row.stage}: {numbers(row)}")
    if row.passed:
        return f'<td class="{_color(row)}" title="{title}">{exponent}</td>'
    return f'<td class="{_color(row)} out" title="{title}">{exponent} ✗</td>'


def _color(row: Row) -> str:
    """The class of a cell, by the share of what is allowed; what is out by powers of ten."""
    if row.passed:
        return INSIDE[sum(row.share > bound for bound in SHARES)][0]
    return OUTSIDE[0 if row.share <= 10 else 1 if row.share <= 100 else 2][0]


def _exponent(error: float) -> str:
    if error == 0:
        return "0"
    if not math.isfinite(error):
        return "NaN" if math.isnan(error) else "∞"
    return f"{int(f'{error:e}'.split('e')[1])}".replace("-", "−")


def _plots(report: Report) -> str:
    """One plot per action dim of the first row of actions [B, T, A]; nothing for models that sample tokens."""
    a, b = report.actions_a, report.actions_b
    if a is None or b is None:
        return ""
    first, second = (np.asarray(x)[0].astype(np.float64) for x in (a, b))
    dims = first.shape[1] if report.robot_dims is None else report.robot_dims
    plots = "\n".join(_plot(i, first[:, i], second[:, i], i >= dims) for i in range(first.shape[1]))
    padding = "" if dims >= first.shape[1] else f" Dims from {dims} on are padding, which the robot does not have."
    key = " ".join(
        f'<svg width="70" height="14" role="img" aria-label="{line.upper()}">'
        f'<polyline class="{line}" points="0,7 44,7"/><text x="52" y="11">{line.upper()}</text></svg>'
        for line in "ab"
    )
    units = UNITS.get(report.normalization, f"normalized by {escape(str(report.normalization))}")
    return f"""<h2>Sampled actions</h2>
<p>First row of the batch over the horizon, a step of the robot's control period each, {units};
the labels are the limits of the vertical axis.{padding}</p>
<p>{key}</p>
<div class="plots">
{plots}
</div>"""


def _plot(dim: int, a: np.ndarray, b: np.ndarray, padding: bool = False) -> str:
    """A [T] and B [T] in one plot, paler for padding; values that are not finite leave gaps and are counted."""
    width, height = PLOT
    both = np.concatenate([a, b])
    lost = int((~np.isfinite(both)).sum())
    finite = both[np.isfinite(both)]
    low, high = (float(finite.min()), float(finite.max())) if finite.size else (0.0, 0.0)
    # At least 1% of the values, so that rounding errors do not fill the plot.
    missing = max(0.01 * max(abs(low), abs(high)), 1e-6) - (high - low)
    if missing > 0:
        low, high = low - missing / 2, high + missing / 2
    lines = []
    for line, values in (("a", a), ("b", b)):
        x = np.linspace(0, width, len(values)) if len(values) > 1 else np.array([width / 2])
        points = np.stack([x, height - (values - low) / (high - low) * height], axis=1)
        for run in _finite_runs(points):
            if len(run) == 1:  # a single point would be invisible
                run = run + np.array([[-2.0, 0.0], [2.0, 0.0]])
            lines.append(f'<polyline class="{line}" points="{" ".join(f"{u:.1f},{v:.1f}" for u, v in run)}"/>')
    with np.errstate(invalid="ignore"):  # infinity less infinity
        difference = np.abs(b - a)
    largest = f"{difference.max():.1e}" if np.isfinite(difference).all() else "not a number"
    note = f", {lost} not finite" if lost else ""
    name = f"dim {dim}, padding" if padding else f"dim {dim}"
    label = f"{name}: largest difference {largest}{note}"
    kind = ' class="padding"' if padding else ""
    return (
        f'<svg{kind} width="{width + 8}" height="{height + 40}" viewBox="-4 -20 {width + 8} {height + 40}" role="img" '
        f'aria-label="{label}"><title>{label}</title><text x="0" y="-7">{name}{note}</text>'
        f'<text x="{width}" y="-7" text-anchor="end">{high:.4g}</text>'
        f'<text x="{width}" y="{height + 14}" text-anchor="end">{low:.4g}</text>'
        f'<rect class="frame" width="{width}" height="{height}"/>{"".join(lines)}</svg>'
    )


def _finite_runs(points: np.ndarray) -> list[np.ndarray]:
    """Runs of points [T, 2] with finite values."""
    finite = np.isfinite(points).all(axis=1)
    cuts = np.flatnonzero(finite[1:] != finite[:-1]) + 1
    return [run for run in np.split(points, cuts) if np.isfinite(run).all()]


def _table(rows: list[Row]) -> str:
    names = ("stage", "proof", "A's error", "B's error", "apart", "allowed", "")
    header = "".join(f'<th scope="col">{escape(name)}</th>' for name in names)
    lines = []
    for row in rows:
        values = "".join(f"<td>{x:.2e}</td>" for x in (row.proof, row.error_a, row.error_b, row.apart, row.allowed))
        verdict = "<td>ok</td>" if row.passed else "<td><strong>OUT</strong></td>"
        lines.append(f'<tr><th scope="row">{escape(row.stage)}</th>{values}{verdict}</tr>')
    body = "\n".join(lines)
    return (
        f'<div class="wide"><table class="numbers"><thead><tr>{header}</tr></thead>\n'
        f"<tbody>\n{body}\n</tbody></table></div>"
    )
