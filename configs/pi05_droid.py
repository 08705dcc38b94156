"""π0.5 on your own DROID recordings, with the platform's norm stats (openpi `pi05_droid_finetune`).

pi0-train --config configs/pi05_droid.py --config.data.root=data/droid --workdir runs/droid
"""

from __future__ import annotations

import ml_collections

from configs.finetune import RELEASED, finetune
from pi0.variants import get_variant


def get_config(_: str | None = None) -> ml_collections.ConfigDict:
    """The experiment."""
    base = f"{RELEASED}/pi05_droid"
    data = {"robot": "droid", "asset_id": "droid", "norm_stats_from": base}
    return finetune(get_variant("pi05", action_horizon=16), data, base_checkpoint=base, steps=20_000)
