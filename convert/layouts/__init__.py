"""One table per layout; `LAYOUTS` has them by name."""

from __future__ import annotations

from convert.layouts import lerobot, openpi_jax, openpi_torch, pi0_jax, pi0_torch
from convert.layouts.layout import Layout, LayoutError, Parameter, Rule, Tensor, parameters

LAYOUTS: dict[str, Layout] = {
    table.LAYOUT.name: table.LAYOUT for table in (pi0_jax, pi0_torch, openpi_jax, openpi_torch, lerobot)
}

__all__ = ["LAYOUTS", "Layout", "LayoutError", "Parameter", "Rule", "Tensor", "parameters"]
