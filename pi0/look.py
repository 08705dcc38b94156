"""The look that all plots and HTML pages share: colours, the style sheet, images within a page, labels with units."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image

# Okabe and Ito's colours: told apart by the colour-blind too, and in this order of different lightness in print.
BLUE, ORANGE, GREEN, RED, PURPLE, SKY = "#0072b2", "#e69f00", "#009e73", "#d55e00", "#cc79a7", "#56b4e9"
COLORS = (BLUE, ORANGE, GREEN, RED, PURPLE, SKY)
DASHES = ("-", "--", "-.", ":")  # of lines, so that no one needs the colours
RECORDED = "#111111"

STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; color: #111; background: #fff; max-width: 76rem; margin: 2rem auto;
  padding: 0 1rem; }
h2 { margin-top: 2.2rem; }
code { overflow-wrap: anywhere; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th { text-align: left; font-weight: 600; }
th, td { padding: .15rem 1.2rem .15rem 0; vertical-align: top; }
pre { background: #f6f6f6; padding: .6rem; overflow-x: auto; }
figure { display: inline-block; margin: 0 1rem 1rem 0; }
figcaption { font-size: 13px; color: #444; }
.wide { overflow-x: auto; }
"""


def page(title: str, style: str, body: str) -> str:
    """A self-contained HTML page; `title` and `body` are HTML."""
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
{body}
</body>
</html>
"""


def data_address(image: np.ndarray) -> str:
    """An image, uint8 [H, W, 3] or float in [-1, 1], as the address of a PNG within a page."""
    if image.dtype != np.uint8:
        image = np.clip((image + 1) * 127.5, 0, 255).astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(image).save(file, "png", compress_level=1)
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def dimension_labels(names: Sequence[str], units: Mapping[str, Any] | Sequence[str] | None = None) -> list[str]:
    """Names of dimensions with their units, "x (m)", of a dataset's feature; without units the names alone.

    `units` is a list, or a mapping by name, as a feature of `info.json` may have beside `names`.
    """
    if isinstance(units, Mapping):
        found = [units.get(name) for name in names]
    elif isinstance(units, Sequence) and not isinstance(units, str) and len(units) == len(names):
        found = list(units)
    else:
        found = [None] * len(names)
    return [
        f"{name} ({unit})" if isinstance(unit, str) and unit else name for name, unit in zip(names, found, strict=True)
    ]
