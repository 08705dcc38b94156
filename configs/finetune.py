"""What the fine-tuning experiments share; each of the others says what is its own. Not an experiment itself."""

from __future__ import annotations

from typing import Any

import ml_collections
from ml_collections import FieldReference

from pi0.config import ModelConfig
from pi0.tokenizers.text import PALIGEMMA

SCALING = {
    "mesh": {"data": -1, "fsdp": 1, "tensor": 1},  # -1: all devices that are left
    "sharding": {"n": "tensor", "k": "tensor?", "m": "tensor", "l": ""},  # see pi0_jax.training.sharding
    "accumulate": 1,  # micro-batches, one after the other
}
RELEASED = "gs://openpi-assets/checkpoints"


def finetune(
    model: ModelConfig, data: dict[str, Any], optimizer: dict[str, Any] | None = None, **changes: Any
) -> ml_collections.ConfigDict:
    """openpi's schedule, optimizer and batch, with changes; π0.5 and π0-FAST are normalized by quantiles.

    `data` is what `data_config` takes, for π0-FAST an action_tokenizer too; `data.root` is the dataset, which some
    leave to the command line.
    `base_checkpoint` is where the weights start: any that `convert.checkpoints` opens, PaliGemma's own too.
    `eval_every` 0 leaves validation out.
    """
    return ml_collections.ConfigDict(
        {
            "seed": 0,
            "model": model.to_dict(),
            "base_checkpoint": f"{RELEASED}/pi0_base",
            "data": data_config(model, **data),
            "optimizer": {
                "peak_lr": 2.5e-5,
                "final_lr": 2.5e-6,
                "warmup_steps": 1000,
                "b1": 0.9,
                "b2": 0.95,
                "eps": 1e-8,
                "weight_decay": 1e-10,
                "clip_norm": 1.0,
                "moments_dtype": "float32",
            }
            | (optimizer or {}),
            "freeze": "",
            "frozen_dtype": "float32",
            "ema_decay": 0.99,
            "batch_size": 32,
            "steps": 30_000,
            "log_every": 100,
            "eval_every": 1000,
            "save_every": 1000,
            "keep_checkpoints": 2,
            "keep_best": True,
            "keep_every": 0,
            "wandb": "",
        }
        | SCALING
        | changes
    )


def data_config(model: ModelConfig, **changes: Any) -> dict[str, Any]:
    """What is read and how, with changes: at least a robot and an asset_id.

    `validation_episodes` is a list, or the fraction of all that the seed draws. `cache` is a folder that `pi0-cache`
    filled, or "memory", where each worker keeps its own pictures. `state_in_prompt` is π0.5's. `workers`
    are processes; 0 reads in the training's own. `mixture` is a list of dicts: see `pi0_jax.training.data.load_data`.
    """
    values = {
        "root": "",
        "normalization": model.family.normalization,
        "norm_stats_from": "",
        "tokenizer": PALIGEMMA,
        "action_tokenizer": "",
        "state_in_prompt": True,
        "validation_episodes": [],
        "mixture": [],
        "cache": "",
        "workers": 4,
        "skip_damaged": False,
        "augment": True,
    } | changes
    # The command line can give these any value: `--config.data.validation_episodes=0.05`.
    anything = {key: FieldReference(values[key], field_type=object) for key in ("validation_episodes", "mixture")}
    return values | anything
