"""One table per layout; `LAYOUTS` has them by name."""

from __future__ import annotations

from convert.layouts import lerobot, openpi_jax, openpi_torch, paligemma, pi0_jax, pi0_torch
from convert.layouts.layout import Layout, Rule
from convert.tensors import Tensor
from pi0.parameters import LayoutError, Parameter, parameters

_TABLES = (
    *(table.LAYOUT for table in (pi0_jax, pi0_torch, openpi_jax, openpi_torch, lerobot)),
    paligemma.NPZ,
    paligemma.HF,
)
LAYOUTS: dict[str, Layout] = {table.name: table for table in _TABLES}
WRITTEN = tuple(name for name, table in LAYOUTS.items() if table.format != "npz")  # the others are only read

__all__ = ["LAYOUTS", "WRITTEN", "Layout", "LayoutError", "Parameter", "Rule", "Tensor", "parameters"]
