"""Our JAX layout: the nested names of `pi0_jax` models, joined by slashes."""

from __future__ import annotations

from convert.layouts.layout import Layout, Rule
from pi0.config import KINDS
from pi0.families import FAMILIES
from pi0.parameters import axes_of

_AXES = {name: axes for kind in KINDS for name, axes in axes_of(kind, FAMILIES[kind].experts).items()}

LAYOUT = Layout("pi0_jax", tuple(Rule(name, name.replace(".", "/"), " ".join(axes)) for name, axes in _AXES.items()))
