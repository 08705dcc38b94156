"""π0 on ALOHA's simulated cube transfer, one camera (openpi `pi0_aloha_sim`).

pi0-train --config configs/pi0_aloha_sim.py --workdir runs/aloha_sim
"""

from __future__ import annotations

import ml_collections

from configs.finetune import finetune
from pi0.variants import get_variant


def get_config(_: str | None = None) -> ml_collections.ConfigDict:
    """The experiment."""
    robot = {"name": "aloha", "cameras": {"top": "base_0_rgb"}, "delta": False, "default_prompt": "Transfer cube"}
    root = "hf://datasets/lerobot/aloha_sim_transfer_cube_human"
    data = {"root": root, "robot": robot, "asset_id": "aloha_sim"}
    return finetune(get_variant("pi0"), data, steps=20_000)
