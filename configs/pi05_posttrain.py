"""π0.5's second stage: subtasks and FAST tokens as before, and actions by a flow that PaliGemma is insulated from.

pi0-train --config configs/pi05_posttrain.py --config.data.root=data/droid --config.base_checkpoint=runs/pretrain \\
    --workdir runs/posttrain
pi0-train --config configs/pi05_posttrain.py:demo --config.base_checkpoint=runs/pretrain --workdir runs/posttrain
"""

from __future__ import annotations

import ml_collections

from configs.pi05_pretrain import experiment
from pi0.run_config import RecipeConfig


def get_config(size: str | None = None) -> ml_collections.ConfigDict:
    """The experiment, from the first stage's run; `size` as in pi05_pretrain."""
    return experiment(size, RecipeConfig(), base_checkpoint="runs/pretrain", steps=80_000)
