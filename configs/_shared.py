"""What experiments share. Not an experiment itself."""

from __future__ import annotations

from typing import Any

from ml_collections import ConfigDict

from pi0.config import ModelConfig
from pi0.run_config import DataConfig, RunConfig

RELEASED = "gs://openpi-assets/checkpoints"


def experiment(model: ModelConfig, data: DataConfig, **fields: Any) -> ConfigDict:
    """A run's config as a ConfigDict to change; `RunConfig.from_dict` checks its types and values afterwards."""
    return ConfigDict(RunConfig(model, data, **fields).to_dict(), type_safe=False)
