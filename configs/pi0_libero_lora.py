"""π0 on LIBERO with LoRA, for one small GPU (openpi `pi0_libero_low_mem_finetune`).

pi0-train --config configs/pi0_libero_lora.py --config.data.root=data/libero --workdir runs/libero_lora
"""

from __future__ import annotations

import ml_collections

from configs.finetune import finetune
from pi0.variants import get_variant


def get_config(_: str | None = None) -> ml_collections.ConfigDict:
    """The experiment."""
    robot = {"name": "libero", "delta": True}  # as openpi's π0 LIBERO checkpoints
    data = {"robot": robot, "asset_id": "libero"}
    return finetune(get_variant("pi0_lora"), data, freeze="lora", frozen_dtype="bfloat16", ema_decay=None)
