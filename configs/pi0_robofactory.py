"""π0 on one arm of a RoboFactory task: three views, stats to [0, 1].

pi0-train --config configs/pi0_robofactory.py --config.data.root=data/lift_barrier_0 --workdir runs/lift_barrier_0
"""

from __future__ import annotations

import ml_collections

from configs.finetune import finetune
from pi0.variants import get_variant


def get_config(_: str | None = None) -> ml_collections.ConfigDict:
    """The experiment."""
    data = {"robot": "robofactory", "asset_id": "robofactory", "normalization": "quantile01"}
    return finetune(get_variant("pi0"), data)
