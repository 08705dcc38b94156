"""π0 on ALOHA's simulated cube transfer, one camera (openpi `pi0_aloha_sim`).

pi0-train --config pi0_aloha_sim --workdir runs/aloha_sim
"""

from __future__ import annotations

import ml_collections

from configs._shared import RELEASED, config_dict
from pi0.run_config import DataConfig, RunConfig
from pi0.variants import get_variant


def get_config() -> ml_collections.ConfigDict:
    """The experiment."""
    robot = {"name": "aloha", "cameras": {"top": "base_0_rgb"}, "delta": False, "default_prompt": "Transfer cube"}
    root = "hf://datasets/lerobot/aloha_sim_transfer_cube_human"
    return config_dict(
        RunConfig(
            model=get_variant("pi0"),
            data=DataConfig(root=root, robot=robot, asset_id="aloha_sim"),
            base_checkpoint=f"{RELEASED}/pi0_base",
            steps=20_000,
        )
    )
