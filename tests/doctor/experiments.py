"""The two small policies of `tests/doctor`, each trained in minutes on one core.

pi0-train --config tests.doctor.experiments:velocities --workdir runs/velocities
pi0-train --config tests.doctor.experiments:positions --workdir runs/positions
pi0-convert runs/velocities tests/doctor/velocities --to pi0_torch --dtype bfloat16   # and positions
"""

from __future__ import annotations

import dataclasses
from typing import Any

from ml_collections import ConfigDict

from configs import metaworld_demo
from pi0.config import GemmaConfig, VisionConfig
from pi0.variants import get_variant

GEMMA = GemmaConfig(width=96, depth=2, mlp_dim=256, num_heads=4, num_kv_heads=1, head_dim=24)
SIZES: dict[str, Any] = {
    "vision": VisionConfig(width=64, depth=2, mlp_dim=192, num_heads=4),
    "paligemma": GEMMA,
    "action_expert": dataclasses.replace(GEMMA, width=80),
    "image_resolution": (56, 56),
}
POSITIONS = {
    "name": "generic",
    "cameras": {"corner": "base_0_rgb", "wrist": "left_wrist_0_rgb"},
    "state": [[0, 4]],
    "actions": [[0, 4]],
    "delta_dims": [3, -1],
    "delta": True,
}


def velocities() -> ConfigDict:
    """A π0 of a robot that is commanded by velocities, with absolute actions."""
    return _small("demo", 1000)


def positions() -> ConfigDict:
    """A π0.5 of a robot that is commanded by positions, with actions relative to the state."""
    config = _small("demo_pi05", 700)
    config.data.robot = POSITIONS
    config.data.asset_id = "positions"
    config.data.format = "tests.doctor.positions:Positions"
    config.data.normalization = "quantile"
    return config


def _small(variant: str, steps: int) -> ConfigDict:
    config = metaworld_demo.get_config(variant)
    config.model = get_variant(variant, **SIZES).to_dict()
    config.update({"steps": steps, "save_every": steps, "eval_every": steps, "log_every": 50})
    return config
