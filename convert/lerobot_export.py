"""Write the sidecar files of a LeRobot policy: `config.json` and the two processors with their norm stats."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from convert.formats.safetensors import write_safetensors
from convert.lerobot import ACTION, FAST_NAMES, GEMMAS, IMAGES, POSTPROCESSOR, PREPROCESSOR, STATE
from convert.tensors import Tensor
from pi0.assets import Assets
from pi0.config import ModelConfig
from pi0.parameters import LayoutError
from pi0.robots.normalize import EPSILON, LEROBOT_MODES, NormStats, modes_of
from pi0.robots.registry import make_robot
from pi0.robots.robot import Robot
from pi0.tokenizers.fast import FAST
from pi0.tokenizers.text import PALIGEMMA
from pi0.variants import GEMMA_300M, SO400M

Step = tuple[str, dict[str, Any]]  # of a processor: registered name, config
TO_CPU: Step = ("device_processor", {"device": "cpu", "float_dtype": None})
OPENPI_MODES = {"zscore": "MEAN_STD", "quantile": "QUANTILES"}  # which differ by an epsilon of 1e-6
RELATIVE, ABSOLUTE = "relative", "absolute"  # names that the relative actions' step tells apart


def variants_of(model: ModelConfig) -> dict[str, str] | None:
    """The names of a model's two experts in openpi and LeRobot; None where they have no name for its sizes."""
    names = {gemma: name for name, gemma in GEMMAS.items()}
    experts = {"paligemma_variant": model.paligemma, "action_expert_variant": model.action_expert or GEMMA_300M}
    if model.vision != SO400M or not set(experts.values()) <= names.keys():
        return None
    return {field: names[expert] for field, expert in experts.items()}


def check_lerobot(assets: Assets) -> list[str]:
    """Notes on what LeRobot does otherwise with a policy. Raises LayoutError for what it cannot do."""
    model, notes = assets.model, []
    _norm_map(assets)
    if variants_of(model) is None:
        notes.append("LeRobot has no name for these sizes: its config.json says gemma_2b and gemma_300m")
    if model.family.action_tokens and model.text_format != "lerobot":
        notes.append(
            "LeRobot writes a <bos> after the prompt, skips no position and keeps the prompt's case, unlike what this "
            f"{model.family.title} was trained with: fine-tune it there before use"
        )
    robot = _robot(assets)
    if robot is not None and any(
        getattr(type(robot), name) is not getattr(Robot, name)
        for name in ("adapt_state", "adapt_actions", "restore_actions", "adapt_images")
    ):
        notes.append(f"LeRobot has no step for the units of the robot {assets.robot!r:.80}: convert its data to ours")
    if assets.subtasks:
        notes.append("LeRobot's policy generates no subtasks")
    if not assets.state_in_prompt and model.family.prompt == "state":
        raise LayoutError("LeRobot's π0.5 has the state in the prompt, this model's prompt has none: it cannot run it")
    for name in (_text_name(assets), _fast_name(assets)):
        if "/" not in name.partition("://")[2] and "://" in name:
            notes.append(f"LeRobot cannot load the tokenizer {name}: override the processors' tokenizer_name there")
    return notes


def write_lerobot(folder: Path, assets: Assets, dtype: np.dtype) -> None:
    """Write LeRobot's `config.json` and processors. Raises LayoutError for a normalization that LeRobot lacks.

    The modes of openpi become those of LeRobot with openpi's epsilon, which LeRobot adds to fewer terms: a difference
    of 1e-6 of a unit.
    """
    model, stats = assets.model, assets.norm_stats
    norm_map, eps = _norm_map(assets)
    relative = _relative(assets)
    dims = {
        name: len(stats[key].mean) if stats else size
        for name, key, size in ((STATE, "state", model.state_size), (ACTION, "actions", model.action_dim))
    }
    images = {f"{IMAGES}{key}": _feature("VISUAL", 3, *model.image_resolution) for key in model.image_keys}
    inputs = {**images, STATE: _feature("STATE", dims[STATE])}
    outputs = {ACTION: _feature("ACTION", dims[ACTION])}
    config: dict[str, Any] = {
        "type": model.kind,
        "input_features": inputs,
        "output_features": outputs,
        **(variants_of(model) or {"paligemma_variant": "gemma_2b", "action_expert_variant": "gemma_300m"}),
        "dtype": dtype.name,
        "chunk_size": model.action_horizon,
        "n_action_steps": model.action_horizon,
        "max_state_dim": model.state_size,
        "max_action_dim": model.action_dim,
        "image_resolution": list(model.image_resolution),
        "tokenizer_max_length": _prompt_length(model),
        "normalization_mapping": norm_map,
        "use_relative_actions": relative["enabled"],
        "relative_exclude_joints": relative["exclude_joints"],
        "action_feature_names": relative["action_names"],
    }
    if model.action_expert is not None:
        shortest, longest = model.time_periods
        config |= {"num_inference_steps": model.runtime.num_steps, "min_period": shortest, "max_period": longest}
    else:
        config |= {
            "max_action_tokens": model.runtime.max_decoding_steps,
            "max_decoding_steps": model.runtime.max_decoding_steps,
            "text_tokenizer_name": _text_name(assets),
            "action_tokenizer_name": _fast_name(assets),
        }
    _write_json(folder / "config.json", config)
    normalizer = {"eps": eps, "norm_map": norm_map}
    before: Step = ("normalizer_processor", {**normalizer, "features": inputs | outputs})
    after: Step = ("unnormalizer_processor", {**normalizer, "features": outputs})
    absolute: Step = ("absolute_actions_processor", {"enabled": relative["enabled"]})
    _write_processor(folder, PREPROCESSOR, _preprocessor(assets, before, relative), stats)
    _write_processor(folder, POSTPROCESSOR, [after, absolute, TO_CPU], stats)


def _preprocessor(assets: Assets, normalizer: Step, relative: dict[str, Any]) -> list[Step]:
    """The steps of LeRobot's preprocessor."""
    model = assets.model
    tokenizer = {
        "max_length": _prompt_length(model),
        "task_key": "task",
        "padding_side": "right",
        "padding": "max_length",
        "truncation": True,
        "tokenizer_name": _text_name(assets),
    }
    names: Step = ("rename_observations_processor", {"rename_map": _renames(assets)})
    steps: list[Step] = [names, ("to_batch_processor", {})]
    text: list[Step] = [("tokenizer_processor", tokenizer)]
    delta: Step = ("relative_actions_processor", relative)
    if model.family.action_tokens:
        fast = {
            "trust_remote_code": True,
            "max_action_tokens": model.runtime.max_decoding_steps,
            "action_tokenizer_name": _fast_name(assets),
        }
        text.append(("action_tokenizer_processor", fast))
    if model.family.prompt == "text":
        return [*steps, ("pi0_new_line_processor", {}), *text, TO_CPU, delta, normalizer]
    prepare: Step = (f"{model.kind}_prepare_state_tokenizer_processor_step", {})
    return [*steps, delta, normalizer, prepare, *text, TO_CPU]


def _norm_map(assets: Assets) -> tuple[dict[str, str], float]:
    """The normalization of each type of feature, and the epsilon."""
    modes, eps = modes_of(assets.normalization or assets.model.family.normalization)
    known = {mode: name for name, mode in LEROBOT_MODES.items()} | OPENPI_MODES
    unknown = sorted(mode for mode in modes.values() if mode not in known)
    if unknown:
        raise LayoutError(f"LeRobot has no normalization {unknown[0]!r}; it has {', '.join(known)}")
    kinds = {mode in OPENPI_MODES for mode in modes.values() if mode != "identity"}
    if len(kinds) > 1:
        raise LayoutError(f"LeRobot has one epsilon for state and actions; normalization {modes} has two")
    return (
        {"VISUAL": "IDENTITY", "STATE": known[modes["state"]], "ACTION": known[modes["actions"]]},
        EPSILON if kinds == {True} else eps,
    )


def _prompt_length(model: ModelConfig) -> int:
    """The tokens of the prompt; see `read_lerobot_model`."""
    actions = model.runtime.max_decoding_steps if model.format.bos_after_prompt else 0
    return max(model.max_token_len - actions, 1)


def _robot(assets: Assets) -> Robot | None:
    return None if assets.robot is None else make_robot(assets.robot, imports=False)


def _relative(assets: Assets) -> dict[str, Any]:
    """The settings of the relative actions' step, which tells actions apart by their names."""
    robot = _robot(assets)
    off: dict[str, Any] = {"enabled": False, "exclude_joints": ["gripper"], "action_names": None}
    if robot is None or robot.delta_mask is None:
        return off
    mask = [*robot.delta_mask, *[False] * (robot.action_dim - len(robot.delta_mask))]
    names = [f"{RELATIVE if relative else ABSOLUTE}_{i}" for i, relative in enumerate(mask)]
    return {"enabled": True, "exclude_joints": [ABSOLUTE], "action_names": names}


def _renames(assets: Assets) -> dict[str, str]:
    """The robot's cameras whose names are not the model's."""
    robot = _robot(assets)
    cameras = {} if robot is None else robot.cameras
    return {f"{IMAGES}{name}": f"{IMAGES}{key}" for name, key in cameras.items() if name != key}


def _text_name(assets: Assets) -> str:
    """The name of the text tokenizer, in LeRobot where it has one, else its address."""
    source = (assets.tokenizer or {}).get("source", PALIGEMMA)
    if source == PALIGEMMA:
        return "google/paligemma-3b-pt-224"
    return source.removeprefix("hf://").removesuffix("/tokenizer.model") if source.startswith("hf://") else source


def _fast_name(assets: Assets) -> str:
    """The name of the action tokenizer, in LeRobot where it has one, else its address."""
    source = (assets.action_tokenizer or {}).get("source", FAST)
    names = {address: name for name, address in FAST_NAMES.items()}
    return names.get(source, source.removeprefix("hf://"))


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
                for feature, key in ((ACTION, "actions"), (STATE, "state"))
                for field, values in sorted(stats[key].present().items())
            }
            write_safetensors(folder / entry["state_file"], tensors)
        entries.append(entry)
    _write_json(folder / f"{name}.json", {"name": name, "steps": entries})


def _write_json(path: Path, values: dict[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
