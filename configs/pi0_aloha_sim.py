"""π0 on ALOHA's simulated cube transfer, one camera (openpi `pi0_aloha_sim`; as there: `openpi:pi0_aloha_sim`).

pi0-train --config pi0_aloha_sim --workdir runs/aloha_sim
"""

from __future__ import annotations

from ml_collections import ConfigDict

from configs._shared import RELEASED, experiment
from pi0.presets import get_preset
from pi0.run_config import DataConfig
from pi0.variants import get_variant


def get_config() -> ConfigDict:
    """The experiment."""
    robot = get_preset("pi0_aloha_sim").robot
    data = DataConfig(robot, asset_id="aloha_sim", root="hf://datasets/lerobot/aloha_sim_transfer_cube_human")
    return experiment(get_variant("pi0"), data, base_checkpoint=f"{RELEASED}/pi0_base", steps=20_000)
