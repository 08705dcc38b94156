"""π0.5 on your own DROID recordings, with the platform's norm stats (openpi `pi05_droid_finetune`).

pi0-train --config pi05_droid --config.data.root=data/droid --workdir runs/droid
"""

from __future__ import annotations

from ml_collections import ConfigDict

from configs._shared import RELEASED, experiment
from pi0.run_config import DataConfig
from pi0.variants import get_variant


def get_config() -> ConfigDict:
    """The experiment."""
    base = f"{RELEASED}/pi05_droid"
    data = DataConfig(robot="droid", asset_id="droid", norm_stats_from=base)
    return experiment(get_variant("pi05", action_horizon=16), data, base_checkpoint=base, steps=20_000)
