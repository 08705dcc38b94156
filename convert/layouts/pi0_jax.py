"""Our JAX layout: the nested names of `pi0_jax` models, joined by slashes."""

from __future__ import annotations

from convert.layouts.layout import EXPERTS, Layout, Rule, axes_of

_AXES = {name: axes for kind in ("pi0", "pi05") for name, axes in axes_of(kind, EXPERTS).items()}

LAYOUT = Layout("pi0_jax", tuple(Rule(name, name.replace(".", "/"), " ".join(axes)) for name, axes in _AXES.items()))
