"""A run of seconds, for tests of either framework."""

from __future__ import annotations

from configs.metaworld_demo import get_config
from pi0.run_config import RunConfig


def small_config(**changes) -> RunConfig:
    """A few steps of a tiny model on the bundled recordings; tables in `changes` are merged."""
    config = get_config("tiny")
    config.data.validation_episodes = list(range(2, 16))
    config.optimizer.warmup_steps = 1
    config.update({"batch_size": 8, "steps": 4, "log_every": 2, "eval_every": 4, "save_every": 2})
    config.update(changes)
    return RunConfig.from_dict(config.to_dict())
