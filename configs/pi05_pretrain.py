"""π0.5's first stage: subtasks, answers and FAST tokens as text, without flow matching (see docs/recipe.md).

pi0-train --config pi05_pretrain --config.data.root=data/droid --workdir runs/pretrain
pi0-train --config pi05_pretrain:demo --workdir runs/pretrain      # the bundled recordings
"""

from __future__ import annotations

import dataclasses

from ml_collections import ConfigDict

from configs import metaworld_demo
from configs._shared import experiment
from pi0.config import ConfigError
from pi0.run_config import DataConfig, RecipeConfig
from pi0.tokenizers.fast import FAST
from pi0.variants import get_variant

SIZES = ("full", "demo", "tiny")
SMALL = {"vocab_size": 1280, "max_token_len": 80, "max_decoding_steps": 12, "remat": "none"}  # room for 512 FAST tokens


def get_config(size: str = "full") -> ConfigDict:
    """The experiment: on DROID for as many steps as in the paper, or "demo" or "tiny" on the bundled recordings."""
    base = "gs://vertex-model-garden-paligemma-us/paligemma/pt_224.npz" if size == "full" else ""
    return stage(size, RecipeConfig(flow_weight=0.0), base_checkpoint=base, steps=280_000)


def stage(size: str, recipe: RecipeConfig, base_checkpoint: str, steps: int) -> ConfigDict:
    """What both stages share; only the full size trains for `steps`.

    The paper does not give its batch and learning rates: they are openpi's.
    """
    if size not in SIZES:
        raise ConfigError(f"unknown size {size!r}; known sizes are {', '.join(SIZES)}")
    if size == "full":
        model = get_variant("pi05", action_horizon=16, max_token_len=300, max_decoding_steps=64)
        data = DataConfig(robot="droid", asset_id="droid", action_tokenizer=FAST)
        return experiment(model, data, base_checkpoint=base_checkpoint, recipe=recipe, batch_size=256, steps=steps)
    image = {} if size == "tiny" else {"image_resolution": (56, 56)}
    config = metaworld_demo.get_config(f"{size}_pi05")
    config.model = get_variant(f"{size}_pi05", **SMALL, **image).to_dict()
    config.data.action_tokenizer = "bundled://fast_tokenizer"
    config.data.subtasks = "bundled://metaworld_subtasks.jsonl"
    config.recipe, config.base_checkpoint = dataclasses.asdict(recipe), base_checkpoint
    return config
