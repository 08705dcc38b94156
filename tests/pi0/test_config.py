from __future__ import annotations

import dataclasses
import json
from typing import Any

import hypothesis
import ml_dtypes
import numpy as np
import pytest
from hypothesis import strategies as st

from pi0.config import ConfigError, GemmaConfig, ModelConfig, VisionConfig, canonical_dtype
from pi0.run_config import DataConfig, OptimizerConfig, RunConfig
from pi0.variants import VARIANTS, get_variant

TINY = get_variant("tiny")


@pytest.mark.parametrize("name", list(VARIANTS))
def test_json_there_and_back(name: str):
    config = get_variant(name)
    assert ModelConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_released_sizes():
    pi0, pi05, small = (get_variant(name) for name in ("pi0", "pi05", "pi0_small"))
    assert (pi0.image_tokens, pi0.max_token_len, pi05.max_token_len) == (256, 48, 200)
    assert pi0.prefix_len == 3 * 256 + 48
    assert (small.action_horizon, small.action_expert.width, small.runtime.num_steps, small.max_token_len) == (
        25,
        512,
        5,
        32,
    )
    assert (small.paligemma, small.vision) == (pi0.paligemma, pi0.vision)
    assert (pi05.paligemma, pi05.action_expert, pi05.vision) == (pi0.paligemma, pi0.action_expert, pi0.vision)
    assert pi0.paligemma == GemmaConfig(2048, 18, 16_384, num_heads=8, num_kv_heads=1, head_dim=256)
    assert pi0.action_expert == GemmaConfig(1024, 18, 4096, num_heads=8, num_kv_heads=1, head_dim=256)
    assert pi0.vision == VisionConfig(1152, 27, 4304, num_heads=16, patch_size=14) and pi0.vision.head_dim == 72
    assert (pi0.vocab_size, pi0.action_dim, pi0.action_horizon, pi0.runtime.num_steps) == (257_152, 32, 50, 10)
    assert pi0.image_keys == ("base_0_rgb", "left_wrist_0_rgb", "right_wrist_0_rgb")


def test_released_pi0_fast():
    pi0, fast = (get_variant(name) for name in ("pi0", "pi0_fast"))
    assert (fast.paligemma, fast.vision, fast.action_expert) == (pi0.paligemma, pi0.vision, None)
    assert fast.image_keys == ("base_0_rgb", "base_1_rgb", "wrist_0_rgb")
    assert (fast.max_token_len, fast.action_dim, fast.action_horizon, fast.runtime.max_decoding_steps) == (
        250,
        32,
        32,
        256,
    )
    lora = get_variant("pi0_fast_lora").paligemma
    assert (lora.lora_rank, lora.lora_scale) == (16, 1.0)


def test_variant_with_changes():
    assert get_variant("pi0", action_horizon=10).action_horizon == 10
    with pytest.raises(ConfigError, match=r"pi1.*pi0_small"):
        get_variant("pi1")


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"kind": "pi1"}, "kind"),
        ({"dtype": "float16"}, "dtype"),
        ({"remat": "some"}, "remat"),
        ({"action_dim": 0}, "action_dim"),
        ({"num_steps": -1}, "num_steps"),
        ({"action_horizon": 2.5}, "action_horizon"),
        ({"vocab_size": True}, "vocab_size"),
        ({"image_resolution": (28, 30)}, "image_resolution"),
        ({"image_resolution": (28,)}, "image_resolution"),
        ({"image_keys": ()}, "image_keys"),
        ({"image_keys": ("a", "a")}, "image_keys"),
        ({"action_expert": dataclasses.replace(TINY.action_expert, depth=4)}, "depth"),
        ({"action_expert": dataclasses.replace(TINY.action_expert, head_dim=8)}, "head_dim"),
        ({"action_expert": dataclasses.replace(TINY.action_expert, width=21)}, "width"),
        ({"action_expert": None}, "action_expert None; pi0_fast has none"),
        ({"kind": "pi0_fast"}, "action_expert given; pi0_fast has none"),
        ({"max_decoding_steps": 0}, "max_decoding_steps"),
    ],
)
def test_impossible_models_are_refused_with_a_reason(changes: dict, named: str):
    with pytest.raises(ConfigError, match=named):
        get_variant("tiny", **changes)


def test_impossible_parts_are_refused():
    with pytest.raises(ConfigError, match="num_heads"):
        VisionConfig(10, 1, 1, 3)
    with pytest.raises(ConfigError, match="num_kv_heads"):
        GemmaConfig(8, 1, 8, 4, 3, 8)
    with pytest.raises(ConfigError, match="odd"):
        GemmaConfig(8, 1, 8, 4, 1, 7)


@pytest.mark.parametrize(
    ("rank", "alpha", "named"),
    [
        (0, None, "lora_rank"),
        (-1, 1.0, "lora_rank"),
        ("4", None, "lora_rank"),
        (None, 4.0, "lora_alpha"),
        (4, "x", "lora_alpha"),
    ],
)
def test_impossible_lora(rank, alpha, named: str):
    with pytest.raises(ConfigError, match=named):
        dataclasses.replace(TINY.paligemma, lora_rank=rank, lora_alpha=alpha)


def test_lora_scale():
    assert get_variant("tiny_lora").paligemma.lora_scale == 2.0
    assert dataclasses.replace(TINY.paligemma, lora_rank=4).lora_scale == 1.0


@pytest.mark.parametrize(
    ("edit", "named"),
    [
        (lambda v: v | {"horizon": 3}, "horizon"),
        (lambda v: {k: x for k, x in v.items() if k != "vision"}, "vision"),
        (lambda v: v | {"vision": 3}, "vision"),
        (lambda v: v | {"paligemma": v["paligemma"] | {"size": 1}}, "size"),
        (lambda v: v | {"image_resolution": 28}, "image_resolution is 28"),
        (lambda v: v | {"image_resolution": [28, 28.0]}, "image_resolution"),
        (lambda v: v | {"image_keys": "base"}, "image_keys is 'base'"),  # not four cameras of one letter each
        (lambda v: v | {"image_keys": [0, 1]}, "image_keys"),
    ],
)
def test_unknown_missing_and_impossible_fields(edit, named: str):
    with pytest.raises(ConfigError, match=named):
        ModelConfig.from_dict(edit(TINY.to_dict()))


def sizes(cls: type) -> st.SearchStrategy[dict[str, Any]]:
    """Sizes of a config: each possible by itself, not always together."""
    names = [f.name for f in dataclasses.fields(cls) if f.type == "int"]
    return st.fixed_dictionaries({name: st.sampled_from([2, 4, 6, 8]) for name in names})


def impossible(parts: dict[str, dict[str, Any]], height: int) -> set[str]:
    """The fields for which no model can be built: first within each part, then between parts."""
    wrong = set()
    for part in parts.values():
        no_size = {name for name, value in part.items() if type(value) is not int or value < 1}
        wrong |= no_size
        if not no_size:
            divided, by = ("num_heads", "num_kv_heads") if "head_dim" in part else ("width", "num_heads")
            wrong |= {divided} if part[divided] % part[by] else set()
            wrong |= {"head_dim"} if part.get("head_dim", 0) % 2 else set()
    if wrong:
        return wrong
    paligemma, expert = parts["paligemma"], parts["action_expert"]
    wrong |= {"image_resolution"} if height % parts["vision"]["patch_size"] else set()
    wrong |= {"width"} if expert["width"] % 2 else set()
    return wrong | {n for n in ("depth", "num_heads", "num_kv_heads", "head_dim") if paligemma[n] != expert[n]}


@hypothesis.settings(deadline=None)
@hypothesis.given(
    st.fixed_dictionaries(
        {"vision": sizes(VisionConfig), "paligemma": sizes(GemmaConfig), "action_expert": sizes(GemmaConfig)}
    ),
    st.sampled_from([True, True, True, False]),
    st.none() | st.tuples(st.integers(0, 16), st.sampled_from([1, 3, 0, -2, 2.0, True, None, "4"])),
    st.sampled_from([24, 48, 27]),
)
def test_any_sizes_are_accepted_or_refused_by_name(parts, alike, spoilt, height):
    if alike:  # otherwise the two experts hardly ever fit together
        parts["action_expert"] = parts["paligemma"] | {"width": parts["action_expert"]["width"]}
    if spoilt is not None:
        fields = [(part, name) for part in parts.values() for name in part]
        part, name = fields[spoilt[0]]
        part[name] = spoilt[1]
    values = TINY.to_dict() | parts | {"image_resolution": [height, 48]}
    wrong = impossible(parts, height)
    if wrong:
        with pytest.raises(ConfigError) as error:
            ModelConfig.from_dict(values)
        assert any(name in str(error.value) for name in wrong)
    else:
        config = ModelConfig.from_dict(values)
        assert ModelConfig.from_dict(config.to_dict()) == config


def test_configs_of_version_0_1_are_read():
    """They had the fields of `runtime` among their own."""
    config = get_variant("tiny", dtype="bfloat16", num_steps=7)
    values = config.to_dict()
    flat = {name: value for name, value in values.items() if name != "runtime"} | values["runtime"]
    assert ModelConfig.from_dict(flat) == config
    with pytest.raises(ConfigError, match="unknown fields"):
        ModelConfig.from_dict(flat | {"runtime": values["runtime"]})


@pytest.mark.parametrize(
    "dtype", ["bfloat16", ml_dtypes.bfloat16, np.dtype(ml_dtypes.bfloat16), "jax.numpy:bfloat16", "torch:bfloat16"]
)
def test_dtypes_of_any_framework(dtype: Any):
    """In every config they become names, which JSON can hold."""
    if isinstance(dtype, str) and ":" in dtype:
        module, _, name = dtype.partition(":")
        dtype = getattr(pytest.importorskip(module), name)
    config = TINY.with_runtime(dtype=dtype)
    assert config == TINY.with_runtime(dtype="bfloat16") and ModelConfig.from_dict(config.to_dict()) == config
    data = DataConfig(robot="metaworld", asset_id="x")
    optimizer = OptimizerConfig(moments_dtype=dtype)
    run = RunConfig(config, data, optimizer=optimizer, frozen_dtype=dtype)
    assert RunConfig.from_dict(run.to_dict()) == run and run.frozen_dtype == "bfloat16"


@pytest.mark.parametrize("dtype", ["fp16", "torch.float16", np.float64, np.dtype("int8"), float, 16, None, ["float32"]])
def test_other_dtypes_are_refused(dtype: Any):
    for name in ("dtype", "frozen_dtype"):
        with pytest.raises(ConfigError, match=f"^{name} is .*; it must be one of float32, bfloat16"):
            canonical_dtype(dtype, name)
