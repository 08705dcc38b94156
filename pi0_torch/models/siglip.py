"""SigLIP: the vision tower that turns an image into tokens of PaliGemma's width.

Axes: B images, P patch, S image tokens, W width, N heads, H head dim, M mlp, D PaliGemma's width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from pi0.config import ModelConfig
from pi0.recording import record, section
from pi0_torch.models.layers import LayerNorm, Linear, attention, cast, dtype_name, gelu, remat


class SelfAttention(nn.Module):
    """Multi-head attention of all image tokens with each other."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        width, self.heads = config.vision.width, (config.vision.num_heads, config.vision.head_dim)
        self.query = Linear(width, width, bias=True, dtype=config.runtime.dtype)
        self.key = Linear(width, width, bias=True, dtype=config.runtime.dtype)
        self.value = Linear(width, width, bias=True, dtype=config.runtime.dtype)
        self.out = Linear(width, width, bias=True, dtype=config.runtime.dtype)

    def forward(self, x: Float[Tensor, "B S W"]) -> Float[Tensor, "B S W"]:
        """What every token takes from all tokens of its image."""
        q, k, v = (f(x).unflatten(-1, self.heads) for f in (self.query, self.key, self.value))
        q, k, v = record("query", q), record("key", k), record("value", v)
        return record("out projection", self.out(attention(q, k, v).flatten(-2)))


class MLP(nn.Module):
    """Two projections with GELU between them."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        width, mlp_dim = config.vision.width, config.vision.mlp_dim
        self.up = Linear(width, mlp_dim, bias=True, dtype=config.runtime.dtype)
        self.down = Linear(mlp_dim, width, bias=True, dtype=config.runtime.dtype)

    def forward(self, x: Float[Tensor, "B S W"]) -> Float[Tensor, "B S W"]:
        """The MLP of each token."""
        return record("MLP down", self.down(record("GELU", gelu(record("MLP up", self.up(x))))))


class Block(nn.Module):
    """One pre-norm transformer layer."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.attention_norm = LayerNorm(config.vision.width, dtype=config.runtime.dtype)
        self.attention = SelfAttention(config)
        self.mlp_norm = LayerNorm(config.vision.width, dtype=config.runtime.dtype)
        self.mlp = MLP(config)

    def forward(self, x: Float[Tensor, "B S W"]) -> Float[Tensor, "B S W"]:
        """Attention and MLP, each added to its input."""
        dtype, x = x.dtype, cast(x, "residual", dtype_name(x))
        x = record("attention residual", x + self.attention(record("attention norm", self.attention_norm(x))))
        return record("MLP residual", x + self.mlp(record("MLP norm", self.mlp_norm(x)))).to(dtype)


class PatchEmbedding(nn.Module):
    """Non-overlapping convolution, in float32: weight [W, 3, P, P]."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.dtype = config.runtime.dtype
        patch, width = config.vision.patch_size, config.vision.width
        scale = 1 / (patch * 3**0.5)
        init = nn.init.trunc_normal_(torch.empty(width, 3, patch, patch), a=-2, b=2).mul_(scale)
        self.weight = nn.Parameter(init)
        self.bias = nn.Parameter(torch.zeros(width))

    def forward(self, image: Float[Tensor, "B height width 3"]) -> Float[Tensor, "B S W"]:
        """The tokens of an image, row by row."""
        weight = cast(self.weight, "patches", self.dtype)
        image = cast(image, "patches", self.dtype).permute(0, 3, 1, 2)
        x = F.conv2d(image, weight, cast(self.bias, "patches", self.dtype), stride=weight.shape[2:])
        return x.flatten(2).transpose(1, 2)


class SigLIP(nn.Module):
    """Image [B, height, width, 3] in [−1, 1] to tokens [B, S, D]; no pooling, no further scaling."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.dtype, self.remat = config.runtime.dtype, config.runtime.remat
        vision = config.vision
        self.patch_embedding = PatchEmbedding(config)
        init = torch.randn(config.image_tokens, vision.width).mul_(vision.width**-0.5)
        self.position_embedding = nn.Parameter(init)
        self.layers = nn.ModuleList(Block(config) for _ in range(vision.depth))
        self.final_norm = LayerNorm(vision.width, dtype=config.runtime.dtype)
        self.head = Linear(vision.width, config.paligemma.width, bias=True, dtype=config.runtime.dtype)

    def forward(
        self, image: Float[Tensor, "B height width 3"], stages: dict[str, Tensor] | None = None
    ) -> Float[Tensor, "B S D"]:
        """Image tokens. `stages`, where given, receives `vision.layers` [L, B, S, W]."""
        position = cast(self.position_embedding, "patches", self.dtype)
        x = (record("patches", self.patch_embedding(image)) + position).to(getattr(torch, self.dtype))
        outputs = []
        for block in self.layers:
            section("vision layer")
            x = remat(block, self.remat)(x)
            outputs.append(x)
        if stages is not None:
            stages["vision.layers"] = torch.stack(outputs)
        section("image tokens")
        return record("head", self.head(record("final norm", self.final_norm(x))))
