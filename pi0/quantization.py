"""Which weights of a model are quantized, and to what: a table of patterns of layers' names, in a JSON file.

A layer is a matrix product of the sampler, named as the model names it, with those that run as one product in one name:
`vision.layers.3.mlp.up`, `paligemma.layers.0.attention.qkv`, `action_expert.layers.7.mlp.gate_up`, `action_out_proj`.
"""

from __future__ import annotations

import dataclasses
import fnmatch
import json
from collections.abc import Iterable, Mapping
from pathlib import Path

from pi0.config import ConfigError, from_dict
from pi0.reading import naming, read_json
from pi0.storage import write_text

WIDE = "wide"
FORMATS = {
    WIDE: "as it is, in the dtype that the sampler computes in",
    "bfloat16": "rounded to bfloat16",
    "int8": "int8, a scale for each output channel",
    "int4": "int4, a scale for each group of inputs of each output channel",
    "float8": "float8 (e4m3), a scale for each output channel",
    "w8a8": "int8, and inputs rounded to int8 with one scale from calibration: multiplied as whole numbers",
    "w8a8_float8": "float8, and inputs rounded to float8 with one scale from calibration: multiplied in float8",
}
CALIBRATED = {"w8a8": "int8", "w8a8_float8": "float8"}  # which need `input_ranges`, and the format of their weights
LOOKED_UP = ("paligemma.embedding", "paligemma.output")  # a vocabulary


@dataclasses.dataclass(frozen=True)
class QuantizationConfig:
    """Attributes:
    layers: from patterns of layers' names (`*` matches any characters) to a format of FORMATS; of several patterns that
        match a layer the last counts, and a layer that none matches stays wide.
    group_size: the inputs that share a scale in int4.
    input_ranges: the largest absolute value of each calibrated layer's inputs, by the layer's name.

    Raises ConfigError for what is unknown or impossible.
    """

    layers: Mapping[str, str]
    group_size: int = 32
    input_ranges: Mapping[str, float] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.layers:
            raise ConfigError("quantization: layers is empty; give a pattern and a format, such as {'*': 'int8'}")
        for pattern, format in self.layers.items():
            if format not in FORMATS:
                raise ConfigError(f"quantization: layers[{pattern!r}] is {format!r}; it must be one of {known()}")
        if self.group_size < 2 or self.group_size % 2:
            raise ConfigError(f"quantization: group_size is {self.group_size}; it must be even and at least 2")
        for name, value in self.input_ranges.items():
            if type(value) not in (int, float) or not 0 < value < float("inf"):
                raise ConfigError(f"quantization: input_ranges[{name!r}] is {value!r}; it must be a number above 0")

    @classmethod
    def of(cls, given: QuantizationConfig | str | Path) -> QuantizationConfig:
        """A config as it is, that of a format for all layers by the format's name, or that of a JSON file.

        Raises ConfigError, and OSError for a missing file.
        """
        if isinstance(given, QuantizationConfig):
            return given
        if str(given) in FORMATS:
            return cls({"*": str(given)})
        if not str(given).endswith(".json"):
            raise ConfigError(f"quantization is {str(given)!r}; it must be one of {known()}, or a .json file")
        return cls.load(Path(given))

    @classmethod
    def load(cls, file: Path) -> QuantizationConfig:
        """The config in a JSON file. Raises ConfigError or OSError."""
        with naming(file):
            return from_dict(cls, read_json(file, error=ConfigError), "quantization")

    def save(self, file: Path) -> None:
        """Write it as a JSON file."""
        write_text(file, json.dumps(dataclasses.asdict(self), indent=2) + "\n")

    def formats(self, names: Iterable[str]) -> dict[str, str]:
        """The format of each of a model's layers; of a vocabulary, which has no inputs to round, that of its weights.

        Raises ConfigError for a pattern or a range that matches none of them, and a calibrated format without a range.
        """
        found = dict.fromkeys(names, WIDE)
        for pattern, format in self.layers.items():
            matches = [name for name in found if fnmatch.fnmatchcase(name, pattern)]
            if not matches:
                raise ConfigError(
                    f"quantization: the pattern {pattern!r} matches none of the model's {len(found)} layers, which are "
                    f"named like {', '.join(list(found)[:: max(1, len(found) // 6)])}"
                )
            found |= dict.fromkeys(matches, format)
        if unknown := sorted(self.input_ranges.keys() - found.keys()):
            raise ConfigError(f"quantization: input_ranges has {unknown[:5]}, which the model does not have")
        found |= {name: CALIBRATED.get(found[name], found[name]) for name in LOOKED_UP if name in found}
        missing = [name for name, format in found.items() if format in CALIBRATED and name not in self.input_ranges]
        if missing:
            raise ConfigError(
                f"quantization: {found[missing[0]]} needs the range of the inputs of {missing[0]} and "
                f"{len(missing) - 1} more: pi0-quantize-report calibrates them on a dataset and writes the config"
            )
        return found


def known() -> str:
    """The formats' names."""
    return ", ".join(FORMATS)
