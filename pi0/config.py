"""Model configs: frozen dataclasses, the named variants, JSON in and out.

A config is everything that fixes a model's parameters and its inputs. `ModelConfig.variant("pi0")` gives a released
model; any other sizes are allowed and checked when the config is made.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

KINDS = ("pi0", "pi05", "pi0_fast")
DTYPES = ("float32", "bfloat16")
ATTENTIONS = ("plain", "xla", "cudnn")
REMATS = ("none", "full", "dots_saveable", "dots_with_no_batch_dims_saveable")  # the latter two as in JAX


class ConfigError(ValueError):
    """A config that no model can be built from; the message names the field and what would do."""


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ConfigError(message)


def _require_positive(config: Any, name: str) -> None:
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if field.type == "int":
            _require(
                isinstance(value, int) and not isinstance(value, bool) and value > 0,
                f"{name}.{field.name} is {value!r}; it must be a positive whole number",
            )


@dataclasses.dataclass(frozen=True)
class VisionConfig:
    """A SigLIP vision tower: `width` W, `depth` L, `mlp_dim` M, `num_heads` N, `patch_size` P pixels."""

    width: int
    depth: int
    mlp_dim: int
    num_heads: int
    patch_size: int = 14

    def __post_init__(self) -> None:
        _require_positive(self, "vision")
        _require(
            self.width % self.num_heads == 0,
            f"vision.width {self.width} does not divide into vision.num_heads {self.num_heads} heads",
        )

    @property
    def head_dim(self) -> int:
        return self.width // self.num_heads


@dataclasses.dataclass(frozen=True)
class GemmaConfig:
    """One Gemma expert: `width` W, `depth` L, `mlp_dim` M, `num_heads` N, `num_kv_heads` K, `head_dim` H.

    With `lora_rank` R every projection has a low-rank update; `lora_alpha` (default: R) scales attention's by alpha/R.
    openpi does not scale those of the MLP, and nor do we.
    """

    width: int
    depth: int
    mlp_dim: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    lora_rank: int | None = None
    lora_alpha: float | None = None

    def __post_init__(self) -> None:
        _require_positive(self, "gemma")
        _require(
            self.lora_rank is None or (type(self.lora_rank) is int and self.lora_rank > 0),
            f"lora_rank is {self.lora_rank!r}; it must be a positive whole number, or None for no LoRA",
        )
        _require(
            self.lora_alpha is None or (type(self.lora_alpha) in (int, float) and self.lora_rank is not None),
            f"lora_alpha is {self.lora_alpha!r} and lora_rank {self.lora_rank}; alpha is a number, and needs a rank",
        )
        _require(
            self.num_heads % self.num_kv_heads == 0,
            f"num_heads {self.num_heads} is not a multiple of num_kv_heads {self.num_kv_heads}",
        )
        _require(self.head_dim % 2 == 0, f"head_dim {self.head_dim} is odd; RoPE rotates pairs")

    @property
    def lora_scale(self) -> float:
        """The factor of attention's low-rank updates: alpha/rank."""
        if self.lora_rank is None or self.lora_alpha is None:
            return 1.0
        return self.lora_alpha / self.lora_rank


def _require_shared_attention(paligemma: GemmaConfig, action_expert: GemmaConfig) -> None:
    for name in ("depth", "num_heads", "num_kv_heads", "head_dim"):
        ours, theirs = getattr(paligemma, name), getattr(action_expert, name)
        _require(
            ours == theirs,
            f"paligemma.{name} is {ours} and action_expert.{name} is {theirs}; the two experts share one "
            f"attention in every layer, so these must be equal",
        )
    _require(
        action_expert.width % 2 == 0,
        f"action_expert.width {action_expert.width} is odd; the time embedding is half sine, half cosine",
    )


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Sizes and inputs of one π model.

    `kind` is "pi0", "pi05" or "pi0_fast", which has no `action_expert`: it is None there, and only there.
    `image_resolution` is (height, width) in pixels; `action_dim` A and `action_horizon` T are the padded action
    chunk's; `max_token_len` the text's length in tokens, π0-FAST's action tokens included; `num_steps` the Euler steps
    of sampling, `max_decoding_steps` the most tokens that π0-FAST decodes; `dtype` the compute dtype; `remat` what the
    backward pass recomputes: "none", "full" (all of a layer, the least memory), or all but matrix products, as two of
    JAX's checkpoint policies have it (PyTorch: as "full"); `attention` what JAX computes it by: "plain", our own
    products and softmax, or `jax.nn.dot_product_attention` in its "xla" or, on GPUs, "cudnn" implementation. Raises
    ConfigError for impossible sizes.
    """

    kind: str
    vision: VisionConfig
    paligemma: GemmaConfig
    action_expert: GemmaConfig | None
    vocab_size: int = 257_152
    image_resolution: tuple[int, int] = (224, 224)
    image_keys: tuple[str, ...] = ("base_0_rgb", "left_wrist_0_rgb", "right_wrist_0_rgb")
    action_dim: int = 32
    action_horizon: int = 50
    max_token_len: int = 48
    num_steps: int = 10
    max_decoding_steps: int = 256
    dtype: str = "bfloat16"
    remat: str = "full"
    attention: str = "plain"

    def __post_init__(self) -> None:
        _require_positive(self, "model")
        _require(self.kind in KINDS, f"kind is {self.kind!r}; known kinds are {', '.join(KINDS)}")
        _require(self.dtype in DTYPES, f"dtype is {self.dtype!r}; it must be one of {', '.join(DTYPES)}")
        _require(self.remat in REMATS, f"remat is {self.remat!r}; it must be one of {', '.join(REMATS)}")
        known = ", ".join(ATTENTIONS)
        _require(self.attention in ATTENTIONS, f"attention is {self.attention!r}; it must be one of {known}")
        _require(
            self.attention == "plain"
            or (self.kind != "pi0_fast" and (self.attention == "xla" or self.dtype == "bfloat16")),
            f"attention is {self.attention}, kind {self.kind} and dtype {self.dtype}; pi0_fast, whose queries are in "
            f"another dtype than its keys, takes plain only, and cudnn takes bfloat16 only",
        )
        if self.action_expert is not None:
            _require_shared_attention(self.paligemma, self.action_expert)
        _require(
            (self.action_expert is None) == (self.kind == "pi0_fast"),
            f"kind is {self.kind} and action_expert {'None' if self.action_expert is None else 'given'}; pi0_fast has "
            f"none (null in JSON), every other kind has one",
        )
        patch = self.vision.patch_size
        _require(
            isinstance(self.image_resolution, tuple)
            and len(self.image_resolution) == 2
            and all(isinstance(r, int) and r > 0 and r % patch == 0 for r in self.image_resolution),
            f"image_resolution {self.image_resolution} must be (height, width), multiples of the patch size {patch}",
        )
        _require(
            isinstance(self.image_keys, tuple)
            and all(isinstance(key, str) for key in self.image_keys)
            and len(set(self.image_keys)) == len(self.image_keys) > 0,
            f"image_keys {self.image_keys} must be one or more different camera names",
        )

    @property
    def image_tokens(self) -> int:
        """Tokens of one image."""
        height, width = self.image_resolution
        return (height // self.vision.patch_size) * (width // self.vision.patch_size)

    @property
    def prefix_len(self) -> int:
        """Tokens of all cameras and the prompt."""
        return len(self.image_keys) * self.image_tokens + self.max_token_len

    @classmethod
    def variant(cls, name: str, **changes: Any) -> ModelConfig:
        """The named variant, with fields replaced. Raises ConfigError for an unknown name."""
        _require(name in VARIANTS, f"unknown model variant {name!r}; known variants are {', '.join(VARIANTS)}")
        return dataclasses.replace(VARIANTS[name], **changes)

    @classmethod
    def named(cls, name: str) -> ModelConfig:
        """A variant by its name, or the config in a JSON file. Raises ConfigError, or OSError for a missing file."""
        if not name.endswith(".json"):
            return cls.variant(name)
        return cls.from_dict(json.loads(Path(name).read_text()))

    def to_dict(self) -> dict[str, Any]:
        """Plain values that JSON can hold; `from_dict` reads them back to an equal config."""
        return json.loads(json.dumps(dataclasses.asdict(self)))

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> ModelConfig:
        """The config of `to_dict`'s values. Raises ConfigError for missing or unknown fields."""
        values = dict(_checked(cls, values, "model"))
        for name, part in (("vision", VisionConfig), ("paligemma", GemmaConfig), ("action_expert", GemmaConfig)):
            if name != "action_expert" or values[name] is not None:
                values[name] = part(**_checked(part, values[name], name))
        for name in ("image_resolution", "image_keys"):
            if isinstance(values.get(name), list):
                values[name] = tuple(values[name])
        return cls(**values)


def _checked(cls: type, values: Any, name: str) -> dict[str, Any]:
    _require(isinstance(values, dict), f"{name} is {values!r}; it must be a table of fields")
    fields = {f.name: f for f in dataclasses.fields(cls)}
    needed = {n for n, f in fields.items() if f.default is dataclasses.MISSING}
    unknown, missing = sorted(values.keys() - fields.keys()), sorted(needed - values.keys())
    _require(not unknown, f"{name} has unknown fields {unknown}; known fields are {sorted(fields)}")
    _require(not missing, f"{name} lacks the fields {missing}")
    return values


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
    num_steps=5,
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
    num_steps=3,
    dtype="float32",
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
    max_decoding_steps=6,
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
    dtype="float32",
    remat="none",
)
DEMO_FAST = dataclasses.replace(
    DEMO,
    kind="pi0_fast",
    action_expert=None,
    vocab_size=1280,  # 512 of text, 128 that are kept free, and room for action tokens
    max_token_len=128,
    max_decoding_steps=64,
)

# For benchmarks: 58 M parameters, small enough for two CPU cores, with everything in the released models' proportions.
BENCH_EXPERT = GemmaConfig(width=512, depth=8, mlp_dim=2048, num_heads=8, num_kv_heads=1, head_dim=64)
BENCH = dataclasses.replace(
    PI0,
    vision=VisionConfig(width=384, depth=8, mlp_dim=1536, num_heads=6),
    paligemma=BENCH_EXPERT,
    action_expert=dataclasses.replace(BENCH_EXPERT, width=256, mlp_dim=1024),
    vocab_size=8192,
    dtype="float32",
    remat="none",
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
