"""A small π0 on the bundled Meta-World recordings; learns on two CPU cores in minutes.

pi0-train --config metaworld_demo --workdir runs/metaworld
pi0-train --config metaworld_demo:demo_pi05 --workdir runs/metaworld_pi05
pi0-train --config metaworld_demo:demo_pi0_fast --workdir runs/metaworld_pi0_fast
"""

from __future__ import annotations

from ml_collections import ConfigDict

from configs._shared import experiment
from pi0.run_config import DataConfig, OptimizerConfig
from pi0.variants import get_variant


def get_config(variant: str = "demo") -> ConfigDict:
    """The experiment; `variant` names a model of `pi0.variants`."""
    model = get_variant(variant)
    data = DataConfig(
        robot="metaworld",
        asset_id="metaworld",
        root="bundled://metaworld_v30",
        tokenizer="bundled://tokenizer.model",
        action_tokenizer="bundled://fast_tokenizer" if model.family.action_tokens else "",
        validation_episodes=(3, 7, 11, 15),
        cache="memory",
        workers=0,
        augment=False,
    )
    optimizer = OptimizerConfig(peak_lr=1e-3, final_lr=1e-5, warmup_steps=30, weight_decay=1e-4)
    every = {"log_every": 10, "eval_every": 100, "save_every": 150}
    return experiment(model, data, optimizer=optimizer, ema_decay=0.98, steps=300, **every)
