"""One table per layout; `LAYOUTS` has them by name."""

from __future__ import annotations

from convert.layouts import openpi_jax, pi0_jax, pi0_torch
from convert.layouts.layout import Layout, LayoutError, Parameter, Rule, Tensor, parameters

LAYOUTS: dict[str, Layout] = {layout.name: layout for layout in (pi0_jax.LAYOUT, pi0_torch.LAYOUT, openpi_jax.LAYOUT)}

__all__ = ["LAYOUTS", "Layout", "LayoutError", "Parameter", "Rule", "Tensor", "parameters"]
