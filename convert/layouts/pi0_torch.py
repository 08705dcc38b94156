"""The layout of `pi0_torch`: the names of its modules' parameters.

The JAX names up to three mechanical differences: `kernel` is `weight` with inputs and outputs swapped, the stacked
layer axis is `.{l}.`, and head axes are flattened (except in LoRA's factors, which are batched over heads).
"""

from __future__ import annotations

from convert.layouts.layout import Layout, Rule
from pi0.families import FAMILIES
from pi0.parameters import axes_of


def _rule(name: str, axes: tuple[str, ...]) -> Rule:
    theirs = name.replace(".layers.", ".layers.{l}.") if axes[0] == "l" else name
    rest = [a for a in axes if a != "l"]
    if name == "vision.patch_embedding.kernel":
        return Rule(name, "vision.patch_embedding.weight", "d c p q")
    if ".lora." in name:  # unflattened heads, as in JAX
        return Rule(name, theirs, " ".join(rest))
    heads = "(n h)" if "n" in rest else "(k h)"
    flat = " ".join(a for a in rest if a not in ("n", "k", "h")).split()
    if "h" in rest:
        flat = [heads, *flat] if rest[-1] != "h" else [*flat, heads]
    if name.endswith(".kernel"):
        return Rule(name, theirs.replace(".kernel", ".weight"), " ".join(reversed(flat)))
    return Rule(name, theirs, " ".join(flat))


_ALL = (axes_of(k, family.experts, tied_output=False) for k, family in FAMILIES.items())
_AXES = {name: axes for table in _ALL for name, axes in table.items()}

LAYOUT = Layout(
    "pi0_torch",
    tuple(_rule(name, axes) for name, axes in _AXES.items()),
    format="safetensors",
    config_folder="",
)
