"""What π0, π0.5 and π0-FAST begin with: PaliGemma, which reads the cameras and the prompt, and may write text.

Axes: B batch, C cameras, T queries, S tokens, W width, V vocabulary, D decoded tokens.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from pi0 import numerics
from pi0.config import ModelConfig
from pi0.observation import Observation
from pi0_torch.models.gemma import Cache, Expert, joint_forward
from pi0_torch.models.siglip import SigLIP

ReadToken = Callable[[Tensor, Tensor, Tensor, Tensor, Cache], Tensor]  # `VisionLanguageModel.read_token`


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
    """A vision tower and a language model. Parameters are float32; `config.runtime.dtype` is the compute dtype.

    `queries` is the place of `pi0.numerics.ROUNDING` at which the language model rounds rotated queries.
    """

    def __init__(self, config: ModelConfig, *, queries: str):
        super().__init__()
        self.config = config
        self.vision = SigLIP(config)
        self.paligemma = Expert(
            config.paligemma,
            vocab_size=config.vocab_size,
            dtype=config.runtime.dtype,
            query_dtype=numerics.rounding(queries, config.runtime.dtype),
            remat=config.runtime.remat,
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

    @torch.no_grad()
    def decode(
        self,
        out: Float[Tensor, "B S W"],
        cache: Cache,
        valid: Bool[Tensor, "B S"],
        steps: int,
        *,
        skipped: int = 0,
        read_last: bool = False,
        temperature: float = 0.0,
        rng: torch.Generator | None = None,
        allowed: Bool[Tensor, " V"] | None = None,
        eos_token: int = numerics.EOS_TOKEN,
        read_token: ReadToken | None = None,
    ) -> tuple[Int[Tensor, "B D"], Cache]:
        """Write at most D = `steps` tokens after a prefix whose output, cache and valid tokens are given; int32.

        Each row ends with `eos_token` and then zeros, or is cut. The likeliest token each time; or, with a
        `temperature`, one drawn by `rng`; only those that are `allowed` (default: all). Ends when all rows have.
        Also returns the cache, grown by D places, into which every new token's keys and values go, those of the last
        one only if asked to `read_last`. Token i has the position prefix length + `skipped` + i. `read_token` is the
        method of that name, compiled perhaps. Raises ValueError for no steps, and for a temperature without `rng` or
        below 0.
        """
        if steps < 1:
            raise ValueError(f"max_decoding_steps is {steps}; it must be at least 1")
        if temperature < 0 or (temperature > 0 and rng is None):
            raise ValueError(f"temperature is {temperature}; it must be 0, or positive and with rng given")
        cache = [(F.pad(k, (0, 0, 0, 0, 0, steps)), F.pad(v, (0, 0, 0, 0, 0, steps))) for k, v in cache]
        batch, prefix_len = valid.shape
        places, prefix_seen = torch.arange(prefix_len + steps, device=valid.device), F.pad(valid, (0, steps))
        length = valid.sum(dim=1, keepdim=True)
        last = (valid.cumsum(dim=1) - 1).masked_fill(~valid, -1).argmax(dim=1)

        def choose(out: Tensor, i: int, tokens: Tensor, done: Tensor) -> tuple[Tensor, Tensor]:
            """Write token i [B], which the output `out` [B, 1, W] before it predicts."""
            logits = self.paligemma.logits(out)[:, 0]
            if allowed is not None:
                logits = logits.masked_fill(~allowed, numerics.MASKED_LOGIT)
            if rng is not None and temperature > 0:
                token = (logits / temperature).softmax(dim=-1).multinomial(1, generator=rng)[:, 0]
            else:
                token = logits.argmax(dim=-1)
            token = token.masked_fill(done, 0)
            tokens[:, i] = token
            return tokens, done | (token == eos_token)

        def read(i: int, tokens: Tensor) -> Tensor:
            """Token i − 1 [B] into the cache; the output [B, 1, W] that predicts token i."""
            seen = prefix_seen | (places >= prefix_len) & (places < prefix_len + i)
            position, slot = length + skipped + i - 1, places[prefix_len + i - 1, None]
            return (read_token or self.read_token)(tokens[:, i - 1, None], position, seen, slot, cache)

        tokens, done = valid.new_zeros(batch, steps, dtype=torch.int32), valid.new_zeros(batch)
        tokens, done = choose(out[torch.arange(batch), last][:, None], 0, tokens, done)
        i = 1
        while i < steps and not done.all():
            tokens, done = choose(read(i, tokens), i, tokens, done)
            i += 1
        if read_last:
            read(i, tokens)
        return tokens, cache

    def read_token(
        self,
        token: Int[Tensor, "B 1"],
        position: Int[Tensor, "B 1"],
        seen: Bool[Tensor, "B S"],
        slot: Int[Tensor, " 1"],
        cache: Cache,
    ) -> Float[Tensor, "B 1 W"]:
        """The output at a token that takes its place in the cache: what `decode` does for each, of fixed shapes."""
        x = self.paligemma.embed(token)
        (out,), _ = joint_forward((self.paligemma,), (x,), (position,), seen[:, None], (None,), cache, slot)
        return out
