"""A diagnosis as one self-contained HTML file, without scripts; `to_html`."""

from __future__ import annotations

import re
from html import escape

from pi0 import __version__
from pi0.look import BLUE, ORANGE, STYLE, data_address, page
from pi0_eval.doctor.findings import LEVELS, Diagnosis, Finding

BAR = (260, 12)  # width and height of a range's bar in pixels
OWN = f"""
.finding {{ border-left: 6px solid #111; padding: .1rem 0 .1rem 1rem; margin: 1.6rem 0; }}
.finding h2 {{ margin: .2rem 0; }}
.level {{ font-weight: 600; }}
.l0 {{ border-color: #7a1f00; }}
.l1 {{ border-color: #d55e00; }}
.l2 {{ border-color: #e69f00; }}
.advice {{ font-weight: 600; }}
.finding img {{ width: min(8.5rem, 31%); margin-right: .4rem; image-rendering: pixelated; }}
.finding figure {{ display: inline-block; width: min(27.5rem, 100%); margin: .4rem 1rem .4rem 0; }}
.key {{ display: inline-block; width: 1.6rem; height: .5rem; margin: 0 .4rem 0 1rem; }}
.then {{ background: {BLUE}; fill: {BLUE}; }}
.now {{ background: {ORANGE}; fill: {ORANGE}; }}
"""


def to_html(diagnosis: Diagnosis) -> str:
    """Every finding with its evidence, what to do, images and ranges; then figures, and what was not judged."""
    found = diagnosis.findings
    title = f"{len(found)} cause{'s' if len(found) != 1 else ''} found" if found else "Nothing found"
    facts = "".join(f"<tr><th>{escape(k)}</th><td>{escape(v)}</td></tr>" for k, v in diagnosis.facts.items())
    facts += (
        f"<tr><th>nothing wrong</th><td>{escape(', '.join(diagnosis.healthy))}</td></tr>" if diagnosis.healthy else ""
    )
    unjudged = "".join(f"<li>{escape(text)}</li>" for text in diagnosis.unjudged)
    body = f"""<h1>{title}</h1>
<p><code>{escape(diagnosis.subject)}</code></p>
{"".join(_finding(number, finding) for number, finding in enumerate(found, 1))}
<h2>Figures</h2>
<div class="wide"><table>{facts}</table></div>
{f"<h2>Not judged</h2><ul>{unjudged}</ul>" if unjudged else ""}
<p>Written by pi0 {escape(__version__)}.</p>"""
    return page(f"{title}: pi0-doctor", STYLE + OWN, body)


def _finding(number: int, finding: Finding) -> str:
    rows: dict[str, list[str]] = {}  # the images of one camera and time are a row
    for caption, image in finding.images.items():
        shown = f'<img src="{data_address(image)}" alt="{escape(caption)}">'
        rows.setdefault(caption.rpartition(" (")[0], []).append(shown)
    images = "\n".join(
        f"<figure>{''.join(shown)}<figcaption>{escape(caption)}</figcaption></figure>"
        for caption, shown in rows.items()
    )
    advice = re.sub("`(.*?)`", r"<code>\1</code>", escape(finding.advice))
    return f"""<section class="finding l{finding.level}">
<h2>{number}. {escape(finding.title[0].upper() + finding.title[1:])}</h2>
<p><span class="level">{LEVELS[finding.level].capitalize()}</span>: {escape(finding.evidence)}</p>
<p class="advice">What to do: {advice}</p>
{images}
{_ranges(finding)}
</section>
"""


def _ranges(finding: Finding) -> str:
    """A bar for each range, of training and of now, on one scale for each dimension, in the model's units."""
    if not finding.ranges:
        return ""
    key = '<p><span class="key then"></span>in training<span class="key now"></span>now; '
    key += "1 % to 99 % quantiles, in the units of the norm stats</p>"
    return key + f'<div class="wide"><table>{"".join(map(_range, finding.ranges))}</table></div>'


def _range(row: tuple[str, float, float, float, float]) -> str:
    name, *values = row
    low, high = min(values), max(values)
    span = (high - low) or 1.0
    width, height = BAR
    bars = []
    for i, (kind, first, last) in enumerate((("then", values[0], values[1]), ("now", values[2], values[3]))):
        x, w = (first - low) / span * width, max((last - first) / span * width, 2.0)
        bars.append(f'<rect class="{kind}" x="{x:.1f}" y="{i * height}" width="{w:.1f}" height="{height - 2}"/>')
    label = f"{values[0]:.3g} to {values[1]:.3g} in training, {values[2]:.3g} to {values[3]:.3g} now"
    svg = (
        f'<svg width="{width + 2}" height="{2 * height}" viewBox="0 0 {width + 2} {2 * height}" role="img" '
        f'aria-label="{escape(name)}: {label}">{"".join(bars)}</svg>'
    )
    return f"<tr><th>{escape(name)}</th><td>{svg}</td><td>{label}</td></tr>"
