"""Merge an adapter of Hugging Face's PEFT, as LeRobot trains it, into the checkpoint of its base.

`adapter_config.json` names the base, `adapter_model.safetensors` has low-rank factors `<module>.lora_A.weight` [R, in]
and `<module>.lora_B.weight` [out, R] of its linear layers, and whole tensors of modules that were trained themselves.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from convert.formats.safetensors import read_safetensors
from convert.tensors import CheckpointError, Index, Tensor
from pi0.reading import read_json
from pi0.storage import below

ADAPTER, CONFIG = "adapter_model.safetensors", "adapter_config.json"
PREFIX = "base_model.model."
FACTOR = re.compile(r"(?P<module>.+)\.lora_(?P<part>[AB])\.weight")
FLOAT32 = np.dtype(np.float32)
# Settings that are read, or that only say what was trained and how; all others must be off.
KNOWN = {
    *("peft_type", "peft_version", "task_type", "auto_mapping", "base_model_name_or_path", "revision"),
    *("r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "target_modules", "exclude_modules", "bias"),
    *("lora_dropout", "layers_to_transform", "layers_pattern", "modules_to_save", "init_lora_weights"),
    *("inference_mode",),
}
INITIAL = (True, False, "gaussian", "orthogonal", "eva")  # which leave the base as it is


def adapter_config(folder: Path) -> dict[str, Any]:
    """The settings of a LoRA adapter. Raises CheckpointError for what cannot be merged, by its name."""
    try:
        values = read_json(below(folder, CONFIG), error=CheckpointError)
    except OSError as error:
        raise CheckpointError(f"{folder} has {ADAPTER} and no {CONFIG}: {error}") from error
    off: tuple[Any, ...] = (None, False, "", [], {})
    wrong = {name: value for name, value in values.items() if name not in KNOWN and value not in off}
    if values.get("peft_type") != "LORA":
        wrong["peft_type"] = values.get("peft_type")
    if values.get("init_lora_weights", True) not in INITIAL:
        wrong["init_lora_weights"] = values["init_lora_weights"]
    if wrong:
        name, value = next(iter(wrong.items()))
        raise CheckpointError(
            f"{folder / CONFIG}: {name} is {value!r:.200}, which is not supported: merge the adapter with PEFT "
            "(merge_and_unload) and save the whole policy"
        )
    return values


def base_of(folder: Path) -> str:
    """The address of the checkpoint that an adapter belongs to: a folder of this machine, or on the hub.

    Raises CheckpointError where its config does not name one.
    """
    values = adapter_config(folder)
    name, revision = values.get("base_model_name_or_path"), values.get("revision")
    if not isinstance(name, str) or not name:
        raise CheckpointError(f"{folder / CONFIG} does not name its base: set base_model_name_or_path")
    if "://" in name or Path(name).expanduser().exists():
        return name
    return f"hf://{name}" + (f"@{revision}" if revision else "")


def merge_adapter(folder: Path, base: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], str]:
    """The tensors of the base with the adapter's, read lazily, and a note.

    Sums are float32, and so is the result: in a narrower base, small updates would be lost. Raises CheckpointError for
    tensors that have no place in the base.
    """
    values, stored = adapter_config(folder), read_safetensors(below(folder, ADAPTER))
    tensors = dict(base)
    factors: dict[str, dict[str, Tensor]] = {}
    for full, tensor in stored.items():
        name = full.removeprefix(PREFIX)
        match = FACTOR.fullmatch(name)
        if match is not None:
            factors.setdefault(match["module"], {})[match["part"]] = tensor
        elif name in tensors and tensors[name].shape == tensor.shape:
            tensors[name] = tensor
        else:
            raise CheckpointError(f"{folder / ADAPTER}: the base has no place for {full} {list(tensor.shape)}")
    for module, parts in factors.items():
        kernel = tensors.get(f"{module}.weight")
        shapes = {part: tensor.shape for part, tensor in parts.items()}
        rank = next(iter(parts.values())).shape[0] if "A" in parts else 0
        if kernel is None or shapes != {"A": (rank, kernel.shape[-1]), "B": (kernel.shape[0], rank)}:
            found = None if kernel is None else list(kernel.shape)
            raise CheckpointError(f"{folder / ADAPTER}: {module} has factors {shapes}, in the base it is {found}")
        tensors[f"{module}.weight"] = _merged(kernel, parts["A"], parts["B"], _scale(values, module, rank))
    narrow = any(tensor.dtype.itemsize < FLOAT32.itemsize for tensor in tensors.values())
    width = ", all tensors widened to float32, so that no update is lost" if narrow else ""
    note = f"PEFT adapter of {len(factors)} layers merged into {values['base_model_name_or_path']}{width}"
    return {name: tensor.cast(FLOAT32) if narrow else tensor for name, tensor in tensors.items()}, note


def _scale(values: Mapping[str, Any], module: str, rank: int) -> float:
    """The factor of a module's update (PEFT `LoraLayer.update_layer`)."""
    alpha = values.get("lora_alpha", 8)
    for pattern, value in (values.get("alpha_pattern") or {}).items():
        if re.fullmatch(rf"(.*\.)?({pattern})", module):
            alpha = value
            break
    return float(alpha) / (math.sqrt(rank) if values.get("use_rslora") else rank)


def _merged(kernel: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """kernel + scale · b·a, float32. Computed whole, since sums of a part may round otherwise."""

    def read(index: Index) -> np.ndarray:
        base, first, second = (np.asarray(tensor.read(()), np.float32) for tensor in (kernel, a, b))
        return (base + second @ first * np.float32(scale))[index]

    return dataclasses.replace(kernel, dtype=FLOAT32, read=read)
