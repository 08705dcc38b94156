"""The parameters of each model: names, axes and shapes, as a table. Nothing is allocated.

The names are those of the JAX modules, which have a stacked layer axis; layouts (`convert.layouts`) and sharding rules
refer to their axes by letter.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from pi0.config import GemmaConfig, ModelConfig
from pi0.families import EXPERTS, FAMILIES


class LayoutError(ValueError):
    """A checkpoint does not fit a layout; the message names the tensors."""


@dataclasses.dataclass(frozen=True)
class Parameter:
    """One of our parameters: its axes as letters (`l` = stacked layers), and their sizes."""

    axes: tuple[str, ...]
    shape: tuple[int, ...]


_NORMS = ("attention_norm", "mlp_norm")

# Axes. vision: l layers, p q patch, c channels, s tokens, d width, n heads, h head dim, m mlp, w PaliGemma's width.
# Gemma: l layers, v vocabulary, d width, n heads, k key/value heads, h head dim, m mlp, t three widths.
# Projections: a action dim, z state dim, d and e the action expert's width, u twice that width.
_VISION = {
    "patch_embedding.kernel": "p q c d",
    "patch_embedding.bias": "d",
    "position_embedding": "s d",
    **{f"layers.{norm}.{part}": "l d" for norm in _NORMS for part in ("scale", "bias")},
    **{f"layers.attention.{x}.kernel": "l d n h" for x in ("query", "key", "value")},
    **{f"layers.attention.{x}.bias": "l n h" for x in ("query", "key", "value")},
    "layers.attention.out.kernel": "l n h d",
    "layers.attention.out.bias": "l d",
    "layers.mlp.up.kernel": "l d m",
    "layers.mlp.up.bias": "l m",
    "layers.mlp.down.kernel": "l m d",
    "layers.mlp.down.bias": "l d",
    "final_norm.scale": "d",
    "final_norm.bias": "d",
    "head.kernel": "d w",
    "head.bias": "w",
}
_GEMMA = {
    "layers.attention.query.kernel": "l d n h",
    "layers.attention.key.kernel": "l d k h",
    "layers.attention.value.kernel": "l d k h",
    "layers.attention.out.kernel": "l n h d",
    "layers.mlp.gate.kernel": "l d m",
    "layers.mlp.up.kernel": "l d m",
    "layers.mlp.down.kernel": "l m d",
}
# r rank; see `pi0_jax.models.lora`.
_LORA = {
    "layers.attention.query.lora.a": "l d n r",
    "layers.attention.query.lora.b": "l n r h",
    **{f"layers.attention.{x}.lora.a": "l d k r" for x in ("key", "value")},
    **{f"layers.attention.{x}.lora.b": "l k r h" for x in ("key", "value")},
    "layers.attention.out.lora.a": "l n h r",
    "layers.attention.out.lora.b": "l n r d",
    **{f"layers.mlp.{x}.lora.a": "l d r" for x in ("gate", "up")},
    **{f"layers.mlp.{x}.lora.b": "l r m" for x in ("gate", "up")},
    "layers.mlp.down.lora.a": "l m r",
    "layers.mlp.down.lora.b": "l r d",
}
_PLAIN_NORMS = {**{f"layers.{norm}.scale": "l d" for norm in _NORMS}, "final_norm.scale": "d"}
_ADAPTIVE_NORMS = {
    **{f"layers.{norm}.modulation.kernel": "l d t" for norm in _NORMS},
    **{f"layers.{norm}.modulation.bias": "l t" for norm in _NORMS},
    "final_norm.modulation.kernel": "d t",
    "final_norm.modulation.bias": "t",
}


def lora_of(config: ModelConfig) -> tuple[str, ...]:
    """The experts that have low-rank updates."""
    return tuple(name for name, expert in config.experts.items() if expert.lora_rank is not None)


def axes_of(kind: str, lora: tuple[str, ...] = (), tied_output: bool = True) -> dict[str, tuple[str, ...]]:
    """Our parameters of a kind of model, where the experts `lora` have low-rank updates, and their axes."""
    family = FAMILIES[kind]
    table = {
        **{f"vision.{name}": axes for name, axes in _VISION.items()},
        "paligemma.embedding": "v d",
        **({} if tied_output else {"paligemma.output": "v d"}),
        **{f"paligemma.{name}": axes for name, axes in (_GEMMA | _PLAIN_NORMS).items()},
        **{f"{expert}.{name}": axes for expert in lora for name, axes in _LORA.items()},
    }
    if "action_expert" in family.experts:
        norms = _ADAPTIVE_NORMS if family.adaptive_norms else _PLAIN_NORMS
        projections = {**family.projections, "action_out_proj": "d a"}
        table |= {f"action_expert.{name}": axes for name, axes in (_GEMMA | norms).items()}
        table |= {f"{name}.kernel": axes for name, axes in projections.items()}
        table |= {f"{name}.bias": axes.split()[1] for name, axes in projections.items()}
    return {name: tuple(axes.split()) for name, axes in table.items()}


def scope_of(name: str) -> str:
    """Which part's sizes the axes of our parameter `name` have."""
    first = name.split(".")[0]
    return first if first in ("vision", *EXPERTS) else "projections"


def axis_sizes(config: ModelConfig) -> dict[str, dict[str, int]]:
    """The size of every axis letter, for each scope."""
    vision = config.vision

    def gemma(expert: GemmaConfig) -> dict[str, int]:
        sizes = {"l": expert.depth, "d": expert.width, "t": 3 * expert.width, "m": expert.mlp_dim}
        sizes |= {"n": expert.num_heads, "k": expert.num_kv_heads, "h": expert.head_dim}
        return sizes if expert.lora_rank is None else sizes | {"r": expert.lora_rank}

    sizes = {
        "vision": {
            **{"l": vision.depth, "d": vision.width, "n": vision.num_heads, "h": vision.head_dim},
            **{"p": vision.patch_size, "q": vision.patch_size, "c": 3, "s": config.image_tokens},
            **{"m": vision.mlp_dim, "w": config.paligemma.width},
        },
        "paligemma": {**gemma(config.paligemma), "v": config.vocab_size},
    }
    if config.action_expert is not None:
        width = config.action_expert.width
        sizes["action_expert"] = {**gemma(config.action_expert), "v": config.vocab_size}
        sizes["projections"] = {"a": config.action_dim, "z": config.state_size, "d": width, "e": width, "u": 2 * width}
    return sizes


def parameters(config: ModelConfig) -> dict[str, Parameter]:
    """All of our parameters in JAX: names, axes and shapes; nothing is allocated."""
    sizes = axis_sizes(config)
    return {
        name: Parameter(axes, tuple(sizes[scope_of(name)][a] for a in axes))
        for name, axes in axes_of(config.kind, lora_of(config), config.tied_output).items()
    }


def compare_shapes(expected: Mapping[str, tuple[int, ...]], found: Mapping[str, tuple[int, ...]], what: str) -> None:
    """Raise LayoutError that names every tensor that is missing, unknown or of another shape."""
    problems = [f"missing {name} {list(shape)}" for name, shape in expected.items() if name not in found]
    problems += [f"unknown {name} {list(shape)}" for name, shape in found.items() if name not in expected]
    problems += [
        f"{name} has shape {list(found[name])}, expected {list(shape)}"
        for name, shape in expected.items()
        if name in found and tuple(found[name]) != tuple(shape)
    ]
    if problems:
        shown = "\n  ".join(problems[:20])
        more = f"\n  and {len(problems) - 20} more" if len(problems) > 20 else ""
        raise LayoutError(f"{what}: {len(problems)} tensors do not fit:\n  {shown}{more}")


def flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dicts to one dict with dotted names."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        name = f"{prefix}{key}"
        flat |= flatten(value, f"{name}.") if isinstance(value, dict) else {name: value}
    return flat


def unflatten(flat: dict[str, Any]) -> dict[str, Any]:
    """The inverse of `flatten`."""
    tree: dict[str, Any] = {}
    for name, value in flat.items():
        *path, leaf = name.split(".")
        node = tree
        for key in path:
            node = node.setdefault(key, {})
        node[leaf] = value
    return tree
