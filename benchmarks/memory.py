"""Memory of the released models' parameters and of their training state, counted from shapes: the table of README.

    python benchmarks/memory.py

GiB that are held from step to step, of a run's state as each framework makes it: parameters in bfloat16 to infer;
parameters in float32, Adam's two moments and the moving average to train all of them; bfloat16 parameters and the
adapters' float32 parameters and moments for LoRA (`freeze="lora"`, `frozen_dtype="bfloat16"`, no moving average).

    python benchmarks/memory.py --plan pi05 full     # or lora, sample

The whole of a step in JAX, as pi0-plan finds it for one GPU: with gradients and activations, for a batch of one at the
full model's shapes. It compiles for minutes, by the CPU's compiler, which overestimates.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import importlib
import math
from typing import Any

import jax
import torch

from pi0.run_config import DataConfig, RunConfig
from pi0.variants import get_variant
from pi0_jax.planning.plan import plan, prepare

MODELS = {"π0": "pi0", "π0.5": "pi05", "π0-FAST": "pi0_fast"}
DATA = DataConfig(robot="libero", asset_id="libero", root="nowhere")


TOPOLOGY = "gpu:1x80"
GIB = 2**30


def size(tree: Any) -> int:
    """Bytes of all arrays or tensors; the optimizer in PyTorch has its count as a number."""
    return sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(tree) if hasattr(x, "shape"))


def run_config(name: str, kind: str) -> RunConfig:
    """The run that trains all of a model ("full"), or openpi's adapters on each of its experts ("lora")."""
    model = get_variant(name)
    if kind != "lora":
        return RunConfig(model, DATA, batch_size=1)
    adapted = get_variant("pi0_lora")
    expert = None if model.action_expert is None else adapted.action_expert
    model = dataclasses.replace(model, paligemma=adapted.paligemma, action_expert=expert)
    return RunConfig(model, DATA, batch_size=1, freeze="lora", frozen_dtype="bfloat16", ema_decay=None)


def state(config: RunConfig, framework: str) -> Any:
    """The shapes of a run's state."""
    optimizers = importlib.import_module(f"pi0_{framework}.training.optimizer")
    training = importlib.import_module(f"pi0_{framework}.training.train")
    optimizer = optimizers.make_optimizer(config.optimizer, optimizers.make_schedule(config.optimizer, config.steps))
    if framework == "torch":
        return training.init_state(config, optimizer, None, torch.device("meta"))[1]
    return jax.eval_shape(functools.partial(training.init_state, config, optimizer))


def main() -> None:
    """Print the table, or a plan."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--plan", nargs=2, metavar=("VARIANT", "KIND"), help="KIND is full, lora or sample")
    args = parser.parse_args()
    if args.plan:
        name, kind = args.plan
        prepare([TOPOLOGY])
        found = plan(run_config(name, kind), TOPOLOGY, sampling=kind == "sample")
        held = sum(found.held.values())
        parts = [f"{b / GIB:.1f} GiB" for b in (held, found.temporaries, found.total)]
        print(f"{name}, {kind}: held {parts[0]}, gradients and activations {parts[1]}, in all {parts[2]}")
        return
    columns = ["full, JAX", "full, PyTorch", "LoRA, JAX", "LoRA, PyTorch"]
    print(f"| model | parameters | inference | {' | '.join(columns)} |\n|{'---|' * (3 + len(columns))}")
    for title, name in MODELS.items():
        states = {
            f"{kind}, {framework}": state(run_config(name, kind), framework)
            for kind in ("full", "lora")
            for framework in ("jax", "torch")
        }
        count = sum(math.prod(x.shape) for x in jax.tree.leaves(states["full, jax"]["params"]))
        gib = [f"{b / GIB:.1f} GiB" for b in (2 * count, *map(size, states.values()))]
        print(f"| {title} | {count / 1e9:.2f} B | {' | '.join(gib)} |")


if __name__ == "__main__":
    main()
