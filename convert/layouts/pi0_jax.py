"""Our JAX layout: the nested names of `pi0_jax` models, joined by slashes."""

from __future__ import annotations

from convert.layouts.layout import Layout, Rule, axes_of, experts_of
from pi0.config import KINDS

_AXES = {name: axes for kind in KINDS for name, axes in axes_of(kind, experts_of(kind)).items()}

LAYOUT = Layout("pi0_jax", tuple(Rule(name, name.replace(".", "/"), " ".join(axes)) for name, axes in _AXES.items()))
