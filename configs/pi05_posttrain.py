"""π0.5's second stage: subtasks and FAST tokens as before, and flow matching with PaliGemma insulated from it.

pi0-train --config pi05_posttrain --config.data.root=data/droid --config.base_checkpoint=runs/pretrain \\
    --workdir runs/posttrain
pi0-train --config pi05_posttrain:demo --config.base_checkpoint=runs/pretrain --workdir runs/posttrain
"""

from __future__ import annotations

from ml_collections import ConfigDict

from configs.pi05_pretrain import stage
from pi0.run_config import RecipeConfig


def get_config(size: str = "full") -> ConfigDict:
    """The experiment, from the first stage's run; `size` as in pi05_pretrain."""
    return stage(size, RecipeConfig(), base_checkpoint="runs/pretrain", steps=80_000)
