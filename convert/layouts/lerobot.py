"""LeRobot's layout of π0, π0.5 and π0-FAST: openpi's PyTorch names below `model.`, with newer transformers' names.

`vision_tower.vision_model.` of older transformers versions is read too.
"""

from __future__ import annotations

from convert.layouts.openpi_torch import transformers_layout
from convert.sidecars import write_lerobot
from pi0.config import KINDS

LAYOUT = transformers_layout("lerobot", "model.", "vision_tower", r"vision_tower\.vision_model", KINDS, write_lerobot)
