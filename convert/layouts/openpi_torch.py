"""openpi's PyTorch layout: transformers' names for PaliGemma and Gemma, openpi's for the projections.

The token embedding is tied to `lm_head`: openpi stores it under that name, other tools under `embed_tokens` or both.
The action expert's own `lm_head` is unused. LeRobot's first releases are openpi's files unchanged and are read as this
layout too. openpi has no π0-FAST in PyTorch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from convert.layouts.layout import Layout, Rule
from convert.sidecars import check_openpi_torch, write_openpi

_LAYER_NORMS = (("attention_norm", "layer_norm1"), ("mlp_norm", "layer_norm2"))
_RMS_NORMS = (("attention_norm", "input_layernorm"), ("mlp_norm", "post_attention_layernorm"))
_HEADS = (("query", "q_proj", "n h"), ("key", "k_proj", "k h"), ("value", "v_proj", "k h"))
_PROJECTIONS = (
    ("action_in_proj", "d a"),
    ("action_out_proj", "a d"),
    ("state_proj", "d z"),
    ("action_time_mlp_in", "d u"),
    ("action_time_mlp_out", "e d"),
    ("time_mlp_in", "e d"),
    ("time_mlp_out", "e d"),
)


def linear_rules(ours: str, theirs: str, axes: str, bias: str) -> tuple[Rule, Rule]:
    """The rules of a linear layer with a bias; `axes` are those of its weight."""
    return Rule(f"{ours}.kernel", f"{theirs}.weight", axes), Rule(f"{ours}.bias", f"{theirs}.bias", bias)


def vision_rules(tower: str) -> tuple[Rule, ...]:
    """The rules of SigLIP, whose tensor names start with `tower`."""
    ours, layer = "vision.layers", f"{tower}.encoder.layers.{{l}}"
    return (
        *linear_rules("vision.patch_embedding", f"{tower}.embeddings.patch_embedding", "d c p q", "d"),
        Rule("vision.position_embedding", f"{tower}.embeddings.position_embedding.weight", "s d"),
        *(
            Rule(f"{ours}.{norm}.{part}", f"{layer}.{theirs}.{x}", "d")
            for norm, theirs in _LAYER_NORMS
            for part, x in (("scale", "weight"), ("bias", "bias"))
        ),
        *(
            rule
            for part, x, _ in _HEADS
            for rule in linear_rules(f"{ours}.attention.{part}", f"{layer}.self_attn.{x}", "(n h) d", "(n h)")
        ),
        *linear_rules(f"{ours}.attention.out", f"{layer}.self_attn.out_proj", "d (n h)", "d"),
        *linear_rules(f"{ours}.mlp.up", f"{layer}.mlp.fc1", "m d", "m"),
        *linear_rules(f"{ours}.mlp.down", f"{layer}.mlp.fc2", "d m", "d"),
        Rule("vision.final_norm.scale", f"{tower}.post_layernorm.weight", "d"),
        Rule("vision.final_norm.bias", f"{tower}.post_layernorm.bias", "d"),
    )


def gemma_rules(ours: str, theirs: str) -> tuple[Rule, ...]:
    """The rules of one Gemma, whose tensor names start with `theirs`."""
    layer = f"{theirs}.layers.{{l}}"
    return (
        *(
            Rule(f"{ours}.layers.attention.{part}.kernel", f"{layer}.self_attn.{x}.weight", f"({heads}) d")
            for part, x, heads in _HEADS
        ),
        Rule(f"{ours}.layers.attention.out.kernel", f"{layer}.self_attn.o_proj.weight", "d (n h)"),
        Rule(f"{ours}.layers.mlp.gate.kernel", f"{layer}.mlp.gate_proj.weight", "m d"),
        Rule(f"{ours}.layers.mlp.up.kernel", f"{layer}.mlp.up_proj.weight", "m d"),
        Rule(f"{ours}.layers.mlp.down.kernel", f"{layer}.mlp.down_proj.weight", "d m"),
        *(Rule(f"{ours}.layers.{norm}.scale", f"{layer}.{x}.weight", "d") for norm, x in _RMS_NORMS),
        *(
            rule
            for norm, x in _RMS_NORMS
            for rule in linear_rules(f"{ours}.layers.{norm}.modulation", f"{layer}.{x}.dense", "t d", "t")
        ),
        Rule(f"{ours}.final_norm.scale", f"{theirs}.norm.weight", "d"),
        *linear_rules(f"{ours}.final_norm.modulation", f"{theirs}.norm.dense", "t d", "t"),
    )


def transformers_layout(
    name: str,
    prefix: str,
    kinds: tuple[str, ...],
    write_sidecars: Callable[..., Any],
    check: Callable[..., Any],
    untied: bool = False,
) -> Layout:
    """The layout of models built from transformers' modules; all tensor names start with `prefix`.

    The vision tower's names of transformers since 5.6, without `vision_model`, are read too. `untied`: whether
    `lm_head` may differ from `embed_tokens`.
    """
    paligemma = f"{prefix}paligemma_with_expert.paligemma"
    tower, embedding = "vision_tower.vision_model", f"{paligemma}.model.language_model.embed_tokens.weight"
    expert = f"{prefix}paligemma_with_expert.gemma_expert"
    return Layout(
        name,
        (
            *vision_rules(f"{paligemma}.model.{tower}"),
            *linear_rules("vision.head", f"{paligemma}.model.multi_modal_projector.linear", "w d", "w"),
            Rule("paligemma.embedding", f"{paligemma}.lm_head.weight", "v d"),
            *gemma_rules("paligemma", f"{paligemma}.model.language_model"),
            *gemma_rules("action_expert", f"{expert}.model"),
            *(
                rule
                for projection, axes in _PROJECTIONS
                for rule in linear_rules(projection, f"{prefix}{projection}", axes, axes[0])
            ),
        ),
        kinds=kinds,
        format="safetensors",
        spellings=(
            # of transformers before 4.52, and LeRobot 0.3
            (r"\.paligemma\.language_model\.(lm_head\.)", r".paligemma.\1"),
            (r"\.paligemma\.language_model\.model\.", ".paligemma.model.language_model."),
            (r"\.paligemma\.(vision_tower|multi_modal_projector)\.", r".paligemma.model.\1."),
            (r"\.paligemma\.model\.language_model\.embed_tokens\.weight$", ".paligemma.lm_head.weight"),
            (r"\.paligemma\.model\.vision_tower\.(?!vision_model\.)", f".paligemma.model.{tower}."),
        ),
        untied=(
            Rule("paligemma.embedding", embedding, "v d"),
            Rule("paligemma.output", f"{paligemma}.lm_head.weight", "v d"),
        )
        if untied
        else (),
        unused=(Rule("action_expert.embedding", f"{expert}.lm_head.weight", "v d"),),
        write_sidecars=write_sidecars,
        check_target=check,
    )


LAYOUT = transformers_layout("openpi_torch", "", ("pi0", "pi05"), write_openpi, check_openpi_torch)
