from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pi0.config import ConfigError
from pi0.quantization import FORMATS, QuantizationConfig

LAYERS = ("vision.layers.0.mlp.up", "paligemma.layers.0.mlp.down", "paligemma.embedding", "action_out_proj")


def test_a_file_is_read_as_it_was_written(tmp_path: Path):
    config = QuantizationConfig({"*": "int4", "vision.*": "bfloat16"}, 64, {"action_out_proj": 2.5})
    config.save(tmp_path / "q.json")
    assert QuantizationConfig.of(str(tmp_path / "q.json")) == config
    assert list(QuantizationConfig.load(tmp_path / "q.json").layers) == ["*", "vision.*"]  # their order counts
    assert QuantizationConfig.of(config) is config
    assert [QuantizationConfig.of(name).layers for name in FORMATS] == [{"*": name} for name in FORMATS]


def test_the_last_pattern_counts_and_others_stay_wide():
    first = QuantizationConfig({"vision.*": "int4", "*.mlp.*": "int8"}).formats(LAYERS)
    assert list(first.values()) == ["int8", "int8", "wide", "wide"]
    second = QuantizationConfig({"*.mlp.*": "int8", "vision.*": "int4", "paligemma.embedding": "float8"}).formats(
        LAYERS
    )
    assert list(second.values()) == ["int4", "int8", "float8", "wide"]


def test_a_vocabulary_has_no_inputs_to_round():
    ranges = {name: 1.0 for name in LAYERS if name != "paligemma.embedding"}
    formats = QuantizationConfig({"*": "w8a8"}, input_ranges=ranges).formats(LAYERS)
    assert formats == dict.fromkeys(LAYERS, "w8a8") | {"paligemma.embedding": "int8"}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"layers": {}}, "layers is empty"),
        ({"layers": {"*": "int3"}}, r"layers\['\*'\] is 'int3'; it must be one of wide, bfloat16, int8"),
        ({"layers": {"*": 8}}, "is 8; it must be one of"),
        ({"layers": {"*": "int4"}, "group_size": 5}, "group_size is 5; it must be even"),
        ({"layers": {"*": "int4"}, "group_size": "32"}, "group_size is '32'; it must be a whole number"),
        ({"layers": {"*": "w8a8"}, "input_ranges": {"a": 0}}, r"input_ranges\['a'\] is 0; it must be a number above 0"),
        ({"layers": {"*": "w8a8"}, "input_ranges": {"a": "b"}}, "is 'b'; it must be a number above 0"),
        ({"layers": ["int8"]}, "layers is .*; it must be"),
        ({"layers": {"*": "int8"}, "groups": 32}, r"unknown fields \['groups'\]"),
        ({}, r"lacks the fields \['layers'\]"),
    ],
)
def test_what_a_file_must_not_say(values: dict[str, Any], message: str, tmp_path: Path):
    (tmp_path / "q.json").write_text(json.dumps(values))
    with pytest.raises(ConfigError, match=message) as raised:
        QuantizationConfig.load(tmp_path / "q.json")
    assert str(tmp_path / "q.json") in str(raised.value)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (QuantizationConfig({"vision.layer.*": "int8"}), r"'vision\.layer\.\*' matches none of the model's 4 layers"),
        (QuantizationConfig({"*": "w8a8"}), r"needs the range of the inputs of vision\.layers\.0\.mlp\.up and 2 more"),
        (QuantizationConfig({"*": "int8"}, input_ranges={"vision.head": 1.0}), r"input_ranges has \['vision\.head'\]"),
    ],
)
def test_what_does_not_fit_a_model(config: QuantizationConfig, message: str):
    with pytest.raises(ConfigError, match=message):
        config.formats(LAYERS)


def test_neither_a_format_nor_a_file():
    with pytest.raises(ConfigError, match="quantization is 'int7'; it must be one of wide"):
        QuantizationConfig.of("int7")
