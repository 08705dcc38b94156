"""A small π0 on the bundled Meta-World recordings; learns on two CPU cores in minutes.

pi0-train --config metaworld_demo --workdir runs/metaworld
pi0-train --config metaworld_demo:demo_pi05 --workdir runs/metaworld_pi05
pi0-train --config metaworld_demo:demo_pi0_fast --workdir runs/metaworld_pi0_fast
"""

from __future__ import annotations

import ml_collections

from configs._shared import config_dict
from pi0.run_config import DataConfig, OptimizerConfig, RunConfig
from pi0.variants import get_variant


def get_config(variant: str = "demo") -> ml_collections.ConfigDict:
    """The experiment; `variant` names a model of `pi0.variants`."""
    model = get_variant(variant)
    return config_dict(
        RunConfig(
            model=model,
            data=DataConfig(
                root="bundled://metaworld_v30",
                robot="metaworld",
                asset_id="metaworld",
                tokenizer="bundled://tokenizer.model",
                action_tokenizer="bundled://fast_tokenizer" if model.family.action_tokens else "",
                validation_episodes=(3, 7, 11, 15),
                cache="memory",
                workers=0,
                augment=False,
            ),
            optimizer=OptimizerConfig(peak_lr=1e-3, final_lr=1e-5, warmup_steps=30, weight_decay=1e-4),
            ema_decay=0.98,
            steps=300,
            log_every=10,
            eval_every=100,
            save_every=150,
        )
    )
