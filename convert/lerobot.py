"""Read the sidecar files of LeRobot's policies: `config.json` and the two processors with their norm stats.

Every setting is read, or known to change no action (training, execution, the hub), or refused by its name. What is
read is LeRobot's code of 0.6.1; policies of 0.3 have no processors, but norm stats among their weights.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from convert.formats.safetensors import read_safetensors
from convert.lerobot_settings import AFTER, ANY, FREE, INERT, ONLY, OPTIONAL, PROMPT_STEPS, READ, STEPS
from convert.tensors import Tensor
from pi0.assets import Assets, read_optional
from pi0.config import KINDS, ConfigError, GemmaConfig, ModelConfig
from pi0.parameters import LayoutError
from pi0.robots.normalize import LEROBOT_MODES, NormStats
from pi0.storage import below
from pi0.tokenizers.fast import FAST
from pi0.tokenizers.text import PALIGEMMA
from pi0.variants import GEMMA_2B, GEMMA_300M, get_variant

GEMMAS: dict[str, GemmaConfig] = {"gemma_2b": GEMMA_2B, "gemma_300m": GEMMA_300M}
ASSET_ID = "lerobot"  # of norm stats from its processors
IMAGES, STATE, ACTION = "observation.images.", "observation.state", "action"
PREPROCESSOR, POSTPROCESSOR = "policy_preprocessor", "policy_postprocessor"
PALIGEMMA_NAMES = re.compile(r"google/paligemma-3b-(pt|mix)-\d+")  # which share one text tokenizer
FAST_NAMES = {"physical-intelligence/fast": FAST}
BUFFERS = re.compile(r"(un)?normalize_(inputs|targets|outputs)\.buffer_(?P<feature>\w+)\.(?P<field>\w+)")  # of 0.3


class PolicySettingError(LayoutError):
    """A setting of a LeRobot policy that is not supported; the message has its file, name and value, and what to do."""


@dataclasses.dataclass(frozen=True)
class ProcessorStep:
    """A step of a processor: its settings, and the file of its tensors."""

    name: str
    config: dict[str, Any]
    state_file: str | None


# ---- config.json ----------------------------------------------------------------------------------------------------


def read_config(folder: Path) -> dict[str, Any] | None:
    """The settings in a LeRobot policy's `config.json`; None where it is none. Raises PolicySettingError."""
    values = read_optional(folder, "config.json")
    if values is None or values.get("type") not in KINDS:
        return None
    path = folder / "config.json"
    for name, value in values.items():
        if name in ONLY:
            wanted, why = ONLY[name]
            if value != wanted:
                raise _unsupported(path, name, value, f"only {wanted} is supported: {why}")
        elif name == "rtc_config":
            if value is not None and (not isinstance(value, dict) or value.get("enabled", True)):
                raise _unsupported(path, name, value, "real-time chunking is not applied here; set it to null")
        elif not (name in READ or INERT.fullmatch(name) or value in (None, False, "", [], {})):
            raise _unsupported(path, name, value, "this setting is unknown here")
    return values


def inert_settings(folder: Path) -> list[str]:
    """Notes on settings that are not used, of those that say how the policy is executed."""
    values = read_config(folder) or {}
    steps, chunk = values.get("n_action_steps"), values.get("chunk_size")
    return [] if steps in (None, chunk) else [f"n_action_steps {steps} of {chunk}: the whole chunk is returned here"]


def read_lerobot_model(folder: Path, kind: str) -> ModelConfig | None:
    """The model config that a LeRobot policy's files say; None where there is no `config.json` of LeRobot's.

    Raises LayoutError for a policy of another kind than `kind`, that of the weights, and for unknown values.
    """
    values = read_config(folder)
    if values is None:
        return None
    path = folder / "config.json"
    if values["type"] != kind:
        raise LayoutError(f"{path} is of a {values['type']!r}, but its tensors are those of a {kind}")
    try:
        model = dataclasses.replace(get_variant(kind), paligemma=_gemma(values, "paligemma_variant", "gemma_2b"))
        if model.action_expert is not None:
            model = dataclasses.replace(model, action_expert=_gemma(values, "action_expert_variant", "gemma_300m"))
        tokenizer = _settings(read_processor(folder, PREPROCESSOR, model), "tokenizer_processor")
        length = tokenizer.get("max_length", values["tokenizer_max_length"])
        runtime: dict[str, Any] = {"dtype": values.get("dtype", "float32")}
        changes: dict[str, Any] = {}
        if model.family.action_tokens:
            runtime["max_decoding_steps"] = values.get("max_decoding_steps", 256)
            length += runtime["max_decoding_steps"]  # the text is the prompt, and in training the actions
            changes["text_format"] = "lerobot"
        else:
            steps = values.get("num_inference_steps", values.get("num_steps", model.runtime.num_steps))
            runtime["num_steps"] = steps
            shortest, longest = model.time_periods
            periods = values.get("min_period", shortest), values.get("max_period", longest)
            changes["time_periods"] = tuple(float(period) for period in periods)
        resolution = values.get("image_resolution") or values.get("resize_imgs_with_padding") or (224, 224)
        state_dim, action_dim = values["max_state_dim"], values["max_action_dim"]
        return dataclasses.replace(
            model,
            action_dim=action_dim,
            state_dim=None if state_dim == action_dim else state_dim,
            action_horizon=values["chunk_size"],
            image_resolution=tuple(resolution),
            image_keys=tuple(_cameras(values)) or model.image_keys,
            max_token_len=length,
            **changes,
        ).with_runtime(**runtime)
    except KeyError as error:
        raise LayoutError(f"{path} cannot be used: missing or unknown {error}") from error
    except (ConfigError, TypeError, AttributeError) as error:
        raise LayoutError(f"{path} cannot be used: {error}") from error


def _gemma(values: Mapping[str, Any], name: str, default: str) -> GemmaConfig:
    return GEMMAS[values.get(name, default)]


def _cameras(values: Mapping[str, Any]) -> list[str]:
    """The model's cameras without its empty ones, which are always masked, so that leaving them out changes nothing."""
    features = values.get("input_features") or {}
    empty = {f"{IMAGES}empty_camera_{i}" for i in range(values.get("empty_cameras", 0))}
    visual = [name for name, feature in features.items() if feature["type"] == "VISUAL" and name not in empty]
    return [name.removeprefix(IMAGES) for name in visual]


def _unsupported(path: Path, name: str, value: Any, what: str) -> PolicySettingError:
    return PolicySettingError(
        f"{path}: {name} is {value!r:.200}; {what}. Convert the policy in LeRobot, or remove the setting from the file "
        "if it does not matter"
    )


# ---- processors -----------------------------------------------------------------------------------------------------


def read_processor(folder: Path, name: str, model: ModelConfig) -> list[ProcessorStep] | None:
    """The steps of a processor, all of them known, in a known order; None without its file. Raises LayoutError."""
    path, values = folder / f"{name}.json", read_optional(folder, f"{name}.json")
    if values is None:
        return None
    known = STEPS if name == PREPROCESSOR else AFTER
    steps = [_step(path, entry, known) for entry in values.get("steps", [])]
    prompt = ("rename_observations_processor", *PROMPT_STEPS[model.family.prompt])
    order = prompt if name == PREPROCESSOR else ("unnormalizer_processor", "absolute_actions_processor")
    found = [step.name for step in steps if step.name not in FREE]
    missing = [step for step in order if step not in found and step not in (*OPTIONAL, "action_tokenizer_processor")]
    if found != [step for step in order if step in found] or missing:
        raise PolicySettingError(
            f"{path} has the steps {found}; a policy of {model.family.title} has {list(order)}, in this order. Save "
            "the policy's own processors with LeRobot"
        )
    return steps


def _step(path: Path, entry: Mapping[str, Any], known: Mapping[str, dict[str, Any]]) -> ProcessorStep:
    """A known step with settings that are all read or supported."""
    name, config = entry.get("registry_name", entry.get("class")), entry.get("config") or {}
    if name not in known:
        raise PolicySettingError(
            f"{path} has the step {name!r}, which is unknown here; known are {', '.join(known)}. Remove it from the "
            "file if it changes nothing, or do what it does before `infer`"
        )
    for setting, value in config.items():
        if setting not in known[name]:
            if value not in (None, False, "", [], {}):
                raise _unsupported(path, f"{name}.{setting}", value, "this setting is unknown here")
        elif known[name][setting] not in (ANY, value):
            raise _unsupported(path, f"{name}.{setting}", value, f"only {known[name][setting]!r} is supported")
    return ProcessorStep(name, dict(config), entry.get("state_file"))


def _settings(steps: list[ProcessorStep] | None, name: str) -> dict[str, Any]:
    return next((step.config for step in steps or [] if step.name == name), {})


# ---- assets ---------------------------------------------------------------------------------------------------------


def read_lerobot_assets(folder: Path, model: ModelConfig, buffers: Mapping[str, Tensor] | None = None) -> Assets | None:
    """The assets that a LeRobot policy's files say, with a robot of their cameras and dimensions; None without them.

    `buffers` are norm stats among the weights (0.3). Raises LayoutError for unsupported settings.
    """
    values = read_config(folder) or {}
    before, after = (read_processor(folder, name, model) for name in (PREPROCESSOR, POSTPROCESSOR))
    if before is None and not buffers:
        return None
    path = folder / f"{PREPROCESSOR}.json"
    if before is None:
        features = {**values.get("input_features", {}), **values.get("output_features", {})}
        norm_map = values.get("normalization_mapping", {})
        normalizer = ProcessorStep("normalizer_processor", {"features": features, "norm_map": norm_map}, None)
        found = _buffered(buffers or {})
    else:
        normalizer = next(step for step in before if step.name == "normalizer_processor")
        found = _stats(folder, normalizer)
        _check_postprocessor(folder, normalizer, found, before, after)
    features = normalizer.config.get("features") or {}
    modes = _modes(path, normalizer)
    dims = {key: features[name]["shape"][0] for key, name in _KEYS.items() if name in features}
    stats = {key: _norm_stats(path, found.get(name), name, modes[key], dims.get(key)) for key, name in _KEYS.items()}
    known = {key: one for key, one in stats.items() if one is not None}
    text, actions = _tokenizers(path, values, before)
    return Assets(
        model,
        known if len(known) == len(_KEYS) else None,
        ASSET_ID if len(known) == len(_KEYS) else None,
        {**modes, "eps": float(normalizer.config.get("eps", 1e-8))},
        text,
        _robot(path, values, model, before, dims),
        action_tokenizer=actions if model.family.action_tokens else None,
    )


_KEYS = {"state": STATE, "actions": ACTION}


def _modes(path: Path, normalizer: ProcessorStep) -> dict[str, str]:
    """The normalization modes of state and actions."""
    norm_map, config = normalizer.config.get("norm_map") or {}, normalizer.config
    images = norm_map.get("VISUAL", "IDENTITY")
    if images != "IDENTITY":
        raise _unsupported(path, "norm_map.VISUAL", images, "images are not normalized by stats: only IDENTITY")
    modes = {}
    for key, feature in (("state", "STATE"), ("actions", "ACTION")):
        name = norm_map.get(feature, "IDENTITY")
        if name not in LEROBOT_MODES:
            known = ", ".join(LEROBOT_MODES)
            raise _unsupported(path, f"norm_map.{feature}", name, f"unknown normalization; known are {known}")
        modes[key] = LEROBOT_MODES[name]
    keys = config.get("normalize_observation_keys")
    if (keys is not None and STATE not in keys) or STATE not in (config.get("features") or {}):
        modes["state"] = "identity"
    return modes


def _norm_stats(
    path: Path, found: Mapping[str, np.ndarray] | None, name: str, mode: str, dims: int | None
) -> NormStats | None:
    """The stats of a feature; those of an identity may be missing, and then have no effect."""
    if found is not None and {"mean", "std"} <= found.keys():
        return NormStats(**{field: found[field] for field in NormStats.__dataclass_fields__ if field in found})
    if mode == "identity" and dims is not None:
        return NormStats(np.zeros(dims), np.ones(dims))
    if found is not None:
        raise LayoutError(f"{path}: the stats of {name} are {sorted(found)}; mean and std are needed")
    return None


def _stats(folder: Path, step: ProcessorStep) -> dict[str, dict[str, np.ndarray]]:
    """The statistics in the file of a normalizer, by feature."""
    found: dict[str, dict[str, np.ndarray]] = {}
    if step.state_file is not None:
        for name, tensor in read_safetensors(below(folder, step.state_file)).items():
            feature, _, field = name.rpartition(".")
            found.setdefault(feature, {})[field] = np.array(tensor.read(()))
        missing = sorted({STATE, ACTION} - found.keys()) if found else []
        modes = step.config.get("norm_map") or {}
        missing = [name for name in missing if modes.get(_TYPES[name], "IDENTITY") != "IDENTITY"]
        if missing:
            raise LayoutError(f"{folder}: {step.state_file} has no stats of {' and '.join(missing)}")
    return found


_TYPES = {STATE: "STATE", ACTION: "ACTION"}


def _buffered(buffers: Mapping[str, Tensor]) -> dict[str, dict[str, np.ndarray]]:
    """The statistics among the weights of a policy of LeRobot 0.3."""
    found: dict[str, dict[str, np.ndarray]] = {}
    names = {name.replace(".", "_"): name for name in (STATE, ACTION)}
    for name, tensor in buffers.items():
        match = BUFFERS.fullmatch(name)
        feature = names.get(match["feature"]) if match else None
        if match is None or feature is None:
            continue
        array = np.array(tensor.read(()), np.float32)
        known = found.setdefault(feature, {}).setdefault(match["field"], array)
        if not np.array_equal(known, array):
            raise LayoutError(f"{name} and another buffer of {feature} have different values")
    for fields in found.values():  # MIN_MAX has no others
        if "mean" not in fields and "min" in fields:
            fields["mean"], fields["std"] = (fields["min"] + fields["max"]) / 2, (fields["max"] - fields["min"]) / 2
    return found


def _check_postprocessor(
    folder: Path,
    normalizer: ProcessorStep,
    stats: Mapping[str, Mapping[str, np.ndarray]],
    before: list[ProcessorStep],
    after: list[ProcessorStep] | None,
) -> None:
    """Raise PolicySettingError unless the postprocessor undoes what the preprocessor does to actions."""
    path = folder / f"{POSTPROCESSOR}.json"
    if after is None:
        raise PolicySettingError(f"{path} is missing: save it beside {PREPROCESSOR}.json, with LeRobot")
    inverse = next(step for step in after if step.name == "unnormalizer_processor")
    own, others = normalizer.config, inverse.config
    pairs = {
        "eps": (own.get("eps", 1e-8), others.get("eps", 1e-8)),
        "norm_map.ACTION": tuple((c.get("norm_map") or {}).get("ACTION", "IDENTITY") for c in (own, others)),
        "enabled": (
            bool(_settings(before, "relative_actions_processor").get("enabled", False)),
            bool(_settings(after, "absolute_actions_processor").get("enabled", False)),
        ),
    }
    for name, (first, second) in pairs.items():
        if first != second:
            raise _unsupported(path, name, second, f"in {PREPROCESSOR}.json it is {first!r}: one must undo the other")
    theirs, ours = _stats(folder, dataclasses.replace(inverse, config={})).get(ACTION, {}), stats.get(ACTION, {})
    wrong = sorted(f for f in {*theirs, *ours} if not np.array_equal(theirs.get(f, ()), ours.get(f, ())))
    if wrong:
        raise PolicySettingError(
            f"{path}: the stats {', '.join(wrong)} of {ACTION} are not those of {PREPROCESSOR}.json; one must undo the "
            "other: save both processors with the same stats"
        )


def _tokenizers(
    path: Path, values: Mapping[str, Any], steps: list[ProcessorStep] | None
) -> tuple[dict[str, Any], dict[str, Any]]:
    """References to the tokenizers of text and of actions."""
    own = _settings(steps, "tokenizer_processor").get("tokenizer_name", values.get("text_tokenizer_name"))
    name = own or "google/paligemma-3b-pt-224"
    declared = values.get("text_tokenizer_name", name)
    if declared != name:
        raise _unsupported(path, "tokenizer_name", name, f"in config.json it is {declared!r}")
    source = name if "://" in name else f"hf://{name}/tokenizer.model"
    source = PALIGEMMA if PALIGEMMA_NAMES.fullmatch(name) else source
    own = _settings(steps, "action_tokenizer_processor").get("action_tokenizer_name")
    action = own or values.get("action_tokenizer_name", "lerobot/fast-action-tokenizer")
    return (
        {"kind": "sentencepiece", "source": source},
        {
            "kind": "fast",
            "source": action if "://" in action else FAST_NAMES.get(action, f"hf://{action}"),
            "sha256": None,
        },
    )


def _robot(
    path: Path,
    values: Mapping[str, Any],
    model: ModelConfig,
    steps: list[ProcessorStep] | None,
    dims: Mapping[str, int],
) -> dict[str, Any] | None:
    """A robot of the policy's own cameras and dimensions; None where its files do not say them."""
    cameras = _cameras(values)
    renames: dict[str, str] = _settings(steps, "rename_observations_processor").get("rename_map") or {}
    names = {f"{IMAGES}{camera}": camera for camera in cameras}
    for source, target in renames.items():
        if target not in names and source != target and target in (STATE, ACTION):
            raise _unsupported(path, f"rename_map[{source!r}]", target, "only cameras can be renamed")
    relative = _settings(steps, "relative_actions_processor")
    enabled = bool(relative.get("enabled", False))
    declared = values.get("use_relative_actions", enabled) if steps is not None else enabled
    if bool(declared) != enabled:
        raise _unsupported(path, "relative_actions_processor.enabled", enabled, f"in config.json it is {declared}")
    if not cameras or len(dims) < len(_KEYS):
        if enabled:
            raise _unsupported(path, "relative_actions_processor.enabled", True, "no file says the policy's dimensions")
        return None
    if len(cameras) > len(model.image_keys):
        what = f"the model has {len(model.image_keys)} cameras, {list(model.image_keys)}"
        raise _unsupported(path, "input_features", cameras, what)
    # The model's cameras are those of config.json, in order, by the names that `model` gives them.
    named = cameras if set(cameras) <= set(model.image_keys) else model.image_keys[: len(cameras)]
    keys = dict(zip(cameras, named, strict=True))
    renamed = {source.removeprefix(IMAGES): keys[names[t]] for source, t in renames.items() if names.get(t) in keys}
    own = {camera: key for camera, key in keys.items() if key not in renamed.values()}
    robot: dict[str, Any] = {"name": "generic", "cameras": renamed | own}
    robot |= {"state": [[0, dims["state"]]], "actions": [[0, dims["actions"]]]}
    if enabled:
        robot |= {"delta": True, "delta_dims": _runs(_relative_dims(relative, dims["actions"]))}
    return robot


def _relative_dims(config: Mapping[str, Any], action_dim: int) -> list[bool]:
    """Which actions are relative to the state (LeRobot `RelativeActionsProcessorStep._build_mask`)."""
    excluded = [str(name).lower() for name in config.get("exclude_joints") or [] if name]
    names = [str(name).lower() for name in (config.get("action_names") or [])[:action_dim]]
    mask = [not any(token in name for token in excluded) for name in names]
    return mask + [True] * (action_dim - len(mask))


def _runs(mask: list[bool]) -> list[int]:
    """The runs of `bool_mask`, without those at the end that are not set."""
    runs: list[int] = []
    for value in mask[: len(mask) - mask[::-1].index(True)] if any(mask) else []:
        if runs and (runs[-1] > 0) == value:
            runs[-1] += 1 if value else -1
        else:
            runs.append(1 if value else -1)
    return runs
