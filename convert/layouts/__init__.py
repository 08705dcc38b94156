"""One table per layout; `LAYOUTS` has them by name."""

from __future__ import annotations

from convert.layouts import openpi_jax, ours_jax, ours_torch
from convert.layouts.layout import Layout, LayoutError, Parameter, Rule, Tensor, parameters

LAYOUTS: dict[str, Layout] = {layout.name: layout for layout in (ours_jax.LAYOUT, ours_torch.LAYOUT, openpi_jax.LAYOUT)}

__all__ = ["LAYOUTS", "Layout", "LayoutError", "Parameter", "Rule", "Tensor", "parameters"]
