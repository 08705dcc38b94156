"""Merge LoRA's low-rank updates into their kernels."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import numpy as np

from convert.tensors import Index, Tensor
from pi0.config import ModelConfig
from pi0.parameters import Parameter, lora_of, parameters


def merge_lora(config: ModelConfig, ours: Mapping[str, Tensor]) -> tuple[ModelConfig, dict[str, Tensor]]:
    """The config and parameters (lazily) of the equivalent model without LoRA: kernel + a·b × scale.

    Product, sum and result are float32, whatever the kernel's dtype: in openpi's runs it is bfloat16, and rounding to
    it would lose most of a small update. Cast the result to round it once. As in the forward pass (openpi `lora.py`),
    the update of attention's output projection sums over heads in both factors, and the MLP's updates are not scaled.
    """
    experts = lora_of(config)
    table = parameters(config)
    plain = dataclasses.replace(
        config,
        **{e: dataclasses.replace(getattr(config, e), lora_rank=None, lora_alpha=None) for e in experts},
    )
    merged = {}
    for name in parameters(plain):
        stem = name.removesuffix(".kernel")
        factors = [f"{stem}.lora.{x}" for x in "ab"]
        if factors[0] not in table:
            merged[name] = ours[name]
            continue
        scale = getattr(config, name.split(".")[0]).lora_scale if ".attention." in name else 1.0
        equation = _equation(*(table[n] for n in (*factors, name)))
        merged[name] = _merged(ours[name], ours[factors[0]], ours[factors[1]], equation, scale)
    return plain, merged


def _equation(a: Parameter, b: Parameter, kernel: Parameter) -> str:
    """The einsum equation of one layer's product of factors."""
    a_axes, b_axes, axes = ("".join(p.axes[1:]) for p in (a, b, kernel))  # without l
    if axes[0] in "nk":  # the output projection, which sums over the heads of b too
        b_axes = b_axes.replace(axes[0], "x")
    return f"{a_axes},{b_axes}->{axes}"


def _merged(kernel: Tensor, a: Tensor, b: Tensor, equation: str, scale: float) -> Tensor:
    def layer(index: int) -> np.ndarray:
        base, first, second = (t.read((index,)).astype(np.float32) for t in (kernel, a, b))
        return base + np.einsum(equation, first, second, optimize=True) * np.float32(scale)

    def read(index: Index) -> np.ndarray:
        chosen = index[0] if index else slice(None)
        if isinstance(chosen, int):
            return layer(chosen)
        return np.stack([layer(i) for i in range(kernel.shape[0])[chosen]])

    return dataclasses.replace(kernel, dtype=np.dtype(np.float32), read=read, anyhow=False)
