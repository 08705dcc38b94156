"""The named model configs: released models, and small ones for tests, the demo and benchmarks."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from pi0.config import ConfigError, GemmaConfig, ModelConfig, RuntimeConfig, VisionConfig
from pi0.reading import read_json


def get_variant(name: str, **changes: Any) -> ModelConfig:
    """The named variant, with fields replaced, those of its `runtime` too. Raises ConfigError for an unknown name."""
    if name not in VARIANTS:
        raise ConfigError(f"unknown model variant {name!r}; known variants are {', '.join(VARIANTS)}")
    runtime = {n: changes.pop(n) for n in [f.name for f in dataclasses.fields(RuntimeConfig)] if n in changes}
    return dataclasses.replace(VARIANTS[name].with_runtime(**runtime), **changes)


def read_variant(name: str) -> ModelConfig:
    """A variant by its name, or the config in a JSON file. Raises ConfigError, or OSError for a missing file."""
    if not name.endswith(".json"):
        return get_variant(name)
    values = read_json(Path(name), error=ConfigError)
    try:
        return ModelConfig.from_dict(values)
    except ConfigError as error:
        raise ConfigError(f"{name}: {error}") from error


SO400M = VisionConfig(width=1152, depth=27, mlp_dim=4304, num_heads=16, patch_size=14)
GEMMA_2B = GemmaConfig(width=2048, depth=18, mlp_dim=16_384, num_heads=8, num_kv_heads=1, head_dim=256)
GEMMA_300M = dataclasses.replace(GEMMA_2B, width=1024, mlp_dim=4096)

PI0 = ModelConfig(kind="pi0", vision=SO400M, paligemma=GEMMA_2B, action_expert=GEMMA_300M)
PI05 = dataclasses.replace(PI0, kind="pi05", max_token_len=200)
PI0_LORA = dataclasses.replace(
    PI0,
    paligemma=dataclasses.replace(GEMMA_2B, lora_rank=16, lora_alpha=16.0),
    action_expert=dataclasses.replace(GEMMA_300M, lora_rank=32, lora_alpha=32.0),
)
PI0_SMALL = dataclasses.replace(
    PI0,
    action_expert=dataclasses.replace(GEMMA_2B, width=512, mlp_dim=2048),
    action_horizon=25,
    max_token_len=32,
    runtime=RuntimeConfig(num_steps=5),
)
PI0_FAST = dataclasses.replace(
    PI0,
    kind="pi0_fast",
    action_expert=None,
    image_keys=("base_0_rgb", "base_1_rgb", "wrist_0_rgb"),
    action_horizon=32,
    max_token_len=250,
)

# For tests: every axis has another size where the architecture allows it, so that a swapped axis cannot pass.
TINY_EXPERT = GemmaConfig(width=20, depth=3, mlp_dim=36, num_heads=4, num_kv_heads=2, head_dim=16)
TINY = ModelConfig(
    kind="pi0",
    vision=VisionConfig(width=24, depth=2, mlp_dim=40, num_heads=3),
    paligemma=GemmaConfig(width=32, depth=3, mlp_dim=56, num_heads=4, num_kv_heads=2, head_dim=16),
    action_expert=TINY_EXPERT,
    vocab_size=512,
    image_resolution=(28, 42),
    image_keys=("base_0_rgb", "left_wrist_0_rgb"),
    action_dim=7,
    action_horizon=5,
    max_token_len=8,
    runtime=RuntimeConfig(num_steps=3, dtype="float32"),
)
TINY_LORA = dataclasses.replace(
    TINY,
    paligemma=dataclasses.replace(TINY.paligemma, lora_rank=3, lora_alpha=6.0),
    action_expert=dataclasses.replace(TINY_EXPERT, lora_rank=5, lora_alpha=5.0),
)
TINY_FAST = dataclasses.replace(
    TINY,
    kind="pi0_fast",
    action_expert=None,
    image_keys=("base_0_rgb", "wrist_0_rgb"),
    max_token_len=14,
    runtime=dataclasses.replace(TINY.runtime, max_decoding_steps=6),
)

# For the demo: learns the bundled recordings on two CPU cores in minutes.
DEMO = ModelConfig(
    kind="pi0",
    vision=VisionConfig(width=128, depth=3, mlp_dim=384, num_heads=4),
    paligemma=GemmaConfig(width=192, depth=4, mlp_dim=512, num_heads=4, num_kv_heads=1, head_dim=32),
    action_expert=GemmaConfig(width=128, depth=4, mlp_dim=384, num_heads=4, num_kv_heads=1, head_dim=32),
    vocab_size=512,
    image_resolution=(84, 84),
    image_keys=("base_0_rgb", "left_wrist_0_rgb"),
    action_dim=8,
    action_horizon=10,
    max_token_len=24,
    runtime=RuntimeConfig(dtype="float32", remat="none"),
)
DEMO_FAST = dataclasses.replace(
    DEMO,
    kind="pi0_fast",
    action_expert=None,
    vocab_size=1280,  # 512 of text, 128 that are kept free, and room for action tokens
    max_token_len=128,
    runtime=dataclasses.replace(DEMO.runtime, max_decoding_steps=64),
)

# For benchmarks: 58 M parameters, small enough for two CPU cores, with everything in the released models' proportions.
BENCH_EXPERT = GemmaConfig(width=512, depth=8, mlp_dim=2048, num_heads=8, num_kv_heads=1, head_dim=64)
BENCH = dataclasses.replace(
    PI0,
    vision=VisionConfig(width=384, depth=8, mlp_dim=1536, num_heads=6),
    paligemma=BENCH_EXPERT,
    action_expert=dataclasses.replace(BENCH_EXPERT, width=256, mlp_dim=1024),
    vocab_size=8192,
    runtime=RuntimeConfig(dtype="float32", remat="none"),
)

VARIANTS = {
    "pi0": PI0,
    "pi05": PI05,
    "pi0_small": PI0_SMALL,
    "pi0_lora": PI0_LORA,
    "pi0_fast": PI0_FAST,
    "pi0_fast_lora": dataclasses.replace(PI0_FAST, paligemma=PI0_LORA.paligemma),
    "tiny": TINY,
    "tiny_lora": TINY_LORA,
    "tiny_pi05": dataclasses.replace(TINY, kind="pi05", max_token_len=20),
    "tiny_pi0_fast": TINY_FAST,
    "tiny_pi0_fast_lora": dataclasses.replace(TINY_FAST, paligemma=TINY_LORA.paligemma),
    "demo": DEMO,
    "demo_pi05": dataclasses.replace(DEMO, kind="pi05", max_token_len=64),
    "demo_pi0_fast": DEMO_FAST,
    "bench": BENCH,
    "bench_pi05": dataclasses.replace(BENCH, kind="pi05", max_token_len=200),
    "bench_pi0_fast": dataclasses.replace(
        BENCH, kind="pi0_fast", action_expert=None, image_keys=PI0_FAST.image_keys, max_token_len=250
    ),
}
