"""A small π0 that does four Meta-World tasks, from scripted demonstrations, on two CPU cores (docs/rollout.md).

pi0-train --config metaworld_rollout --workdir runs/metaworld_rollout
"""

from __future__ import annotations

from ml_collections import ConfigDict

from configs._shared import experiment
from pi0.config import GemmaConfig, ModelConfig, RuntimeConfig, VisionConfig
from pi0.run_config import DataConfig, OptimizerConfig

EXPERT = GemmaConfig(width=128, depth=3, mlp_dim=384, num_heads=4, num_kv_heads=1, head_dim=32)
MODEL = ModelConfig(
    kind="pi0",
    vision=VisionConfig(width=128, depth=3, mlp_dim=384, num_heads=4),
    paligemma=EXPERT,
    action_expert=EXPERT,
    vocab_size=512,
    image_resolution=(112, 112),
    image_keys=("base_0_rgb", "left_wrist_0_rgb"),
    action_dim=4,
    action_horizon=16,
    max_token_len=16,
    runtime=RuntimeConfig(dtype="float32", remat="none"),
)
# From above and from behind the hand: together they show where everything is, in three dimensions.
CAMERAS = {"topview": "base_0_rgb", "behindGripper": "left_wrist_0_rgb"}


def get_config() -> ConfigDict:
    """The experiment."""
    data = DataConfig(
        robot={"name": "metaworld", "cameras": CAMERAS},
        asset_id="metaworld",
        root="runs/metaworld_demonstrations",
        tokenizer="bundled://tokenizer.model",
        validation_episodes=0.05,
        cache="memory",
        workers=0,
        augment=False,
    )
    optimizer = OptimizerConfig(peak_lr=1e-3, final_lr=1e-5, warmup_steps=100, weight_decay=1e-4)
    every = {"log_every": 50, "eval_every": 500, "save_every": 500, "keep_every": 500}
    return experiment(MODEL, data, optimizer=optimizer, ema_decay=0.99, batch_size=32, steps=4000, **every)
