"""A layout of another package, named as "tests.my_lab.layouts:MIRROR"."""

from __future__ import annotations

from convert.layouts.layout import Layout, Rule
from convert.layouts.pi0_torch import LAYOUT

# Our PyTorch layout with every name backwards.
MIRROR = Layout(
    "mirror",
    tuple(Rule(rule.ours, ".".join(reversed(rule.theirs.split("."))), rule.axes) for rule in LAYOUT.rules),
    format="safetensors",
)
