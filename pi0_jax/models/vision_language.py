"""PaliGemma, which all models begin with: it reads the camera images and the prompt, and may write text.

Axes: B batch, C cameras, S tokens, W width, V vocabulary, D decoded tokens.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from pi0 import numerics
from pi0.config import ModelConfig
from pi0.observation import Observation
from pi0.recording import record, section
from pi0_jax.models.decoding import decode
from pi0_jax.models.gemma import Cache, Expert, joint_forward
from pi0_jax.models.layers import cast, constrain_rows
from pi0_jax.models.siglip import SigLIP


def pixels(image: Array, dtype: str) -> Float[Array, "B height width 3"]:
    """uint8 0..255 to float32 [−1, 1]; float images are in [−1, 1] already."""
    x = cast(image, "patches", dtype)
    return x / 255 * 2 - 1 if image.dtype == jnp.uint8 else x


class VisionLanguageModel(nnx.Module):
    """A vision tower and a language model. Parameters are float32; `config.runtime.dtype` is the compute dtype."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.vision = SigLIP(config, rngs=rngs)
        self.paligemma = Expert(
            config.paligemma,
            vocab_size=config.vocab_size,
            tied_output=config.tied_output,
            dtype=config.runtime.dtype,
            query_dtype=numerics.rounding(config.family.query_rounding, config.runtime.dtype),
            remat=config.runtime.remat,
            attention=config.runtime.attention,
            rngs=rngs,
        )

    def embed_prefix(
        self, observation: Observation, stages: dict[str, Array] | None = None
    ) -> tuple[Float[Array, "B S W"], Bool[Array, "B S"]]:
        """Tokens of all cameras, in `config.image_keys` order, then of the prompt; and which of them are valid."""
        section("images")
        keys = self.config.image_keys
        images = jnp.stack([pixels(observation.images[key], self.config.runtime.dtype) for key in keys], axis=1)
        batch, cameras = record("pixels", images).shape[:2]
        images = constrain_rows(images.reshape(batch * cameras, *images.shape[2:]))
        tokens = self.vision(images, stages)
        masks = jnp.stack([observation.image_masks[key] for key in keys], axis=1)
        masks = jnp.repeat(masks, tokens.shape[1], axis=1)
        tokens = tokens.reshape(batch, -1, tokens.shape[-1])
        section("text")
        text = record("embedding", self.paligemma.embed(observation.tokenized_prompt))
        if stages is not None:
            stages["image_tokens"] = tokens
        return (
            jnp.concatenate([tokens, text], axis=1),
            jnp.concatenate([masks, observation.tokenized_prompt_mask], axis=1),
        )

    def read_prefix(
        self,
        prefix: Float[Array, "B S W"],
        valid: Bool[Array, "B S"],
        mask: Bool[Array, "B S S"],
        stages: dict[str, Array] | None = None,
    ) -> tuple[Float[Array, "B S W"], Cache]:
        """The language model over the prefix alone: its output, and keys and values."""
        positions = jnp.cumsum(valid, axis=1) - 1
        (out,), cache = joint_forward((self.paligemma,), (prefix,), (positions,), mask, (None,), stages=stages)
        return out, cache

    def decode(
        self, out: Float[Array, "B S W"], cache: Cache, valid: Bool[Array, "B S"], steps: int, **options: Any
    ) -> tuple[Int[Array, "B D"], Cache]:
        """Write at most D = `steps` tokens after a prefix; its cache grows by D places. See `decoding.decode`."""
        cache = jax.tree.map(lambda x: jnp.pad(x, ((0, 0), (0, 0), (0, steps), (0, 0), (0, 0))), cache)
        last = jnp.argmax(jnp.where(valid, jnp.cumsum(valid, axis=1) - 1, -1), axis=1)
        logits = self.paligemma.logits(out[jnp.arange(len(out)), last][:, None])[:, 0]
        places = jnp.pad(valid, ((0, 0), (0, steps)))
        return decode(logits, cache, places, valid.shape[1], steps, self.read_token, **options)

    def read_token(
        self,
        token: Int[Array, "B 1"],
        position: Int[Array, "B 1"],
        seen: Bool[Array, "B S"],
        slot: Int[Array, ""],
        cache: Cache,
    ) -> tuple[Float[Array, "B V"], Cache]:
        """The logits of the next token, and the cache with this one in its place."""
        x = self.paligemma.embed(token)
        (out,), cache = joint_forward((self.paligemma,), (x,), (position,), seen[:, None], (None,), cache, slot)
        return self.paligemma.logits(out)[:, 0], cache
