from __future__ import annotations

import dataclasses
import json

import hypothesis
import pytest
from hypothesis import strategies as st

from pi0.config import VARIANTS, ConfigError, GemmaConfig, ModelConfig, VisionConfig

TINY = ModelConfig.variant("tiny")


@pytest.mark.parametrize("name", list(VARIANTS))
def test_json_there_and_back(name: str):
    config = ModelConfig.variant(name)
    assert ModelConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_released_sizes():
    pi0, pi05, small = (ModelConfig.variant(name) for name in ("pi0", "pi05", "pi0_small"))
    assert (pi0.paligemma.width, pi0.action_expert.width, pi0.vision.width) == (2048, 1024, 1152)
    assert (pi0.image_tokens, pi0.max_token_len, pi05.max_token_len) == (256, 48, 200)
    assert pi0.prefix_len == 3 * 256 + 48
    assert (small.action_horizon, small.action_expert.width, small.num_steps, small.max_token_len) == (25, 512, 5, 32)
    assert (small.paligemma, small.vision) == (pi0.paligemma, pi0.vision)


def test_variant_with_changes():
    assert ModelConfig.variant("pi0", action_horizon=10).action_horizon == 10
    with pytest.raises(ConfigError, match=r"pi1.*pi0_small"):
        ModelConfig.variant("pi1")


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
    ],
)
def test_impossible_models_are_refused_with_a_reason(changes: dict, named: str):
    with pytest.raises(ConfigError, match=named):
        dataclasses.replace(TINY, **changes)


def test_impossible_parts_are_refused():
    with pytest.raises(ConfigError, match="num_heads"):
        VisionConfig(10, 1, 1, 3)
    with pytest.raises(ConfigError, match="num_kv_heads"):
        GemmaConfig(8, 1, 8, 4, 3, 8)
    with pytest.raises(ConfigError, match="odd"):
        GemmaConfig(8, 1, 8, 4, 1, 7)


@pytest.mark.parametrize(
    ("edit", "named"),
    [
        (lambda v: v | {"horizon": 3}, "horizon"),
        (lambda v: {k: x for k, x in v.items() if k != "vision"}, "vision"),
        (lambda v: v | {"vision": 3}, "vision"),
        (lambda v: v | {"paligemma": v["paligemma"] | {"size": 1}}, "size"),
    ],
)
def test_unknown_and_missing_fields(edit, named: str):
    with pytest.raises(ConfigError, match=named):
        ModelConfig.from_dict(edit(TINY.to_dict()))


@hypothesis.given(heads=st.integers(1, 9), kv_heads=st.integers(1, 9), head_dim=st.integers(1, 9))
def test_any_sizes_are_allowed_that_make_sense(heads: int, kv_heads: int, head_dim: int):
    possible = heads % kv_heads == 0 and head_dim % 2 == 0
    if possible:
        assert GemmaConfig(7, 1, 5, heads, kv_heads, head_dim).num_heads == heads
    else:
        with pytest.raises(ConfigError):
            GemmaConfig(7, 1, 5, heads, kv_heads, head_dim)
