"""LeRobot's layout of its π0, π0.5 and π0-FAST policies: openpi's PyTorch names below `model.`, by newer transformers.

Older versions of transformers have `vision_tower.vision_model.`, which is read too.
"""

from __future__ import annotations

from convert.layouts.openpi_torch import transformers_layout
from pi0.config import KINDS

LAYOUT = transformers_layout("lerobot", "model.", "vision_tower", r"vision_tower\.vision_model", KINDS)
