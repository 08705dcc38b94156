"""What π0, π0.5 and π0-FAST begin with: PaliGemma, which reads the cameras and the prompt.

Axes: B batch, C cameras, T queries, S tokens, W width.
"""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from pi0 import numerics
from pi0.config import ModelConfig
from pi0.observation import Observation
from pi0_jax.models.gemma import Expert
from pi0_jax.models.siglip import SigLIP
from pi0_jax.sharding import constrain_rows


def attention_mask(
    query_blocks: np.ndarray | Int[Array, "B T"],
    key_blocks: np.ndarray | Int[Array, "B S"],
    query_valid: Bool[Array, "B T"],
    key_valid: Bool[Array, "B S"],
) -> Bool[Array, "B T S"]:
    """A token attends to valid tokens whose block number is at most its own; blocks [T], [S], or with B before."""
    return query_valid[:, :, None] & key_valid[:, None, :] & (key_blocks[..., None, :] <= query_blocks[..., None])


def pixels(image: Array) -> Float[Array, "B height width 3"]:
    """uint8 0..255 to float32 [−1, 1]; float images are in [−1, 1] already."""
    return image.astype(jnp.float32) / 255 * 2 - 1 if image.dtype == jnp.uint8 else image.astype(jnp.float32)


class VisionLanguageModel(nnx.Module):
    """A vision tower and a language model. Parameters are float32; `config.dtype` is the compute dtype.

    `queries` is the place of `pi0.numerics.ROUNDING` at which the language model rounds rotated queries.
    """

    def __init__(self, config: ModelConfig, *, queries: str, rngs: nnx.Rngs):
        self.config = config
        self.vision = SigLIP(config, rngs=rngs)
        self.paligemma = Expert(
            config.paligemma,
            vocab_size=config.vocab_size,
            dtype=config.dtype,
            query_dtype=numerics.rounding(queries, config.dtype),
            remat=config.remat,
            attention=config.attention,
            rngs=rngs,
        )

    def embed_prefix(
        self, observation: Observation, stages: dict[str, Array] | None = None
    ) -> tuple[Float[Array, "B S W"], Bool[Array, "B S"]]:
        """Tokens of all cameras, in `config.image_keys` order, then of the prompt; and which of them are valid."""
        keys = self.config.image_keys
        images = jnp.stack([pixels(observation.images[key]) for key in keys], axis=1)
        batch, cameras = images.shape[:2]
        images = constrain_rows(images.reshape(batch * cameras, *images.shape[2:]))
        tokens = self.vision(images, stages)
        masks = jnp.stack([observation.image_masks[key] for key in keys], axis=1)
        masks = jnp.repeat(masks, tokens.shape[1], axis=1)
        tokens = tokens.reshape(batch, -1, tokens.shape[-1])
        text = self.paligemma.embed(observation.tokenized_prompt)
        if stages is not None:
            stages["image_tokens"] = tokens
        return (
            jnp.concatenate([tokens, text], axis=1),
            jnp.concatenate([masks, observation.tokenized_prompt_mask], axis=1),
        )
