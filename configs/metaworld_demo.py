"""A small π0 on the bundled Meta-World recordings; learns on two CPU cores in minutes.

pi0-train --config configs/metaworld_demo.py --workdir runs/metaworld
pi0-train --config configs/metaworld_demo.py:demo_pi05 --workdir runs/metaworld_pi05
pi0-train --config configs/metaworld_demo.py:demo_pi0_fast --workdir runs/metaworld_pi0_fast
"""

from __future__ import annotations

import ml_collections

from configs.finetune import SCALING, data_config
from pi0.variants import get_variant


def get_config(variant: str | None = None) -> ml_collections.ConfigDict:
    """The experiment; `variant` names a model of `pi0.config` (default: demo)."""
    model = get_variant(variant or "demo")
    return ml_collections.ConfigDict(
        {
            "seed": 0,
            "model": model.to_dict(),
            "base_checkpoint": "",
            "data": data_config(
                model,
                root="bundled://metaworld_v30",
                robot="metaworld",
                asset_id="metaworld",
                tokenizer="bundled://tokenizer.model",
                action_tokenizer="bundled://fast_tokenizer" if model.family.action_tokens else "",
                validation_episodes=[3, 7, 11, 15],
                cache="memory",
                workers=0,
                augment=False,
            ),
            "optimizer": {
                "peak_lr": 1e-3,
                "final_lr": 1e-5,
                "warmup_steps": 30,
                "b1": 0.9,
                "b2": 0.95,
                "eps": 1e-8,
                "weight_decay": 1e-4,
                "clip_norm": 1.0,
                "moments_dtype": "float32",
            },
            "freeze": "",
            "frozen_dtype": "float32",
            "ema_decay": 0.98,
            "batch_size": 32,
            "steps": 300,
            "log_every": 10,
            "eval_every": 100,
            "save_every": 150,
            "keep_checkpoints": 2,
            "keep_best": True,
            "keep_every": 0,
            "wandb": "",
        }
        | SCALING
    )
