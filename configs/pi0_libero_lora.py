"""π0 on LIBERO with LoRA, for one small GPU (openpi `pi0_libero_low_mem_finetune`).

pi0-train --config pi0_libero_lora --config.data.root=data/libero --workdir runs/libero_lora
"""

from __future__ import annotations

import ml_collections

from configs._shared import RELEASED, config_dict
from pi0.run_config import DataConfig, RunConfig
from pi0.variants import get_variant


def get_config() -> ml_collections.ConfigDict:
    """The experiment."""
    robot = {"name": "libero", "delta": True}  # as openpi's π0 LIBERO checkpoints
    return config_dict(
        RunConfig(
            model=get_variant("pi0_lora"),
            data=DataConfig(robot=robot, asset_id="libero"),
            base_checkpoint=f"{RELEASED}/pi0_base",
            freeze="lora",
            frozen_dtype="bfloat16",
            ema_decay=None,
        )
    )
