"""π0-FAST on your own DROID recordings, with the platform's norm stats, from openpi's `pi0_fast_droid`.

pi0-train --config pi0_fast_droid --config.data.root=data/droid --workdir runs/fast_droid
"""

from __future__ import annotations

from ml_collections import ConfigDict

from configs._shared import RELEASED, experiment
from pi0.run_config import DataConfig
from pi0.tokenizers.fast import FAST
from pi0.variants import get_variant


def get_config() -> ConfigDict:
    """The experiment."""
    base = f"{RELEASED}/pi0_fast_droid"
    robot = {"name": "droid", "cameras": {"exterior_image_1_left": "base_0_rgb", "wrist_image_left": "wrist_0_rgb"}}
    data = DataConfig(robot=robot, asset_id="droid", norm_stats_from=base, action_tokenizer=FAST)
    model = get_variant("pi0_fast", action_dim=8, action_horizon=10)
    return experiment(model, data, base_checkpoint=base, steps=20_000)
