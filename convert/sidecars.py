"""Read and write the sidecar files of openpi's and LeRobot's checkpoints: configs, norm stats, processors.

openpi: `assets/<asset_id>/norm_stats.json`, and in PyTorch checkpoints a `config.json` of five fields. LeRobot:
`config.json`, `policy_preprocessor.json`, `policy_postprocessor.json` and their safetensors files, with only those
fields that every version since 0.4 supports.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from convert.formats.safetensors import read_safetensors, write_safetensors
from convert.tensors import Tensor
from pi0.assets import NORM_STATS, Assets, AssetsError, read_optional
from pi0.config import ConfigError, ModelConfig
from pi0.parameters import LayoutError
from pi0.robots.normalize import EPSILON, NormStats, load_norm_stats
from pi0.storage import below, require_below
from pi0.tokenizers.text import PALIGEMMA
from pi0.variants import GEMMA_2B, GEMMA_300M, SO400M, get_variant

GEMMAS = {"gemma_2b": GEMMA_2B, "gemma_300m": GEMMA_300M}
Step = tuple[str, dict[str, Any]]  # of a LeRobot processor: registered name, config

PREPROCESSOR = "policy_preprocessor.json"
FAST = "physical-intelligence/fast"
LEROBOT_MODES = {"MEAN_STD": "zscore", "QUANTILES": "quantile"}
LEROBOT_ASSET = "lerobot"  # the asset id of norm stats from its processors
_IMAGES, _STATE, _ACTION = "observation.images.", "observation.state", "action"
_TO_CPU: Step = ("device_processor", {"device": "cpu", "float_dtype": None})


# ---- reading --------------------------------------------------------------------------------------------------------


def read_model(folder: Path, kind: str) -> ModelConfig | None:
    """The model config in openpi's or LeRobot's `config.json`; None where there is none.

    Raises LayoutError for a config of another model family than that of the weights, `kind`, or with unknown values.
    """
    path, values = folder / "config.json", read_optional(folder, "config.json")
    if values is None or "paligemma_variant" not in values:
        return None
    if values.get("type", kind) != kind:
        raise LayoutError(f"{path} is of a {values['type']!r}, but its tensors are those of a {kind}")
    try:
        model = dataclasses.replace(get_variant(kind), paligemma=GEMMAS[values["paligemma_variant"]])
        if model.action_expert is not None:
            model = dataclasses.replace(model, action_expert=GEMMAS[values["action_expert_variant"]])
        if "type" not in values:  # openpi's
            return dataclasses.replace(model, action_dim=values["action_dim"], action_horizon=values["action_horizon"])
        features = values.get("input_features") or {}
        cameras = tuple(name.removeprefix(_IMAGES) for name, f in features.items() if f["type"] == "VISUAL")
        return dataclasses.replace(
            model,
            action_dim=values["max_action_dim"],
            action_horizon=values["chunk_size"],
            image_resolution=tuple(values["image_resolution"]),
            image_keys=cameras or model.image_keys,
            max_token_len=values["tokenizer_max_length"],
        ).with_runtime(num_steps=values.get("num_inference_steps", model.runtime.num_steps))
    except KeyError as error:
        raise LayoutError(f"{path} cannot be used: missing or unknown {error}") from error
    except (ConfigError, TypeError, AttributeError) as error:
        raise LayoutError(f"{path} cannot be used: {error}") from error


def unsaid_fields(folder: Path) -> tuple[str, ...]:
    """The fields of a model config that the `config.json` read by `read_model` does not have: openpi's, two."""
    values = read_optional(folder, "config.json") or {}
    return () if "paligemma_variant" not in values or "type" in values else ("max_token_len", "image_keys")


def norm_stats_files(folder: Path) -> dict[str, Path]:
    """All norm stats files of a checkpoint, by asset id, which may contain slashes. Raises AssetsError for links."""
    root = folder / "assets"
    found = {path.parent.relative_to(root).as_posix(): path for path in sorted(root.rglob(NORM_STATS))}
    for path in found.values():
        try:
            require_below(folder, path)
        except ValueError as error:
            raise AssetsError(str(error)) from error
    return found


def read_assets(folder: Path, model: ModelConfig, asset_id: str | None = None) -> Assets:
    """The assets of an openpi or LeRobot checkpoint, with the norm stats of `asset_id` (default: the only ones).

    Raises LayoutError for an unknown `asset_id` or an unsupported normalization of LeRobot's.
    """
    files = norm_stats_files(folder)
    if asset_id is None and len(files) == 1:
        (asset_id,) = files
    if asset_id is not None and asset_id in files:
        return Assets(model, load_norm_stats(files[asset_id]), asset_id, model.family.normalization)
    tokenizer = {"kind": "sentencepiece", "source": PALIGEMMA}
    processor = read_optional(folder, PREPROCESSOR)
    if processor is not None and asset_id in (None, LEROBOT_ASSET):
        try:
            stats, mode = _lerobot_stats(folder, processor)
        except (KeyError, TypeError, AttributeError, IndexError) as error:
            raise LayoutError(f"{folder / PREPROCESSOR} cannot be used: {error!r}") from error
        except LayoutError:
            raise
        except ValueError as error:
            raise LayoutError(f"{folder / PREPROCESSOR} cannot be used: {error}") from error
        return Assets(model, stats, LEROBOT_ASSET if stats else None, mode, tokenizer)
    if asset_id is not None:
        raise LayoutError(f"{folder} has no norm stats {asset_id!r}; it has {', '.join(files) or 'none'}")
    return Assets(model)


def _lerobot_stats(folder: Path, processor: dict[str, Any]) -> tuple[dict[str, NormStats] | None, str | None]:
    """The norm stats of a LeRobot preprocessor and their normalization mode; None where it has none."""
    step, *others = [s for s in processor["steps"] if s.get("registry_name") == "normalizer_processor"] or [{}]
    if others:
        raise LayoutError(f"{folder / PREPROCESSOR} has {1 + len(others)} normalizers; one is supported")
    if "state_file" not in step:
        return None, None
    modes = {step["config"]["norm_map"].get(name) for name in ("STATE", "ACTION")}
    if len(modes) > 1 or not modes <= LEROBOT_MODES.keys():
        raise LayoutError(f"{folder}: normalization {sorted(map(str, modes))}; known are {', '.join(LEROBOT_MODES)}")
    found: dict[str, dict[str, np.ndarray]] = {}
    for name, tensor in read_safetensors(below(folder, step["state_file"])).items():
        feature, _, field = name.rpartition(".")
        if field in NormStats.__dataclass_fields__:
            found.setdefault(feature, {})[field] = np.array(tensor.read(()))
    if not {_STATE, _ACTION} <= found.keys():
        raise LayoutError(f"{folder}: {step['state_file']} has no stats of {_STATE} and {_ACTION}")
    stats = {"state": NormStats(**found[_STATE]), "actions": NormStats(**found[_ACTION])}  # type: ignore[arg-type]
    return stats, LEROBOT_MODES[modes.pop()]


# ---- writing --------------------------------------------------------------------------------------------------------


def variants_of(model: ModelConfig) -> dict[str, str] | None:
    """The names of a model's two experts in openpi and LeRobot; None where they have no name for its sizes."""
    names = {gemma: name for name, gemma in GEMMAS.items()}
    experts = {"paligemma_variant": model.paligemma, "action_expert_variant": model.action_expert or GEMMA_300M}
    if model.vision != SO400M or not set(experts.values()) <= names.keys():
        return None
    return {field: names[expert] for field, expert in experts.items()}


def write_openpi(folder: Path, assets: Assets, dtype: np.dtype) -> None:
    """Write `config.json` like openpi's converter to PyTorch, for a model whose sizes have a name there."""
    variants = variants_of(assets.model)
    if variants is not None:
        model = assets.model
        sizes = {"action_dim": model.action_dim, "action_horizon": model.action_horizon}
        _write_json(folder / "config.json", {**sizes, **variants, "precision": dtype.name})


def write_lerobot(folder: Path, assets: Assets, dtype: np.dtype) -> None:
    """Write LeRobot's processors and, for a model whose sizes have a name there, its `config.json`.

    LeRobot divides by std + eps and by q99 − q01; openpi adds its epsilon to both, a difference of 1e-6 of a unit. The
    transforms of a robot adapter (`assets.robot`) are not included. Raises LayoutError for a normalization that LeRobot
    does not have.
    """
    model, stats = assets.model, assets.norm_stats
    dims = {
        name: len(stats[key].mean) if stats else model.action_dim
        for name, key in ((_STATE, "state"), (_ACTION, "actions"))
    }
    images = {f"{_IMAGES}{key}": _feature("VISUAL", 3, *model.image_resolution) for key in model.image_keys}
    inputs = {**images, _STATE: _feature("STATE", dims[_STATE])}
    outputs = {_ACTION: _feature("ACTION", dims[_ACTION])}
    modes = {mode: name for name, mode in LEROBOT_MODES.items()}
    mode = assets.normalization or model.family.normalization
    if mode not in modes:
        raise LayoutError(f"LeRobot has no normalization {mode!r}; it has {', '.join(modes)}")
    norm_map = {"VISUAL": "IDENTITY", "STATE": modes[mode], "ACTION": modes[mode]}
    variants = variants_of(model)
    if variants is not None:
        config: dict[str, Any] = {
            "type": model.kind,
            "input_features": inputs,
            "output_features": outputs,
            **variants,
            "dtype": dtype.name,
            "chunk_size": model.action_horizon,
            "n_action_steps": model.action_horizon,
            "max_state_dim": model.action_dim,
            "max_action_dim": model.action_dim,
            "image_resolution": list(model.image_resolution),
            "tokenizer_max_length": model.max_token_len,
            "normalization_mapping": norm_map,
        }
        if model.action_expert is not None:
            config["num_inference_steps"] = model.runtime.num_steps
        _write_json(folder / "config.json", config)
    normalizer = {"eps": EPSILON, "norm_map": norm_map}
    before: Step = ("normalizer_processor", {**normalizer, "features": inputs | outputs})
    after: Step = ("unnormalizer_processor", {**normalizer, "features": outputs})
    _write_processor(folder, "policy_preprocessor", _preprocessor(model, before), stats)
    _write_processor(folder, "policy_postprocessor", [after, _TO_CPU], stats)


def _preprocessor(model: ModelConfig, normalizer: Step) -> list[Step]:
    """The steps of LeRobot's preprocessor."""
    tokenizer = {
        "max_length": model.max_token_len,
        "task_key": "task",
        "padding_side": "right",
        "padding": "max_length",
        "truncation": True,
        "tokenizer_name": "google/paligemma-3b-pt-224",
    }
    steps: list[Step] = [("rename_observations_processor", {"rename_map": {}}), ("to_batch_processor", {})]
    text: list[Step] = [("tokenizer_processor", tokenizer)]
    if model.family.action_tokens:
        fast = {"trust_remote_code": True, "max_action_tokens": 256, "action_tokenizer_name": FAST}
        text.append(("action_tokenizer_processor", fast))
    if model.family.prompt == "text":
        return [*steps, ("pi0_new_line_processor", {}), *text, _TO_CPU, normalizer]
    return [*steps, normalizer, (f"{model.kind}_prepare_state_tokenizer_processor_step", {}), *text, _TO_CPU]


def _feature(feature: str, *shape: int) -> dict[str, Any]:
    return {"type": feature, "shape": list(shape)}


def _write_processor(folder: Path, name: str, steps: list[Step], stats: Mapping[str, NormStats] | None) -> None:
    """Write a LeRobot processor, with the norm stats of its (un)normalizer in a separate file."""
    entries: list[dict[str, Any]] = []
    for i, (step, config) in enumerate(steps):
        entry: dict[str, Any] = {"registry_name": step, "config": config}
        if step.endswith("normalizer_processor") and stats is not None:
            entry["state_file"] = f"{name}_step_{i}_{step}.safetensors"
            tensors = {
                f"{feature}.{field}": Tensor.of(values.astype(np.float32))
                for feature, key in ((_ACTION, "actions"), (_STATE, "state"))
                for field, values in sorted(stats[key].present().items())
            }
            write_safetensors(folder / entry["state_file"], tensors)
        entries.append(entry)
    _write_json(folder / f"{name}.json", {"name": name, "steps": entries})


def _write_json(path: Path, values: dict[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
