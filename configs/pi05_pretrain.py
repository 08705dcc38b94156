"""π0.5's first stage: subtasks, answers and FAST tokens as text, without a flow (docs/recipe.md goes through both).

pi0-train --config configs/pi05_pretrain.py --config.data.root=data/droid --workdir runs/pretrain
pi0-train --config configs/pi05_pretrain.py:demo --workdir runs/pretrain      # the bundled recordings
"""

from __future__ import annotations

import dataclasses
from typing import Any

import ml_collections

from configs import metaworld_demo
from configs.finetune import finetune
from pi0.run_config import RecipeConfig
from pi0.tokenizers.fast import FAST
from pi0.variants import get_variant

SMALL = {"vocab_size": 1280, "max_token_len": 80, "max_decoding_steps": 12, "remat": "none"}  # room for 512 FAST tokens


def get_config(size: str | None = None) -> ml_collections.ConfigDict:
    """The experiment: on DROID as long as the paper's, or of the `size` "demo" or "tiny" on the bundled recordings."""
    base = "gs://vertex-model-garden-paligemma-us/paligemma/pt_224.npz"
    return experiment(size, RecipeConfig(flow_weight=0.0), base_checkpoint=base if size is None else "", steps=280_000)


def experiment(size: str | None, recipe: RecipeConfig, **changes: Any) -> ml_collections.ConfigDict:
    """What both stages share; only the full-size one takes its steps from `changes`.

    The paper does not give its batch and learning rates: they are openpi's.
    """
    if size is None:
        model = get_variant("pi05", action_horizon=16, max_token_len=300, max_decoding_steps=64)
        config = finetune(model, {"robot": "droid", "asset_id": "droid"}, batch_size=256)
        data: dict[str, Any] = {"action_tokenizer": FAST, "subtasks": "", "questions": ""}  # "": the dataset's column
    else:
        del changes["steps"]
        image = {} if size == "tiny" else {"image_resolution": (56, 56)}
        config = metaworld_demo.get_config(f"{size}_pi05")
        config.model = get_variant(f"{size}_pi05", **SMALL, **image).to_dict()
        data = {
            "action_tokenizer": "bundled://fast_tokenizer",
            "subtasks": "bundled://metaworld_subtasks.jsonl",
            "questions": "",
        }
    config.data.update(data)
    config.recipe = dataclasses.asdict(recipe)
    config.update(changes)
    return config
