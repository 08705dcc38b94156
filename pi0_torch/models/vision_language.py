"""What π0, π0.5 and π0-FAST begin with: PaliGemma, which reads the cameras and the prompt.

Axes: B batch, C cameras, T queries, S tokens, W width.
"""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from pi0 import numerics
from pi0.config import ModelConfig
from pi0.observation import Observation
from pi0_torch.models.gemma import Expert
from pi0_torch.models.siglip import SigLIP


def attention_mask(
    query_blocks: np.ndarray | Int[Tensor, "B T"],
    key_blocks: np.ndarray | Int[Tensor, "B S"],
    query_valid: Bool[Tensor, "B T"],
    key_valid: Bool[Tensor, "B S"],
) -> Bool[Tensor, "B T S"]:
    """A token attends to valid tokens whose block number is at most its own; blocks [T], [S], or with B before."""
    allowed = torch.as_tensor(key_blocks[..., None, :] <= query_blocks[..., None], device=query_valid.device)
    return query_valid[:, :, None] & key_valid[:, None, :] & allowed


def pixels(image: Tensor) -> Float[Tensor, "B height width 3"]:
    """uint8 0..255 to float32 [−1, 1]; float images are in [−1, 1] already."""
    return image.float() / 255 * 2 - 1 if image.dtype == torch.uint8 else image.float()


class VisionLanguageModel(nn.Module):
    """A vision tower and a language model. Parameters are float32; `config.dtype` is the compute dtype.

    `queries` is the place of `pi0.numerics.ROUNDING` at which the language model rounds rotated queries.
    """

    def __init__(self, config: ModelConfig, *, queries: str):
        super().__init__()
        self.config = config
        self.vision = SigLIP(config)
        self.paligemma = Expert(
            config.paligemma,
            vocab_size=config.vocab_size,
            dtype=config.dtype,
            query_dtype=numerics.rounding(queries, config.dtype),
            remat=config.remat,
        )

    def embed_prefix(
        self, observation: Observation, stages: dict[str, Tensor] | None = None
    ) -> tuple[Float[Tensor, "B S W"], Bool[Tensor, "B S"]]:
        """Tokens of all cameras, in `config.image_keys` order, then of the prompt; and which of them are valid."""
        keys = self.config.image_keys
        images = torch.stack([pixels(observation.images[key]) for key in keys], dim=1)
        batch = images.shape[0]
        tokens = self.vision(images.flatten(0, 1), stages)
        masks = torch.stack([observation.image_masks[key] for key in keys], dim=1)
        masks = masks.repeat_interleave(tokens.shape[1], dim=1)
        tokens = tokens.reshape(batch, -1, tokens.shape[-1])
        text = self.paligemma.embed(observation.tokenized_prompt)
        if stages is not None:
            stages["image_tokens"] = tokens
        return (
            torch.cat([tokens, text], dim=1),
            torch.cat([masks, observation.tokenized_prompt_mask], dim=1),
        )
