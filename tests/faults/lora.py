"""Faults in LoRA's alpha and rank: the scale of its update, and the components of which it is a sum."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

import pi0_jax.models.gemma as jax_gemma
import pi0_torch.models.gemma as torch_gemma
from pi0.config import GemmaConfig
from pi0.parameters import parameters
from pi0.variants import get_variant
from tests.faults.mutation import Mutation, Weights

STAGES = {"paligemma": "prefix layer 0", "action_expert": "suffix layer 0"}


def lora(variant: str) -> Iterator[Mutation]:
    """Both experts', whose alpha over rank differ."""
    if variant != "tiny_lora":
        return
    config = get_variant(variant)
    yield from scales(variant, config.paligemma, config.action_expert)
    names = [name for name in parameters(config) if name.endswith(".lora.a")]
    for expert, stage in STAGES.items():
        ours = [name for name in names if name.startswith(expert)]
        yield Mutation(f"LoRA: rank one less, {expert}", variant, (stage,), weights=edit(ours, one_less))
        reverse = edit(ours, lambda x: x[..., ::-1].copy())
        yield Mutation(f"LoRA: a's ranks in reverse, {expert}", variant, (stage,), weights=reverse)


def scales(variant: str, paligemma: GemmaConfig, action_expert: Any) -> Iterator[Mutation]:
    """Other scales than alpha/rank, of attention's updates; and one for the MLP's, which have none."""
    first, second = STAGES.values()
    table: dict[str, tuple[Callable[[Any], float], str]] = {
        "alpha over the rank's root, as rsLoRA": (lambda c: c.lora_alpha / c.lora_rank**0.5, first),
        "alpha not over the rank": (lambda c: c.lora_alpha, first),
        "no alpha": (lambda c: 1.0, first),
        "no alpha over the rank": (lambda c: 1 / c.lora_rank, first),
        "the rank over alpha": (lambda c: c.lora_rank / c.lora_alpha, first),
        "the action expert's rank in both": (lambda c: c.lora_alpha / action_expert.lora_rank, first),
        "PaliGemma's rank in both": (lambda c: c.lora_alpha / paligemma.lora_rank, second),
        "PaliGemma's alpha in both": (lambda c: paligemma.lora_alpha / c.lora_rank, second),
    }
    for framework, gemma in (("torch", torch_gemma), ("jax", jax_gemma)):
        for name, (scale, stage) in table.items():
            one = (GemmaConfig, "lora_scale", property(scale))
            yield Mutation(f"LoRA: {name}", variant, (stage,), framework, patches=(one,))
        make = gemma.make_lora

        def scaled(config: Any, *args: Any, make: Any = make, scale: float, **more: Any) -> Any:
            return make(config, *args, scale=config.lora_scale, **more)

        one = (gemma, "make_lora", scaled)
        yield Mutation("LoRA: the MLP's scaled as attention's", variant, (first,), framework, patches=(one,))


def one_less(a: np.ndarray) -> np.ndarray:
    """Without the last component of the rank."""
    return np.concatenate([a[..., :-1], np.zeros_like(a[..., -1:])], axis=-1)


def edit(names: list[str], change: Callable[[np.ndarray], np.ndarray]) -> Callable[[Weights], Weights]:
    return lambda weights: weights | {name: change(weights[name]) for name in names}
