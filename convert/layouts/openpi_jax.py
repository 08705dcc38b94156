"""openpi's JAX layout: the key paths of its Orbax checkpoints, without the `params` root and `value` leaves."""

from __future__ import annotations

from convert.layouts.layout import Layout, Rule
from convert.sidecars import check_openpi

_IMG = "PaliGemma/img"
_BLOCK = f"{_IMG}/Transformer/encoderblock"
_HEADS = f"{_BLOCK}/MultiHeadDotProductAttention_0"

_VISION = (
    Rule("vision.patch_embedding.kernel", f"{_IMG}/embedding/kernel", "p q c d"),
    Rule("vision.patch_embedding.bias", f"{_IMG}/embedding/bias", "d"),
    Rule("vision.position_embedding", f"{_IMG}/pos_embedding", "0 s d"),
    Rule("vision.layers.attention_norm.scale", f"{_BLOCK}/LayerNorm_0/scale", "l d"),
    Rule("vision.layers.attention_norm.bias", f"{_BLOCK}/LayerNorm_0/bias", "l d"),
    Rule("vision.layers.mlp_norm.scale", f"{_BLOCK}/LayerNorm_1/scale", "l d"),
    Rule("vision.layers.mlp_norm.bias", f"{_BLOCK}/LayerNorm_1/bias", "l d"),
    *(
        rule
        for x in ("query", "key", "value")
        for rule in (
            Rule(f"vision.layers.attention.{x}.kernel", f"{_HEADS}/{x}/kernel", "l d n h"),
            Rule(f"vision.layers.attention.{x}.bias", f"{_HEADS}/{x}/bias", "l n h"),
        )
    ),
    Rule("vision.layers.attention.out.kernel", f"{_HEADS}/out/kernel", "l n h d"),
    Rule("vision.layers.attention.out.bias", f"{_HEADS}/out/bias", "l d"),
    Rule("vision.layers.mlp.up.kernel", f"{_BLOCK}/MlpBlock_0/Dense_0/kernel", "l d m"),
    Rule("vision.layers.mlp.up.bias", f"{_BLOCK}/MlpBlock_0/Dense_0/bias", "l m"),
    Rule("vision.layers.mlp.down.kernel", f"{_BLOCK}/MlpBlock_0/Dense_1/kernel", "l m d"),
    Rule("vision.layers.mlp.down.bias", f"{_BLOCK}/MlpBlock_0/Dense_1/bias", "l d"),
    Rule("vision.final_norm.scale", f"{_IMG}/Transformer/encoder_norm/scale", "d"),
    Rule("vision.final_norm.bias", f"{_IMG}/Transformer/encoder_norm/bias", "d"),
    Rule("vision.head.kernel", f"{_IMG}/head/kernel", "d w"),
    Rule("vision.head.bias", f"{_IMG}/head/bias", "w"),
)


def _gemma(ours: str, n: str) -> tuple[Rule, ...]:
    """The rules of one expert; `n` is the suffix of its modules in openpi."""
    llm, layers = "PaliGemma/llm", "PaliGemma/llm/layers"
    norms = (("attention_norm", "pre_attention_norm"), ("mlp_norm", "pre_ffw_norm"))
    return (
        Rule(f"{ours}.layers.attention.query.kernel", f"{layers}/attn/q_einsum{n}/w", "l n d h"),
        Rule(f"{ours}.layers.attention.key.kernel", f"{layers}/attn/kv_einsum{n}/w", "l 0 k d h"),
        Rule(f"{ours}.layers.attention.value.kernel", f"{layers}/attn/kv_einsum{n}/w", "l 1 k d h"),
        Rule(f"{ours}.layers.attention.out.kernel", f"{layers}/attn/attn_vec_einsum{n}/w", "l n h d"),
        Rule(f"{ours}.layers.mlp.gate.kernel", f"{layers}/mlp{n}/gating_einsum", "l 0 d m"),
        Rule(f"{ours}.layers.mlp.up.kernel", f"{layers}/mlp{n}/gating_einsum", "l 1 d m"),
        Rule(f"{ours}.layers.mlp.down.kernel", f"{layers}/mlp{n}/linear", "l m d"),
        Rule(f"{ours}.layers.attention.query.lora.a", f"{layers}/attn/q_einsum{n}/lora_a", "l n d r"),
        Rule(f"{ours}.layers.attention.query.lora.b", f"{layers}/attn/q_einsum{n}/lora_b", "l n r h"),
        Rule(f"{ours}.layers.attention.key.lora.a", f"{layers}/attn/kv_einsum{n}/lora_a", "l 0 k d r"),
        Rule(f"{ours}.layers.attention.key.lora.b", f"{layers}/attn/kv_einsum{n}/lora_b", "l 0 k r h"),
        Rule(f"{ours}.layers.attention.value.lora.a", f"{layers}/attn/kv_einsum{n}/lora_a", "l 1 k d r"),
        Rule(f"{ours}.layers.attention.value.lora.b", f"{layers}/attn/kv_einsum{n}/lora_b", "l 1 k r h"),
        Rule(f"{ours}.layers.attention.out.lora.a", f"{layers}/attn/attn_vec_einsum{n}/lora_a", "l n h r"),
        Rule(f"{ours}.layers.attention.out.lora.b", f"{layers}/attn/attn_vec_einsum{n}/lora_b", "l n r d"),
        Rule(f"{ours}.layers.mlp.gate.lora.a", f"{layers}/mlp{n}/gating_einsum_lora_a", "l 0 d r"),
        Rule(f"{ours}.layers.mlp.gate.lora.b", f"{layers}/mlp{n}/gating_einsum_lora_b", "l 0 r m"),
        Rule(f"{ours}.layers.mlp.up.lora.a", f"{layers}/mlp{n}/gating_einsum_lora_a", "l 1 d r"),
        Rule(f"{ours}.layers.mlp.up.lora.b", f"{layers}/mlp{n}/gating_einsum_lora_b", "l 1 r m"),
        Rule(f"{ours}.layers.mlp.down.lora.a", f"{layers}/mlp{n}/linear_lora_a", "l m r"),
        Rule(f"{ours}.layers.mlp.down.lora.b", f"{layers}/mlp{n}/linear_lora_b", "l r d"),
        *(Rule(f"{ours}.layers.{norm}.scale", f"{layers}/{theirs}{n}/scale", "l d") for norm, theirs in norms),
        *(
            Rule(f"{ours}.layers.{norm}.modulation.{part}", f"{layers}/{theirs}{n}/Dense_0/{part}", axes)
            for norm, theirs in norms
            for part, axes in (("kernel", "l d t"), ("bias", "l t"))
        ),
        Rule(f"{ours}.final_norm.scale", f"{llm}/final_norm{n}/scale", "d"),
        Rule(f"{ours}.final_norm.modulation.kernel", f"{llm}/final_norm{n}/Dense_0/kernel", "d t"),
        Rule(f"{ours}.final_norm.modulation.bias", f"{llm}/final_norm{n}/Dense_0/bias", "t"),
    )


_PROJECTIONS = (
    ("action_in_proj", "a d"),
    ("action_out_proj", "d a"),
    ("state_proj", "z d"),
    ("action_time_mlp_in", "u d"),
    ("action_time_mlp_out", "d e"),
    ("time_mlp_in", "d e"),
    ("time_mlp_out", "d e"),
)

LAYOUT = Layout(
    "openpi_jax",
    (
        *_VISION,
        Rule("paligemma.embedding", "PaliGemma/llm/embedder/input_embedding", "v d"),
        *_gemma("paligemma", ""),
        *_gemma("action_expert", "_1"),
        *(Rule(f"{name}.kernel", f"{name}/kernel", axes) for name, axes in _PROJECTIONS),
        *(Rule(f"{name}.bias", f"{name}/bias", axes.split()[1]) for name, axes in _PROJECTIONS),
    ),
    root=("params",),
    check_target=check_openpi,
)
