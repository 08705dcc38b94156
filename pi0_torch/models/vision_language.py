"""PaliGemma, which all models begin with: it reads the camera images and the prompt, and may write text.

Axes: B batch, C cameras, S tokens, W width, V vocabulary, D decoded tokens.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from pi0 import numerics
from pi0.config import ModelConfig
from pi0.observation import Observation
from pi0.recording import record, section
from pi0_torch.models.decoding import decode
from pi0_torch.models.gemma import Cache, Expert, joint_forward
from pi0_torch.models.layers import cast
from pi0_torch.models.siglip import SigLIP


def pixels(image: Tensor, dtype: str) -> Float[Tensor, "B height width 3"]:
    """uint8 0..255 to float32 [−1, 1]; float images are in [−1, 1] already."""
    x = cast(image, "patches", dtype)
    return x / 255 * 2 - 1 if image.dtype == torch.uint8 else x


class VisionLanguageModel(nn.Module):
    """A vision tower and a language model. Parameters are float32; `config.runtime.dtype` is the compute dtype."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.vision = SigLIP(config)
        self.paligemma = Expert(
            config.paligemma,
            vocab_size=config.vocab_size,
            tied_output=config.tied_output,
            dtype=config.runtime.dtype,
            query_dtype=numerics.rounding(config.family.query_rounding, config.runtime.dtype),
            remat=config.runtime.remat,
        )

    def embed_prefix(
        self, observation: Observation, stages: dict[str, Tensor] | None = None
    ) -> tuple[Float[Tensor, "B S W"], Bool[Tensor, "B S"]]:
        """Tokens of all cameras, in `config.image_keys` order, then of the prompt; and which of them are valid."""
        section("images")
        keys = self.config.image_keys
        images = torch.stack([pixels(observation.images[key], self.config.runtime.dtype) for key in keys], dim=1)
        batch = record("pixels", images).shape[0]
        tokens = self.vision(images.flatten(0, 1), stages)
        masks = torch.stack([observation.image_masks[key] for key in keys], dim=1)
        masks = masks.repeat_interleave(tokens.shape[1], dim=1)
        tokens = tokens.reshape(batch, -1, tokens.shape[-1])
        section("text")
        text = record("embedding", self.paligemma.embed(observation.tokenized_prompt))
        if stages is not None:
            stages["image_tokens"] = tokens
        return (
            torch.cat([tokens, text], dim=1),
            torch.cat([masks, observation.tokenized_prompt_mask], dim=1),
        )

    def read_prefix(
        self,
        prefix: Float[Tensor, "B S W"],
        valid: Bool[Tensor, "B S"],
        mask: Bool[Tensor, "B S S"],
        stages: dict[str, Tensor] | None = None,
    ) -> tuple[Float[Tensor, "B S W"], Cache]:
        """The language model over the prefix alone: its output, and keys and values."""
        positions = valid.cumsum(dim=1) - 1
        (out,), cache = joint_forward((self.paligemma,), (prefix,), (positions,), mask, (None,), stages=stages)
        return out, cache

    @torch.no_grad()
    def decode(
        self, out: Float[Tensor, "B S W"], cache: Cache, valid: Bool[Tensor, "B S"], steps: int, **options: Any
    ) -> tuple[Int[Tensor, "B D"], Cache]:
        """Write at most D = `steps` tokens after a prefix; its cache grows by D places. See `decoding.decode`."""
        cache = [(F.pad(k, (0, 0, 0, 0, 0, steps)), F.pad(v, (0, 0, 0, 0, 0, steps))) for k, v in cache]
        last = (valid.cumsum(dim=1) - 1).masked_fill(~valid, -1).argmax(dim=1)
        logits = self.paligemma.logits(out[torch.arange(len(out)), last][:, None])[:, 0]
        places = F.pad(valid, (0, steps))
        return decode(logits, cache, places, valid.shape[1], steps, self.read_token, **options), cache

    def read_token(
        self,
        token: Int[Tensor, "B 1"],
        position: Int[Tensor, "B 1"],
        seen: Bool[Tensor, "B S"],
        slot: Int[Tensor, " 1"],
        cache: Cache,
    ) -> Float[Tensor, "B V"]:
        """The logits of the next token; in the cache, this one takes its place."""
        x = self.paligemma.embed(token)
        (out,), _ = joint_forward((self.paligemma,), (x,), (position,), seen[:, None], (None,), cache, slot)
        return self.paligemma.logits(out)[:, 0]
