"""Memory of the released models' parameters and of their training state, counted from shapes: the table of README.

    python benchmarks/memory.py

GiB that are held from step to step: parameters in bfloat16 to infer, in either framework; parameters in float32, Adam's
two moments and the moving average to train all of them; bfloat16 parameters and the adapters' float32 parameters and
moments for LoRA (`freeze="lora"`, `frozen_dtype="bfloat16"`, no moving average). Gradients and activations come on top:
pi0-plan compiles the step and says how much.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import jax

from pi0.config import ModelConfig
from pi0.run_config import DataConfig, RunConfig
from pi0.variants import get_variant
from pi0_jax.training.optimizer import make_optimizer, make_schedule
from pi0_jax.training.train import init_state

MODELS = {"π0": "pi0", "π0.5": "pi05", "π0-FAST": "pi0_fast"}
DATA = DataConfig(robot="libero", asset_id="libero", root="nowhere")


def size(tree: Any) -> int:
    """Bytes of all arrays."""
    return sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(tree))


def training_state(model: ModelConfig, **fields: Any) -> Any:
    """The shapes of a run's state."""
    config = RunConfig(model, DATA, **fields)
    optimizer = make_optimizer(config.optimizer, make_schedule(config.optimizer, config.steps))
    return jax.eval_shape(functools.partial(init_state, config, optimizer))


def with_lora(model: ModelConfig) -> ModelConfig:
    """With openpi's adapters on each expert that the model has."""
    adapted = get_variant("pi0_lora")
    expert = None if model.action_expert is None else adapted.action_expert
    return dataclasses.replace(model, paligemma=adapted.paligemma, action_expert=expert)


def main() -> None:
    """Print the table."""
    print("| model | parameters | inference | full fine-tuning | LoRA fine-tuning |\n|---|---|---|---|---|")
    for title, name in MODELS.items():
        model = get_variant(name)
        full = training_state(model)
        lora = training_state(with_lora(model), freeze="lora", frozen_dtype="bfloat16", ema_decay=None)
        count = sum(math.prod(x.shape) for x in jax.tree.leaves(full["params"]))
        gib = [f"{b / 2**30:.1f} GiB" for b in (2 * count, size(full), size(lora))]
        print(f"| {title} | {count / 1e9:.2f} B | {' | '.join(gib)} |")


if __name__ == "__main__":
    main()
