"""openpi's fine-tuning recipes, by their names there: model, robot, norm stats, optimizer, batch and steps.

pi0-train --config openpi:pi0_libero --config.data.root=data/libero --workdir runs/libero
pi0-train --config openpi:pi05_aloha_pen_uncap --config.data.root=data/pen --workdir runs/pen

docs/peers.md says in what a run differs from openpi's.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from ml_collections import ConfigDict

from configs._shared import RELEASED, experiment
from pi0.config import ConfigError
from pi0.presets import get_preset
from pi0.run_config import DataConfig, OptimizerConfig
from pi0.tokenizers.fast import FAST
from pi0.variants import get_variant

COSINE = OptimizerConfig(decay_steps=30_000)  # openpi's default, however long it trains
CONSTANT = OptimizerConfig(peak_lr=5e-5, final_lr=5e-5, warmup_steps=1000, decay_steps=1_000_000)
LONG: dict[str, Any] = {"optimizer": CONSTANT, "batch_size": 256, "steps": 100_000, "save_every": 5000}
STEPS_20K: dict[str, Any] = {"steps": 20_000}

# Of each recipe: its base checkpoint, the one whose norm stats it takes ("": its own data's), and fields of RunConfig.
RECIPES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "pi0_libero": ("pi0_base", "", {}),
    "pi0_libero_low_mem_finetune": ("pi0_base", "", {}),
    "pi0_fast_libero": ("pi0_fast_base", "", {}),
    "pi0_fast_libero_low_mem_finetune": ("pi0_fast_base", "", {}),
    "pi05_libero": (
        "pi05_base",
        "",
        {
            "optimizer": dataclasses.replace(CONSTANT, warmup_steps=10_000),
            "batch_size": 256,
            "ema_decay": 0.999,
        },
    ),
    "pi0_aloha_pen_uncap": ("pi0_base", "pi0_base", STEPS_20K),
    "pi05_aloha_pen_uncap": ("pi05_base", "pi05_base", STEPS_20K | {"batch_size": 64}),
    "pi0_aloha_sim": ("pi0_base", "", STEPS_20K),
    "pi0_fast_full_droid_finetune": ("pi0_fast_base", "", LONG | {"keep_every": 20_000}),
    "pi05_full_droid_finetune": ("pi05_base", "pi05_base", LONG | {"keep_every": 10_000}),
    "pi05_droid_finetune": ("pi05_droid", "pi05_droid", STEPS_20K),
}
ROOTS = {"pi0_aloha_sim": "hf://datasets/lerobot/aloha_sim_transfer_cube_human"}


def get_config(name: str = "pi0_libero") -> ConfigDict:
    """The experiment of an openpi config."""
    if name not in RECIPES:
        raise ConfigError(f"unknown recipe {name!r}; openpi's are {', '.join(RECIPES)}")
    preset, (base, stats, fields) = get_preset(name), RECIPES[name]
    sizes = {field: getattr(preset, field) for field in ("action_horizon", "action_dim", "max_token_len", "image_keys")}
    model = get_variant(f"{preset.kind}_lora" if preset.lora else preset.kind, **sizes)
    data = DataConfig(
        dict(preset.robot),
        preset.asset_id,
        ROOTS.get(name, ""),
        norm_stats_from=f"{RELEASED}/{stats}" if stats else "",
        action_tokenizer=FAST if model.family.action_tokens else "",
        state_in_prompt=preset.state_in_prompt,
    )
    if preset.lora:
        fields = {"freeze": "lora", "frozen_dtype": "bfloat16", "ema_decay": None} | fields
    every = {"optimizer": COSINE, "keep_every": 5000, "seed": 42}
    return experiment(model, data, base_checkpoint=f"{RELEASED}/{base}", **every | fields)
