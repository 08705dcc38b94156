from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pi0.config import ConfigError
from pi0.run_config import DataConfig, OptimizerConfig, RunConfig
from pi0.variants import get_variant

BEFORE = Path(__file__).parents[1] / "written_before" / "run"


def made(model: str = "tiny", data: dict[str, Any] | None = None, **changes: Any) -> RunConfig:
    data = {"robot": "metaworld", "asset_id": "metaworld"} | (data or {})
    return RunConfig.from_dict({"model": get_variant(model).to_dict(), "data": data} | changes)


def test_json_there_and_back():
    mixture = [{"root": "a", "weight": 1}, {"root": "b", "weight": 2.5}]
    config = made("tiny_pi05", {"mixture": mixture, "action_tokenizer": "x"}, recipe={"flow_weight": 0})
    assert RunConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    assert config.recipe is not None and config.recipe.weights == {"text": 1, "fast": 1, "flow": 0}


def test_a_config_of_version_0_1_is_read():
    for file in (BEFORE / "config.json", BEFORE / "checkpoints/2/assets/config.json"):
        values = json.loads(file.read_text())
        config = RunConfig.from_dict(values.get("training", values))
        assert config.model == get_variant("tiny", max_token_len=24)
        assert (config.data.validation_episodes, config.batch_size, config.recipe) == ((3, 7, 11, 15), 4, None)


def test_normalization_is_the_familys_unless_given():
    assert made("tiny").data.normalization == "zscore" and made("tiny_pi05").data.normalization == "quantile"
    assert made(data={"normalization": "quantile01"}).data.normalization == "quantile01"


def test_a_mixture_is_merged_over_the_data():
    data = DataConfig("metaworld", "metaworld", root="a", mixture=({"weight": 3}, {"root": "b", "weight": 1.0}))
    first, second = data.sources
    assert (first.root, first.weight, second.root, second.weight) == ("a", 3.0, "b", 1.0)
    assert first.mixture == () and first.sources == (first,)
    alone = DataConfig("metaworld", "metaworld")
    assert alone.sources == (alone,)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"steps": "10"}, "^steps is '10'; it must be a whole number"),
        ({"steps": 0}, "^steps is 0; it must be positive"),
        ({"eval_every": -1}, "^eval_every is -1"),
        ({"export_every": -1}, "^export_every is -1"),
        ({"export_every": 1500}, "^export_every is 1500; it must be a multiple of save_every, 1000"),
        ({"ema_decay": "x"}, "^ema_decay is 'x'; it must be a number or None"),
        ({"ema_decay": 1.0}, "^ema_decay is 1.0"),
        ({"frozen_dtype": "int8"}, "^frozen_dtype is 'int8'"),
        ({"freeze": "("}, "freeze is .*regular expression"),
        ({"freeze": "lora"}, "lora_rank"),
        ({"optimizer": {"b2": 0.999, "moments_dtype": "bfloat16"}}, "optimizer.b2 is 0.999"),
        ({"optimizer": {"name": "adam"}}, "optimizer.name is 'adam'; it must be one of adamw, sgd"),
        ({"optimizer": {"schedule": "linear"}}, "optimizer.schedule is 'linear'"),
        (
            {"optimizer": {"name": "sgd", "clip_norm": 2.0}},
            "optimizer.clip_norm is 2.0; sgd with a cosine",
        ),
        ({"optimizer": {"schedule": "rsqrt", "decay_steps": 9}}, "optimizer.decay_steps is 9; adamw with a rsqrt"),
        ({"optimizer": {"momentum": 0.5}}, "optimizer.momentum is 0.5; adamw"),
        ({"optimizer": {"decay_steps": 1000}}, "optimizer.decay_steps is 1000; it must be more than the 1000"),
        ({"optimizer": {"lr": 1}}, r"optimizer has unknown fields \['lr'\]; known fields are .*peak_lr"),
        ({"optimizer": 3}, "optimizer is 3; it must be a table of fields"),
        ({"optimizer": {"warmup_steps": 30_000}}, "optimizer.warmup_steps is 30000; it must be less than the 30000"),
        ({"mesh": {"data": -1, "fsdp": -1}}, "mesh is .*one may be -1"),
        ({"mesh": {"data": 0}}, "mesh is .*at least 1"),
        ({"mesh": {"datas": 2}}, r"mesh has unknown fields \['datas'\]; known fields are \['data', 'fsdp', 'tensor'\]"),
        ({"recipe": {}}, "kind is pi0"),
        ({"data": {"robot": "metaworld"}}, r"data lacks the fields \['asset_id'\]"),
        ({"data": {"robot": 3, "asset_id": "x"}}, "data.robot is 3; it must be a string or a table of fields"),
        ({"data": {"robot": "x", "asset_id": ""}}, "data.asset_id is empty"),
        ({"data": {"robot": "x", "asset_id": "x", "workers": -1}}, "data.workers is -1"),
        ({"data": {"robot": "x", "asset_id": "x", "subtasks": "file"}}, "by a recipe only"),
        ({"data": {"robot": "x", "asset_id": "x", "state_in_prompt": False}}, "state_in_prompt is False"),
        ({"data": {"robot": "x", "asset_id": "x", "mixture": [{"mixture": []}]}}, r"mixture\[0\] has a mixture"),
        ({"nosuch": 1}, r"the config has unknown fields \['nosuch'\]; known fields are .*model"),
    ],
)
def test_what_cannot_be_is_refused_by_name(changes: dict[str, Any], said: str):
    with pytest.raises(ConfigError, match=said):
        RunConfig.from_dict(made().to_dict() | changes)


def test_moments_that_cannot_be_kept():
    with pytest.raises(ConfigError, match="moments_dtype is 'int8'"):
        OptimizerConfig(moments_dtype="int8")
