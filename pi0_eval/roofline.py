"""What sampling costs at least: operations, and bytes that are read, of each stage."""

from __future__ import annotations

from pi0.config import GemmaConfig, ModelConfig

ITEM_SIZE = {"float32": 4, "bfloat16": 2}


def costs(config: ModelConfig, cameras: int, batch: int) -> dict[str, tuple[float, float]]:
    """The least floating-point operations, and bytes of weights and cache read, of each stage."""
    vision, gemma, expert = config.vision, config.paligemma, config.action_expert
    size, image = ITEM_SIZE[config.runtime.dtype], config.image_tokens
    prefix = cameras * image + config.max_token_len
    suffix = config.family.state_tokens + config.action_horizon
    outputs = 2 * config.action_dim
    if expert is None:  # decoding: one token, and the logits of the next
        expert, suffix, outputs = gemma, 1, config.vocab_size
    patches = 3 * vision.patch_size**2 * vision.width + vision.width * gemma.width
    tower = vision.depth * (4 * vision.width**2 + 2 * vision.width * vision.mlp_dim) + patches
    see = vision.depth * 4 * image**2 * vision.width
    last = gemma.width * 2 * gemma.num_kv_heads * gemma.head_dim
    read = (gemma.depth - 1) * _layer(gemma) + last
    attend = (gemma.depth - 1) * 4 * prefix**2 * gemma.num_heads * gemma.head_dim
    act = expert.depth * _layer(expert) + outputs * expert.width
    attend_cache = expert.depth * 4 * suffix * (prefix + suffix) * expert.num_heads * expert.head_dim
    cache = 2 * expert.depth * (prefix + suffix) * expert.num_kv_heads * expert.head_dim
    return {
        "vision": (batch * cameras * (2 * image * tower + see), size * tower * (cameras > 0)),
        "prefix": (batch * (2 * prefix * read + attend), size * read),
        "step": (batch * (2 * suffix * act + attend_cache), size * (act + batch * cache)),
    }


def _layer(gemma: GemmaConfig) -> int:
    """Parameters of one layer's projections."""
    heads = gemma.num_heads * gemma.head_dim
    return gemma.width * (2 * heads + 2 * gemma.num_kv_heads * gemma.head_dim) + 3 * gemma.width * gemma.mlp_dim
