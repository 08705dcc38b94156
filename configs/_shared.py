"""What experiments share. Not an experiment itself."""

from __future__ import annotations

import ml_collections

from pi0.run_config import RunConfig

RELEASED = "gs://openpi-assets/checkpoints"


def config_dict(config: RunConfig) -> ml_collections.ConfigDict:
    """The config as a ConfigDict to change; `RunConfig.from_dict` checks its types and values afterwards."""
    return ml_collections.ConfigDict(config.to_dict(), type_safe=False)
