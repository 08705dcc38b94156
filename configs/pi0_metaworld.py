"""The full π0 on the bundled Meta-World recordings; `metaworld_demo` is the small one.

pi0-train --config configs/pi0_metaworld.py --workdir runs/pi0_metaworld
"""

from __future__ import annotations

import ml_collections

from configs.finetune import finetune
from pi0.variants import get_variant


def get_config(_: str | None = None) -> ml_collections.ConfigDict:
    """The experiment."""
    data = {
        "root": "bundled://metaworld_v30",
        "robot": "metaworld",
        "asset_id": "metaworld",
        "validation_episodes": [3, 7, 11, 15],
    }
    return finetune(get_variant("pi0", action_horizon=10), data, steps=5000)
