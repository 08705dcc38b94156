"""PaliGemma's released weights: big_vision's npz and Hugging Face's safetensors.

PaliGemma has the parameters of π0-FAST; for π0 and π0.5 a new action expert is initialized (`open_checkpoint(fresh=)`).
Hugging Face's embedding has 64 more rows than big_vision's, unused by any token; they are dropped where the model's
vocabulary is smaller.
"""

from __future__ import annotations

import dataclasses

from convert.layouts import openpi_jax
from convert.layouts.layout import Layout, Rule
from convert.layouts.openpi_torch import gemma_rules, linear_rules, vision_rules

NPZ = Layout(
    "paligemma_npz",
    tuple(
        dataclasses.replace(rule, theirs=rule.theirs.replace("PaliGemma/", "params/"))
        for rule in openpi_jax.LAYOUT.rules
        if rule.ours.startswith(("vision.", "paligemma.")) and ".lora." not in rule.ours
    ),
    kinds=("pi0_fast",),
    format="npz",
)

HF = Layout(
    "paligemma_hf",
    (
        *vision_rules("vision_tower.vision_model"),
        *linear_rules("vision.head", "multi_modal_projector.linear", "w d", "w"),
        Rule("paligemma.embedding", "language_model.model.embed_tokens.weight", "v d"),
        *gemma_rules("paligemma", "language_model.model"),
    ),
    kinds=("pi0_fast",),
    format="safetensors",
    spellings=(
        (r"^(language_model\.)?lm_head\.weight$", "language_model.model.embed_tokens.weight"),
        (r"^model\.language_model\.", "language_model.model."),
        (r"^model\.(vision_tower|multi_modal_projector)\.", r"\1."),
        (r"^vision_tower\.(?!vision_model\.)", "vision_tower.vision_model."),
    ),
)
