"""π0 on LIBERO with LoRA, for one small GPU (openpi `pi0_libero_low_mem_finetune`).

pi0-train --config pi0_libero_lora --config.data.root=data/libero --workdir runs/libero_lora
"""

from __future__ import annotations

from ml_collections import ConfigDict

from configs._shared import RELEASED, experiment
from pi0.run_config import DataConfig
from pi0.variants import get_variant


def get_config() -> ConfigDict:
    """The experiment."""
    robot = {"name": "libero", "delta": True}  # as openpi's π0 LIBERO checkpoints
    return experiment(
        get_variant("pi0_lora"),
        DataConfig(robot=robot, asset_id="libero"),
        base_checkpoint=f"{RELEASED}/pi0_base",
        freeze="lora",
        frozen_dtype="bfloat16",
        ema_decay=None,
    )
