"""Initialize parameters that a source checkpoint does not have: an action expert, LoRA."""

from __future__ import annotations

import dataclasses
import math
import zlib
from collections.abc import Mapping

import numpy as np

from convert.tensors import Index, Tensor
from pi0 import numerics
from pi0.config import ModelConfig
from pi0.families import FAMILIES
from pi0.parameters import lora_of, parameters


def source_config(model: ModelConfig, kind: str, lora: tuple[str, ...], vocab_size: int) -> ModelConfig:
    """The config of a source of `kind` with LoRA in the experts `lora`: `model` without a new expert and new LoRA."""
    changes = {
        name: dataclasses.replace(getattr(model, name), lora_rank=None, lora_alpha=None)
        for name in lora_of(model)
        if name not in lora
    }
    if model.action_expert is not None and "action_expert" not in FAMILIES[kind].experts:
        changes |= {"kind": kind, "action_expert": None}
    return dataclasses.replace(model, vocab_size=max(vocab_size, model.vocab_size), **changes)


def with_fresh(model: ModelConfig, found: Mapping[str, Tensor], seed: int) -> tuple[dict[str, Tensor], list[str]]:
    """All parameters of `model`, from `found` or newly initialized (float32), and the names of the latter.

    Initialized like `pi0_jax` models, in NumPy from the seed and the parameter's name: kernels from a normal
    distribution truncated at 2, divided by sqrt(fan-in); LoRA's factors from a normal one of
    `numerics.LORA_INIT_STDDEV`; biases, norms and modulations zero. Embedding rows beyond the vocabulary are dropped.
    """
    ours: dict[str, Tensor] = {}
    new = []
    for name, parameter in parameters(model).items():
        if name in found:
            ours[name] = _cut(found[name], parameter.shape[0]) if name == "paligemma.embedding" else found[name]
            continue
        new.append(name)
        ours[name] = _initialized(name, parameter.axes, parameter.shape, seed)
    return ours, new


def _initialized(name: str, axes: tuple[str, ...], shape: tuple[int, ...], seed: int) -> Tensor:
    def read(index: Index) -> np.ndarray:
        if ".modulation." in name or not (".lora." in name or name.endswith(".kernel")):
            return np.zeros(shape, np.float32)[index]
        rng = np.random.default_rng((seed, zlib.crc32(name.encode())))
        values = rng.standard_normal(shape, np.float32)
        if ".lora." in name:
            return (values * np.float32(numerics.LORA_INIT_STDDEV))[index]
        while (outside := np.abs(values) > 2).any():
            values[outside] = rng.standard_normal(int(outside.sum()), np.float32)
        inputs = ("n", "h") if name.endswith(".attention.out.kernel") else axes[axes[0] == "l" :][:1]
        size = math.prod(n for a, n in zip(axes, shape, strict=True) if a in inputs)
        return (values / np.float32(math.sqrt(size)))[index]

    return Tensor(shape, np.dtype(np.float32), read, anyhow=True)


def _cut(tensor: Tensor, rows: int) -> Tensor:
    """The first rows of a tensor."""
    if tensor.shape[0] == rows:
        return tensor

    def read(index: Index) -> np.ndarray:
        first = index[0] if index else slice(None)
        return tensor.read((slice(*first.indices(rows)) if isinstance(first, slice) else first, *index[1:]))

    return dataclasses.replace(tensor, shape=(rows, *tensor.shape[1:]), read=read)
