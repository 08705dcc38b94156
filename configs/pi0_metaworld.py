"""The full π0 on the bundled Meta-World recordings; `metaworld_demo` is the small one.

pi0-train --config pi0_metaworld --workdir runs/pi0_metaworld
"""

from __future__ import annotations

from ml_collections import ConfigDict

from configs._shared import RELEASED, experiment
from pi0.run_config import DataConfig
from pi0.variants import get_variant


def get_config() -> ConfigDict:
    """The experiment."""
    data = DataConfig("metaworld", "metaworld", "bundled://metaworld_v30", validation_episodes=(3, 7, 11, 15))
    model = get_variant("pi0", action_horizon=10)
    return experiment(model, data, base_checkpoint=f"{RELEASED}/pi0_base", steps=5000)
