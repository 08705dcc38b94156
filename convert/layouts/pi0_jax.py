"""The layout of `pi0_jax`: nested parameter names, joined by slashes."""

from __future__ import annotations

from convert.layouts.layout import Layout, Rule
from pi0.families import FAMILIES
from pi0.parameters import axes_of

_ALL = (axes_of(k, family.experts, tied_output=False) for k, family in FAMILIES.items())
_AXES = {name: axes for table in _ALL for name, axes in table.items()}

LAYOUT = Layout("pi0_jax", tuple(Rule(name, name.replace(".", "/"), " ".join(axes)) for name, axes in _AXES.items()))
