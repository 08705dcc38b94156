"""π0.5 on LIBERO (openpi `pi05_libero`, but with the state in the prompt, as π0.5 was trained).

As there, without it: --config.data.state_in_prompt=False
pi0-train --config configs/pi05_libero.py --config.data.root=data/libero --workdir runs/libero
"""

from __future__ import annotations

import ml_collections

from configs.finetune import RELEASED, finetune
from pi0.variants import get_variant


def get_config(_: str | None = None) -> ml_collections.ConfigDict:
    """The experiment."""
    return finetune(
        get_variant("pi05", action_horizon=10),
        {"robot": "libero", "asset_id": "libero"},
        {"peak_lr": 5e-5, "final_lr": 5e-5, "warmup_steps": 10_000},
        base_checkpoint=f"{RELEASED}/pi05_base",
        ema_decay=0.999,
        batch_size=256,
    )
