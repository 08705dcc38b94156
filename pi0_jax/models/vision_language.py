"""What π0, π0.5 and π0-FAST begin with: PaliGemma, which reads the cameras and the prompt, and may write text.

Axes: B batch, C cameras, T queries, S tokens, W width, V vocabulary, D decoded tokens.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from pi0 import numerics
from pi0.config import ModelConfig
from pi0.observation import Observation
from pi0_jax.models.gemma import Cache, Expert, joint_forward
from pi0_jax.models.siglip import SigLIP
from pi0_jax.training.sharding import constrain_rows


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
    """A vision tower and a language model. Parameters are float32; `config.runtime.dtype` is the compute dtype.

    `queries` is the place of `pi0.numerics.ROUNDING` at which the language model rounds rotated queries.
    """

    def __init__(self, config: ModelConfig, *, queries: str, rngs: nnx.Rngs):
        self.config = config
        self.vision = SigLIP(config, rngs=rngs)
        self.paligemma = Expert(
            config.paligemma,
            vocab_size=config.vocab_size,
            dtype=config.runtime.dtype,
            query_dtype=numerics.rounding(queries, config.runtime.dtype),
            remat=config.runtime.remat,
            attention=config.runtime.attention,
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

    def decode(
        self,
        out: Float[Array, "B S W"],
        cache: Cache,
        valid: Bool[Array, "B S"],
        steps: int,
        *,
        skipped: int = 0,
        read_last: bool = False,
        temperature: float = 0.0,
        rng: Array | None = None,
        allowed: Bool[Array, " V"] | None = None,
        eos_token: int = numerics.EOS_TOKEN,
    ) -> tuple[Int[Array, "B D"], Cache]:
        """Write at most D = `steps` tokens after a prefix whose output, cache and valid tokens are given; int32.

        Each row ends with `eos_token` and then zeros, or is cut. The likeliest token each time; or, with a
        `temperature`, one drawn by `rng`; only those that are `allowed` (default: all). Ends when all rows have.
        Also returns the cache, grown by D places, into which every new token's keys and values go, those of the last
        one only if asked to `read_last`. Token i has the position prefix length + `skipped` + i. Raises ValueError for
        no steps, and for a temperature without `rng` or below 0.
        """
        if steps < 1:
            raise ValueError(f"max_decoding_steps is {steps}; it must be at least 1")
        if temperature < 0 or (temperature > 0 and rng is None):
            raise ValueError(f"temperature is {temperature}; it must be 0, or positive and with rng given")
        cache = jax.tree.map(lambda x: jnp.pad(x, ((0, 0), (0, 0), (0, steps), (0, 0), (0, 0))), cache)
        batch, prefix_len = valid.shape
        places, prefix_seen = jnp.arange(prefix_len + steps), jnp.pad(valid, ((0, 0), (0, steps)))
        length = valid.sum(axis=1, keepdims=True)
        last = jnp.argmax(jnp.where(valid, jnp.cumsum(valid, axis=1) - 1, -1), axis=1)

        def choose(out: Array, i: Array, tokens: Array, done: Array) -> tuple[Array, Array]:
            """Write token i [B], which the output `out` [B, 1, W] before it predicts."""
            logits = self.paligemma.logits(out)[:, 0]
            if allowed is not None:
                logits = jnp.where(allowed, logits, numerics.MASKED_LOGIT)
            if rng is not None and temperature > 0:
                token = jax.random.categorical(jax.random.fold_in(rng, i), logits / temperature)
            else:
                token = jnp.argmax(logits, axis=-1)
            token = jnp.where(done, 0, token)
            return tokens.at[:, i].set(token), done | (token == eos_token)

        def read(i: Array, cache: Cache, tokens: Array) -> tuple[Array, Cache]:
            """Token i − 1 [B] into the cache; the output [B, 1, W] that predicts token i."""
            seen = prefix_seen | (places >= prefix_len) & (places < prefix_len + i)
            position, slot = length + skipped + i - 1, prefix_len + i - 1
            return self.read_token(jax.lax.dynamic_slice_in_dim(tokens, i - 1, 1, axis=1), position, seen, slot, cache)

        def step(carry: tuple) -> tuple:
            i, cache, tokens, done = carry
            out, cache = read(i, cache, tokens)
            return i + 1, cache, *choose(out, i, tokens, done)

        start = jnp.zeros((batch, steps), jnp.int32), jnp.zeros(batch, bool)
        start = choose(out[jnp.arange(batch), last][:, None], jnp.int32(0), *start)
        carry = (jnp.int32(1), cache, *start)
        i, cache, tokens, _ = jax.lax.while_loop(lambda c: (c[0] < steps) & ~c[3].all(), step, carry)
        return tokens, read(i, cache, tokens)[1] if read_last else cache

    def read_token(
        self,
        token: Int[Array, "B 1"],
        position: Int[Array, "B 1"],
        seen: Bool[Array, "B S"],
        slot: Int[Array, ""],
        cache: Cache,
    ) -> tuple[Float[Array, "B 1 W"], Cache]:
        """The output at a token that takes its place in the cache: what `decode` does for each, of fixed shapes."""
        x = self.paligemma.embed(token)
        (out,), cache = joint_forward((self.paligemma,), (x,), (position,), seen[:, None], (None,), cache, slot)
        return out, cache
