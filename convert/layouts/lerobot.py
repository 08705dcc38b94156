"""LeRobot's layout of π0, π0.5 and π0-FAST: openpi's PyTorch names below `model.`, with two tensors for the text.

`embed_tokens` is the embedding, `lm_head` the output projection, equal until LeRobot trains one of them. π0 and π0.5
write no text in LeRobot and do not use `lm_head`; in π0-FAST both count.
"""

from __future__ import annotations

from convert.layouts.openpi_torch import transformers_layout
from convert.lerobot_export import check_lerobot, write_lerobot
from pi0.config import KINDS

LAYOUT = transformers_layout("lerobot", "model.", KINDS, write_lerobot, check_lerobot, untied=True)
