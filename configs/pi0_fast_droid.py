"""π0-FAST on your own DROID recordings, with the platform's norm stats, from openpi's `pi0_fast_droid`.

pi0-train --config pi0_fast_droid --config.data.root=data/droid --workdir runs/fast_droid
"""

from __future__ import annotations

import ml_collections

from configs._shared import RELEASED, config_dict
from pi0.run_config import DataConfig, RunConfig
from pi0.tokenizers.fast import FAST
from pi0.variants import get_variant


def get_config() -> ml_collections.ConfigDict:
    """The experiment."""
    base = f"{RELEASED}/pi0_fast_droid"
    cameras = {"exterior_image_1_left": "base_0_rgb", "wrist_image_left": "wrist_0_rgb"}
    return config_dict(
        RunConfig(
            model=get_variant("pi0_fast", action_dim=8, action_horizon=10),
            data=DataConfig(
                robot={"name": "droid", "cameras": cameras},
                asset_id="droid",
                norm_stats_from=base,
                action_tokenizer=FAST,
            ),
            base_checkpoint=base,
            steps=20_000,
        )
    )
