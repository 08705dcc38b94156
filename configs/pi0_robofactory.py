"""π0 on one arm of a RoboFactory task: three cameras, actions and state normalized to [0, 1].

pi0-train --config pi0_robofactory --config.data.root=data/lift_barrier_0 --workdir runs/lift_barrier_0
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
            model=get_variant("pi0"),
            data=DataConfig(robot="robofactory", asset_id="robofactory", normalization="quantile01"),
            base_checkpoint=f"{RELEASED}/pi0_base",
        )
    )
