"""The known layouts by name, and layouts of other packages by "module:NAME"."""

from __future__ import annotations

from convert.layouts import lerobot, openpi_jax, openpi_torch, paligemma, pi0_jax, pi0_torch
from convert.layouts.layout import Layout
from pi0.plugins import resolve

_KNOWN = (
    *(module.LAYOUT for module in (pi0_jax, pi0_torch, openpi_jax, openpi_torch, lerobot)),
    paligemma.NPZ,
    paligemma.HF,
)
LAYOUTS: dict[str, Layout] = {layout.name: layout for layout in _KNOWN}
WRITABLE = tuple(name for name, layout in LAYOUTS.items() if layout.writable)


def find_layout(layout: str | Layout) -> Layout:
    """A layout by its name or as "module:NAME" of another package. Raises ValueError for anything else."""
    found = layout if isinstance(layout, Layout) else resolve(layout, LAYOUTS, "layout")
    if not isinstance(found, Layout):
        raise ValueError(f"{layout!r} is {type(found).__name__}; expected a convert.layouts.layout.Layout")
    return found
