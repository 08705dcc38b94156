"""π0 on one arm of a RoboFactory task: three cameras, actions and state normalized to [0, 1].

pi0-train --config pi0_robofactory --config.data.root=data/lift_barrier_0 --workdir runs/lift_barrier_0
"""

from __future__ import annotations

from ml_collections import ConfigDict

from configs._shared import RELEASED, experiment
from pi0.run_config import DataConfig
from pi0.variants import get_variant


def get_config() -> ConfigDict:
    """The experiment."""
    data = DataConfig(robot="robofactory", asset_id="robofactory", normalization="quantile01")
    return experiment(get_variant("pi0"), data, base_checkpoint=f"{RELEASED}/pi0_base")
