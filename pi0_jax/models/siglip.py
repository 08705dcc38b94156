"""SigLIP: the vision tower that turns an image into tokens of PaliGemma's width.

Axes: B images, P patch, S image tokens, W width, N heads, H head dim, M mlp, D PaliGemma's width. Layers are stacked
on a leading axis and scanned.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from pi0.config import ModelConfig
from pi0.recording import section
from pi0_jax.models.layers import LayerNorm, Linear, attention, cast, constrain_rows, gelu, record, remat


class SelfAttention(nnx.Module):
    """Multi-head attention of all image tokens with each other."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        self.implementation = config.runtime.attention
        width, heads = config.vision.width, (config.vision.num_heads, config.vision.head_dim)
        self.query = Linear((width,), heads, bias=True, dtype=config.runtime.dtype, rngs=rngs)
        self.key = Linear((width,), heads, bias=True, dtype=config.runtime.dtype, rngs=rngs)
        self.value = Linear((width,), heads, bias=True, dtype=config.runtime.dtype, rngs=rngs)
        self.out = Linear(heads, (width,), bias=True, dtype=config.runtime.dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "B S W"]) -> Float[Array, "B S W"]:
        q, k, v = record("query", self.query(x)), record("key", self.key(x)), record("value", self.value(x))
        return record("out projection", self.out(attention(q, k, v, None, self.implementation)))


class MLP(nnx.Module):
    """Two projections with GELU between them."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        width, mlp_dim = config.vision.width, config.vision.mlp_dim
        self.up = Linear((width,), (mlp_dim,), bias=True, dtype=config.runtime.dtype, rngs=rngs)
        self.down = Linear((mlp_dim,), (width,), bias=True, dtype=config.runtime.dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "B S W"]) -> Float[Array, "B S W"]:
        return record("MLP down", self.down(record("GELU", gelu(record("MLP up", self.up(x))))))


class Block(nnx.Module):
    """One pre-norm transformer layer."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        self.attention_norm = LayerNorm(config.vision.width, dtype=config.runtime.dtype)
        self.attention = SelfAttention(config, rngs=rngs)
        self.mlp_norm = LayerNorm(config.vision.width, dtype=config.runtime.dtype)
        self.mlp = MLP(config, rngs=rngs)

    def __call__(self, x: Float[Array, "B S W"]) -> Float[Array, "B S W"]:
        dtype, x = x.dtype, cast(x, "residual", x.dtype.name)
        x = record("attention residual", x + self.attention(record("attention norm", self.attention_norm(x))))
        return record("MLP residual", x + self.mlp(record("MLP norm", self.mlp_norm(x)))).astype(dtype)


class PatchEmbedding(nnx.Module):
    """Non-overlapping convolution, in float32: kernel [P, P, 3, W]."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        self.dtype = config.runtime.dtype
        patch, width = config.vision.patch_size, config.vision.width
        scale = 1 / (patch * 3**0.5)
        init = jax.random.truncated_normal(rngs.params(), -2, 2, (patch, patch, 3, width)) * scale
        self.kernel = nnx.Param(init)
        self.bias = nnx.Param(jnp.zeros(width))

    def __call__(self, image: Float[Array, "B height width 3"]) -> Float[Array, "B S W"]:
        kernel = cast(self.kernel[...], "patches", self.dtype)
        x = jax.lax.conv_general_dilated(
            cast(image, "patches", self.dtype),
            kernel,
            window_strides=kernel.shape[:2],
            padding="VALID",
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )
        return x.reshape(x.shape[0], -1, x.shape[-1]) + cast(self.bias[...], "patches", self.dtype)


class SigLIP(nnx.Module):
    """Image [B, height, width, 3] in [−1, 1] to tokens [B, S, D]; no pooling, no further scaling."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        self.dtype, self.remat = config.runtime.dtype, config.runtime.remat
        vision = config.vision
        self.patch_embedding = PatchEmbedding(config, rngs=rngs)
        init = jax.random.normal(rngs.params(), (config.image_tokens, vision.width)) * vision.width**-0.5
        self.position_embedding = nnx.Param(init)
        stack = nnx.split_rngs(splits=vision.depth)(nnx.vmap(lambda rngs: Block(config, rngs=rngs)))
        self.layers = stack(rngs)
        self.final_norm = LayerNorm(vision.width, dtype=config.runtime.dtype)
        self.head = Linear((vision.width,), (config.paligemma.width,), bias=True, dtype=config.runtime.dtype, rngs=rngs)

    def __call__(
        self, image: Float[Array, "B height width 3"], stages: dict[str, Array] | None = None
    ) -> Float[Array, "B S D"]:
        """Image tokens. `stages`, where given, receives `vision.layers` [L, B, S, W]."""
        position = cast(self.position_embedding[...], "patches", self.dtype)
        x = (record("patches", self.patch_embedding(image)) + position).astype(self.dtype)

        def layer(x: Array, block: Block) -> tuple[Array, Array | None]:
            section("vision layer")
            x = block(constrain_rows(x))
            return x, None if stages is None else x

        x, outputs = jax.lax.scan(remat(layer, self.remat), x, self.layers)
        if stages is not None:
            stages["vision.layers"] = outputs
        section("image tokens")
        return record("head", self.head(record("final norm", self.final_norm(x))))
