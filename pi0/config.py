"""Model configs: frozen dataclasses, JSON in and out.

A config is everything that fixes a model's parameters and its inputs. `pi0.variants` names those of released models;
any other sizes are allowed and checked when the config is made.
"""

from __future__ import annotations

import dataclasses
import json
import types
import typing
from collections.abc import Mapping
from typing import Any

from pi0.families import FAMILIES, TEXT_FORMATS, Family, TextFormat
from pi0.numerics import TIME_PERIODS

KINDS = tuple(FAMILIES)
T = typing.TypeVar("T")

DTYPES = ("float32", "bfloat16")
PROOF_DTYPE = "float64"  # in which `pi0_eval.parity` proves that two models are one function; for nothing else
ATTENTIONS = ("plain", "xla", "cudnn")
REMATS = (  # the last two as in JAX
    *("none", "full", "mlp", "wide", "offload"),
    *("dots_saveable", "dots_with_no_batch_dims_saveable"),
)
# The largest sizes that are accepted, far above those of any model: a config that comes with a checkpoint must not make
# this machine allocate what no model needs. To use larger ones, change this table before the config is made.
LIMITS = {
    "width": 2**16,
    "depth": 2**10,
    "mlp_dim": 2**20,
    "num_heads": 2**10,
    "num_kv_heads": 2**10,
    "head_dim": 2**12,
    "lora_rank": 2**12,
    "patch_size": 2**10,
    "vocab_size": 2**24,
    "action_dim": 2**10,
    "action_horizon": 2**12,
    "max_token_len": 2**14,
    "image_resolution": 2**12,
    "image_keys": 2**6,
    "image tokens": 2**16,
    "num_steps": 2**12,
    "max_decoding_steps": 2**14,
}


class ConfigError(ValueError):
    """An invalid config; the message names the field and what is allowed."""


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ConfigError(message)


def canonical_dtype(dtype: Any, name: str = "dtype") -> str:
    """The name of a dtype that is given by name or as one of NumPy, JAX or PyTorch. Raises ConfigError, with `name`."""
    found = dtype if isinstance(dtype, str) else getattr(dtype, "name", None) or getattr(dtype, "__name__", str(dtype))
    found = str(found).removeprefix("torch.")
    _require(found in DTYPES, f"{name} is {dtype!r}; it must be one of {', '.join(DTYPES)}")
    return found


def _require_positive(config: Any, name: str) -> None:
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if field.type == "int":
            _require(
                isinstance(value, int) and not isinstance(value, bool) and value > 0,
                f"{name}.{field.name} is {value!r}; it must be a positive whole number",
            )
            _require_limit(f"{name}.{field.name}", value, field.name)


def _require_limit(name: str, value: int, limit: str) -> None:
    most = LIMITS[limit]
    _require(value <= most, f"{name} is {value}; at most {most} are accepted (pi0.config.LIMITS)")


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
        """The width of an attention head."""
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
        _require_limit("lora_rank", self.lora_rank or 0, "lora_rank")
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
class RuntimeConfig:
    """How a model is computed, which none of its parameters depends on.

    Attributes:
        dtype: the compute dtype, "float32" or "bfloat16"; of a proof of parity "float64".
        remat: what the backward pass recomputes: "none"; "mlp", what is inside the MLPs; "wide", that and attention's
            logits; "full", all of a layer; "offload", the same, and the layers' inputs wait in the host's memory (TPUs
            and GPUs); or all but matrix products, as two of JAX's checkpoint policies have it. The gradient is the same
            with each. PyTorch knows "none", and does "full" for all others.
        attention: how JAX computes it: "plain", our own products and softmax, or `jax.nn.dot_product_attention` in its
            "xla" or, on GPUs, "cudnn" implementation.
        num_steps: the Euler steps of sampling.
        max_decoding_steps: the most tokens that are decoded: π0-FAST's actions, π0.5's subtask.
    """

    dtype: str = "bfloat16"
    remat: str = "full"
    attention: str = "plain"
    num_steps: int = 10
    max_decoding_steps: int = 256

    def __post_init__(self) -> None:
        _require_positive(self, "runtime")
        if self.dtype != PROOF_DTYPE:
            object.__setattr__(self, "dtype", canonical_dtype(self.dtype))
        for name, known in (("remat", REMATS), ("attention", ATTENTIONS)):
            value = getattr(self, name)
            _require(value in known, f"{name} is {value!r}; it must be one of {', '.join(known)}")
        _require(
            self.attention != "cudnn" or self.dtype == "bfloat16",
            f"attention is cudnn and dtype {self.dtype}; cudnn takes bfloat16 only",
        )


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """The architecture and inputs of one π model, and how it is computed (`runtime`).

    Raises ConfigError for impossible sizes.

    Attributes:
        kind: the family: "pi0", "pi05" or "pi0_fast".
        action_expert: None in π0-FAST, which has none, and only there.
        image_resolution: (height, width) in pixels.
        action_dim, action_horizon: A and T of the padded action chunk.
        max_token_len: the text's length in tokens, π0-FAST's action tokens included.
        state_dim: the padded state's dimensions, where they are not `action_dim`.
        time_periods: the shortest and longest period of the flow time's embedding.
        tied_output: whether text is written with the embedding; if not, with a projection of its own, which LeRobot's
            training of π0-FAST makes of it.
        text_format: how π0-FAST's prompts and tokens are laid out, one of `pi0.families.TEXT_FORMATS`.
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
    runtime: RuntimeConfig = RuntimeConfig()
    state_dim: int | None = None
    time_periods: tuple[float, float] = TIME_PERIODS
    tied_output: bool = True
    text_format: str = "openpi"

    def __post_init__(self) -> None:
        _require_positive(self, "model")
        self._require_conventions()
        attentions = self.family.attentions
        _require(
            self.runtime.attention in attentions,
            f"attention is {self.runtime.attention}; {self.kind} takes {', '.join(attentions)} only",
        )
        if self.action_expert is not None:
            _require_shared_attention(self.paligemma, self.action_expert)
        _require(
            (self.action_expert is None) == ("action_expert" not in self.family.experts),
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
        _require_limit("image_resolution", max(self.image_resolution), "image_resolution")
        _require(
            isinstance(self.image_keys, tuple)
            and all(isinstance(key, str) for key in self.image_keys)
            and len(set(self.image_keys)) == len(self.image_keys) > 0,
            f"image_keys {self.image_keys} must be one or more different camera names",
        )
        _require_limit("the number of image_keys", len(self.image_keys), "image_keys")
        _require_limit("the number of image tokens", len(self.image_keys) * self.image_tokens, "image tokens")

    def _require_conventions(self) -> None:
        size = self.state_dim
        _require(
            size is None or (type(size) is int and size > 0),
            f"state_dim is {size!r}; it must be a positive whole number, or None for action_dim",
        )
        _require_limit("state_dim", size or 0, "action_dim")
        periods = self.time_periods
        _require(
            isinstance(periods, tuple)
            and len(periods) == 2
            and all(type(p) is float for p in periods)
            and 0 < periods[0] < periods[1] < float("inf"),
            f"time_periods is {periods!r}; it must be the shortest and the longest period, two numbers above 0",
        )
        _require(
            self.text_format in TEXT_FORMATS,
            f"text_format is {self.text_format!r}; it must be one of {', '.join(TEXT_FORMATS)}",
        )
        _require(self.kind in KINDS, f"kind is {self.kind!r}; known kinds are {', '.join(KINDS)}")
        _require(
            self.family.action_tokens or (self.tied_output and self.text_format == "openpi"),
            f"tied_output is {self.tied_output} and text_format {self.text_format}; only pi0_fast has others than true "
            "and openpi",
        )

    @property
    def state_size(self) -> int:
        """The dimensions of the padded state."""
        return self.action_dim if self.state_dim is None else self.state_dim

    @property
    def format(self) -> TextFormat:
        """The record of its text format."""
        return TEXT_FORMATS[self.text_format]

    @property
    def family(self) -> Family:
        """The record of its family."""
        return FAMILIES[self.kind]

    @property
    def experts(self) -> dict[str, GemmaConfig]:
        """The Gemma experts that it has, by name."""
        return {name: getattr(self, name) for name in self.family.experts}

    def with_runtime(self, **changes: Any) -> ModelConfig:
        """The same model with changes to `runtime`. Raises ConfigError."""
        return dataclasses.replace(self, runtime=dataclasses.replace(self.runtime, **changes))

    @property
    def image_tokens(self) -> int:
        """Tokens of one image."""
        height, width = self.image_resolution
        return (height // self.vision.patch_size) * (width // self.vision.patch_size)

    @property
    def prefix_len(self) -> int:
        """Tokens of all cameras and the prompt."""
        return len(self.image_keys) * self.image_tokens + self.max_token_len

    def to_dict(self) -> dict[str, Any]:
        """Plain values that JSON can hold; `from_dict` reads them back to an equal config."""
        return json.loads(json.dumps(dataclasses.asdict(self)))

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> ModelConfig:
        """The config of `to_dict`'s values. Raises ConfigError for missing or unknown fields.

        Configs of version 0.1 had the fields of `runtime` among their own, and are read as well.
        """
        flat = {f.name for f in dataclasses.fields(RuntimeConfig)} & set(values) if isinstance(values, Mapping) else ()
        if flat and "runtime" not in values:
            values = {name: value for name, value in values.items() if name not in flat} | {
                "runtime": {name: values[name] for name in flat}
            }
        return from_dict(cls, values, "model")


def from_dict(cls: type[T], values: Any, name: str = "") -> T:
    """A frozen dataclass, its fields that are dataclasses included, from plain values; JSON's lists become tuples.

    Raises ConfigError for unknown, missing and mistyped fields. It gives their dotted names, which begin with `name`.
    """
    _require(isinstance(values, Mapping), f"{name or 'the config'} is {values!r:.200}; it must be {_describe(cls)}")
    fields, hints = {f.name: f for f in dataclasses.fields(cls)}, typing.get_type_hints(cls)  # type: ignore[arg-type]
    defaults = (dataclasses.MISSING, dataclasses.MISSING)
    needed = {n for n, f in fields.items() if (f.default, f.default_factory) == defaults}
    unknown, missing = sorted(values.keys() - fields.keys()), sorted(needed - values.keys())
    _require(not unknown, f"{name or 'the config'} has unknown fields {unknown}; known fields are {sorted(fields)}")
    _require(not missing, f"{name or 'the config'} lacks the fields {missing}")
    prefix = f"{name}." if name else ""
    return cls(**{field: _convert(value, hints[field], f"{prefix}{field}") for field, value in values.items()})


def options_of(hint: Any) -> tuple[Any, ...]:
    """The members of a union, or the type itself."""
    return typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)


def _convert(value: Any, hint: Any, name: str) -> Any:
    for option in options_of(hint):
        cls = typing.get_origin(option) or option
        if dataclasses.is_dataclass(cls) and isinstance(value, Mapping):
            return from_dict(option, value, name)
        if cls is tuple and isinstance(value, list | tuple):
            item = typing.get_args(option)[0]
            return tuple(_convert(each, item, f"{name}[{i}]") for i, each in enumerate(value))
        if cls is float and type(value) is int:
            return float(value)
        if cls is Any or (isinstance(value, cls) and (cls is bool or type(value) is not bool)):
            return value
    raise ConfigError(f"{name} is {value!r:.200}; it must be {' or '.join(map(_describe, options_of(hint)))}")


def _describe(option: Any) -> str:
    cls = typing.get_origin(option) or option
    words = {int: "a whole number", float: "a number", str: "a string", bool: "true or false", tuple: "a list"}
    return words.get(cls, "None" if cls is type(None) else "a table of fields")
