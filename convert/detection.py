"""The layout, the model family and the sizes of a checkpoint, by the names and shapes of its tensors."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterable, Iterator, Mapping

from convert.layouts.layout import Layout, infer_sizes
from convert.layouts.registry import LAYOUTS
from pi0.config import GemmaConfig, ModelConfig, VisionConfig
from pi0.families import FAMILIES
from pi0.parameters import LayoutError
from pi0.variants import get_variant


def detect(
    shapes: Mapping[str, tuple[int, ...]], layouts: Iterable[Layout] = tuple(LAYOUTS.values())
) -> tuple[Layout, str, tuple[str, ...]]:
    """Detect the layout, the kind of model and its experts with LoRA, by the best match of tensor names.

    Raises LayoutError where no name matches.
    """
    best, most = None, 0.0
    for layout in layouts:
        unused = {_stem(rule.theirs) for rule in layout.unused}
        found = {_stem(layout.spell(name)) for name in shapes} - unused
        for kind, lora in ((k, lora) for k in layout.kinds for lora in _lora_choices(layout, k)):
            names = {_stem(rule.theirs.replace("{l}", "0")) for rule in layout.rules_for(kind, lora)}
            score = len(names & found) / len(names | found)
            if score > most:
                best, most = (layout, kind, lora), score
    if best is None:
        tried = ", ".join(layout.name for layout in layouts)
        raise LayoutError(f"no layout has tensors like {sorted(shapes)[:5]}; tried {tried}")
    return best


def _lora_choices(layout: Layout, kind: str) -> Iterator[tuple[str, ...]]:
    """The combinations of experts that may have low-rank updates: none first, then all of them."""
    yield ()
    if layout.has_lora:
        for count in range(len(FAMILIES[kind].experts), 0, -1):
            yield from itertools.combinations(FAMILIES[kind].experts, count)


def _stem(name: str) -> str:
    """The name with any layer number replaced by #."""
    return ".".join("#" if part.isdigit() else part for part in name.split("."))


def infer_config(
    layout: Layout,
    kind: str,
    shapes: Mapping[str, tuple[int, ...]],
    lora: tuple[str, ...] = (),
    head_dims: tuple[int, int] | None = None,
) -> ModelConfig:
    """Infer the model config from the shapes of a checkpoint. Raises LayoutError where a size does not follow.

    LoRA's alpha does not follow from shapes and is taken to be the rank, as in all of openpi's variants.
    """
    sizes = infer_sizes(layout.rules_for(kind, lora), {layout.spell(name): shape for name, shape in shapes.items()})
    vision, released = sizes["vision"], get_variant(kind)

    def gemma(scope: str) -> GemmaConfig:
        s = sizes[scope]
        if not {"n", "k", "h"} <= s.keys():
            s = s | split_heads(scope, s, None if head_dims is None else head_dims[0])
        return GemmaConfig(s["d"], s["l"], s["m"], s["n"], s["k"], s["h"], s.get("r"))

    def split_heads(scope: str, s: Mapping[str, int], head_dim: int | None) -> dict[str, int]:
        """Heads and head dim of flat heads."""
        flat = {letter: s[f"{letter} h"] for letter in "nk" if f"{letter} h" in s}
        if head_dim is None or any(size % head_dim for size in flat.values()):
            total = "" if head_dim is None else f" ({scope} has {list(flat.values())} in all, not of {head_dim} each)"
            raise LayoutError(
                f"the layout {layout.name} does not distinguish heads and head dim, and no config.json says it{total}: "
                f"pass --model (config= in Python), for instance --model {kind}, or --head-dims (head_dims=), those of "
                "the language model and of the vision tower, 256,72 in released models"
            )
        return {letter: size // head_dim for letter, size in flat.items()} | {"h": head_dim}

    experts = {name: gemma(name) for name in FAMILIES[kind].experts}
    if "n" not in vision:
        vision = vision | split_heads("vision", vision, None if head_dims is None else head_dims[1])
    side = math.isqrt(vision["s"])
    if side**2 != vision["s"]:
        (name,) = (r.theirs for r in layout.rules_for(kind) if r.ours == "vision.position_embedding")
        raise LayoutError(f"{name} holds {vision['s']} positions, which no square image has; pass config=")
    resolution = (side * vision["p"], side * vision["p"])
    action_dim = sizes.get("projections", {}).get("a", released.action_dim)
    state_dim = sizes.get("projections", {}).get("z", action_dim)
    return dataclasses.replace(
        released,
        vision=VisionConfig(vision["d"], vision["l"], vision["m"], vision["n"], vision["p"]),
        paligemma=experts["paligemma"],
        action_expert=experts.get("action_expert"),
        vocab_size=sizes["paligemma"]["v"],
        image_resolution=resolution,
        action_dim=action_dim,
        state_dim=None if state_dim == action_dim else state_dim,
    )
