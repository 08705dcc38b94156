"""The full π0 on the bundled Meta-World recordings; `metaworld_demo` is the small one.

pi0-train --config pi0_metaworld --workdir runs/pi0_metaworld
"""

from __future__ import annotations

import ml_collections

from configs._shared import RELEASED, config_dict
from pi0.run_config import DataConfig, RunConfig
from pi0.variants import get_variant


def get_config() -> ml_collections.ConfigDict:
    """The experiment."""
    return config_dict(
        RunConfig(
            model=get_variant("pi0", action_horizon=10),
            data=DataConfig(
                root="bundled://metaworld_v30",
                robot="metaworld",
                asset_id="metaworld",
                validation_episodes=(3, 7, 11, 15),
            ),
            base_checkpoint=f"{RELEASED}/pi0_base",
            steps=5000,
        )
    )
