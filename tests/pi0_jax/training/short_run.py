"""The experiment of `test_sharding`: a few steps of a tiny model whose heads divide by two."""

from __future__ import annotations

import ml_collections

from configs.metaworld_demo import get_config as demo


def get_config() -> ml_collections.ConfigDict:
    """The experiment.

    Its learning rate is as small as in fine-tuning, and eps well above rounding: Adam divides by the size of the
    gradient, so where that is zero but for rounding (key biases), it would make steps of the noise.
    """
    config = demo("tiny")
    config.model.vision.num_heads = 4
    config.data.validation_episodes = []
    config.optimizer.update({"warmup_steps": 1, "peak_lr": 1e-4, "eps": 1e-6})
    config.update({"batch_size": 16, "steps": 5, "log_every": 1, "eval_every": 100, "save_every": 100})
    return config
