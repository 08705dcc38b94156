"""How far apart bfloat16 runs of one model are: JAX and PyTorch, and either with its sums in another order.

    python benchmarks/rounding.py                                   random models of 3 and of 18 layers, 20 seeds
    python benchmarks/rounding.py --checkpoint runs/demo/export     a trained model, 20 seeds of its inputs
    python benchmarks/rounding.py --place residual=compute --place action_residual=compute      as openpi rounds

Relative L2, median and worst over the seeds, each of which has its own weights and inputs. Columns: how far each side
is from float32; JAX from PyTorch as `jax.jit` compiles by default, where XLA may leave roundings out, and without that
leave; and the floor: each side from itself with the model's hidden channels permuted, which is the same function and
adds the same products up in another order. 15 minutes on two cores.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from convert.checkpoints import Checkpoint, open_checkpoint
from convert.layouts.registry import LAYOUTS
from convert.tensors import Tensor
from pi0 import numerics
from pi0.assets import Assets
from pi0.config import GemmaConfig, ModelConfig, VisionConfig
from pi0.parameters import Parameter, parameters, scope_of
from pi0.variants import get_variant
from pi0_eval.parity import frameworks
from pi0_eval.parity.compare import errors
from pi0_eval.parity.frameworks import Results, exact_matmuls
from pi0_eval.parity.inputs import Inputs

KINDS = ("pi0", "pi05", "pi0_fast")
STEPS = 10
Weights = dict[str, np.ndarray]
SCOPES = {"vision": "vision", "prefix": "paligemma", "image": "paligemma", "pre-logits": "paligemma"}
SCOPES |= {"suffix": "action_expert"}


def narrow(kind: str, depth: int) -> ModelConfig:
    """A narrow model of this many layers, and half as many of vision."""
    gemma = GemmaConfig(width=128, depth=depth, mlp_dim=512, num_heads=4, num_kv_heads=1, head_dim=32)
    tiny = get_variant({"pi0": "tiny", "pi05": "tiny_pi05", "pi0_fast": "tiny_pi0_fast"}[kind])
    return dataclasses.replace(
        tiny,
        vision=VisionConfig(width=96, depth=max(depth // 2, 1), mlp_dim=384, num_heads=3),
        paligemma=gemma,
        action_expert=None if kind == "pi0_fast" else dataclasses.replace(gemma, width=64, mlp_dim=256),
        image_resolution=(56, 56),
        action_dim=8,
        action_horizon=10,
        max_token_len=16,
    ).with_runtime(remat="none", max_decoding_steps=STEPS)


def random_weights(config: ModelConfig, seed: int, spread: float) -> Weights:
    """Weights of the size that training starts from; norms with scales of this `spread`, a few channels far out."""
    rng = np.random.default_rng(seed)

    def draw(name: str, parameter: Parameter) -> np.ndarray:
        shape = parameter.shape
        if name.endswith("scale"):
            scale = np.exp(rng.normal(0, spread, shape)) * np.where(rng.random(shape) < spread / 20, 8, 1)
            return scale if name.startswith("vision") else scale - 1
        if name.endswith("bias"):
            return rng.normal(0.0, 0.02, shape)
        sizes = dict(zip(parameter.axes, shape, strict=True))
        inputs = "nh" if "attention.out" in name else "pqc" if "patch" in name else parameter.axes["l" in sizes]
        return rng.standard_normal(shape) / np.sqrt(np.prod([sizes[a] for a in inputs]))

    return {name: draw(name, p).astype(np.float32) for name, p in parameters(config).items()}


def permutations(config: ModelConfig, seed: int) -> dict[str, dict[str, np.ndarray]]:
    """An order of the channels of each part: `d` its width, `m` its MLP, `h` the values of its heads; of RGB, `c`."""
    rng = np.random.default_rng(seed)
    parts: dict[str, Any] = {"vision": config.vision, **config.experts}
    sizes = {part: {"d": c.width, "m": c.mlp_dim, "h": c.head_dim} for part, c in parts.items()}
    orders = {part: {axis: rng.permutation(n) for axis, n in axes.items()} for part, axes in sizes.items()}
    if "action_expert" in orders:  # one attention: the values of both have their channels in the same order
        orders["action_expert"]["h"] = orders["paligemma"]["h"]
    orders["vision"]["c"] = np.array([2, 0, 1])
    return orders


def permuted(config: ModelConfig, weights: Weights, orders: dict[str, dict[str, np.ndarray]]) -> Weights:
    """The same function, with its channels in these orders."""

    def order(name: str, axis: str) -> np.ndarray | None:
        part, last = scope_of(name), name.split(".")[-1]
        if part == "projections":
            outer = {"state_proj": "de", "action_time_mlp_out": "e", "action_out_proj": "d"}
            outer |= {"action_in_proj": "d"} if config.kind == "pi05" else {}
            return orders["action_expert"]["d"] if axis in outer.get(name.split(".")[0], "") else None
        if axis == "w":
            return orders["paligemma"]["d"]
        if axis == "t":
            own = orders[part]["d"]
            return np.concatenate([own + i * len(own) for i in range(3)])
        if axis == "h" and not ("value" in name or "attention.out" in name):
            return None  # RoPE's pairs stay where they are
        if axis == "d" and "modulation" in name and last == "kernel":
            return None  # the condition's
        return orders[part].get(axis)

    result = {}
    for name, parameter in parameters(config).items():
        x = weights[name]
        for i, axis in enumerate(parameter.axes):
            own = order(name, axis)
            x = x if own is None else np.take(x, own, axis=i)
        result[name] = x
    return result


def restored(results: Results, orders: dict[str, dict[str, np.ndarray]]) -> Results:
    """The stages of a permuted model, with their channels in the order of the first one."""
    stages = {}
    for stage, x in results.stages.items():
        scope = SCOPES.get(stage.split()[0])
        stages[stage] = x if scope is None else x[..., np.argsort(orders[scope]["d"])]
    return Results(stages, {})


@cache
def jax_program(rounded: bool) -> Callable[..., Any]:
    """As `frameworks.jax_program`, with or without XLA's leave to keep float32."""
    options = {"xla_allow_excess_precision": not rounded}

    def run(model: Any, observation: Any, actions: Any, noise: Any, time: Any) -> Any:
        stages: dict[str, jax.Array] = {}
        model.compute_loss(observation, actions, noise, time, stages=stages)
        return stages, frameworks.sample(model, False, observation.prompt_only(), noise, STEPS)

    return jax.jit(run, compiler_options=options)


def run_jax(config: ModelConfig, weights: Weights, inputs: Inputs, rounded: bool = True) -> Results:
    """All stages in JAX."""
    from pi0_jax.loading import with_parameters

    model = with_parameters(config, {n: jnp.asarray(x) for n, x in weights.items()})
    stages, sampled = jax_program(rounded)(model, inputs.observation, inputs.actions, inputs.noise, inputs.time)
    found = ({n: np.asarray(x) for n, x in values.items()} for values in (stages, sampled))
    return Results(frameworks.ordered(*found), {})


def run_torch(config: ModelConfig, weights: Weights, inputs: Inputs) -> Results:
    """All stages in PyTorch."""
    ours = {n: Tensor.of(x) for n, x in weights.items()}
    checkpoint = Checkpoint(Path("memory"), LAYOUTS["pi0_jax"], Assets(config), ours)
    return frameworks.run_torch(checkpoint, config, inputs, STEPS, False)


def distances(config: ModelConfig, weights: Weights, inputs: Inputs, seed: int) -> dict[str, dict[str, float]]:
    """Of each stage: how far apart the sides are, by column."""
    low, orders = config.with_runtime(dtype="bfloat16"), permutations(config, seed)
    other = permuted(config, weights, orders)
    exact = run_torch(config.with_runtime(dtype="float32"), weights, inputs)
    default, a, b = run_jax(low, weights, inputs, False), run_jax(low, weights, inputs), run_torch(low, weights, inputs)
    images = {key: image[..., orders["vision"]["c"]] for key, image in inputs.observation.images.items()}
    its = dataclasses.replace(inputs, observation=dataclasses.replace(inputs.observation, images=images))
    a2, b2 = (restored(run(low, other, its), orders) for run in (run_jax, run_torch))
    pairs = {
        "JAX's error": (exact, a),
        "PyTorch's error": (exact, b),
        "apart": (b, default),
        "all roundings": (b, a),
        "floor JAX": (a, a2),
        "floor PyTorch": (b, b2),
    }
    return {column: errors(*pair, "bfloat16") for column, pair in pairs.items()}


def table(rows: list[dict[str, dict[str, float]]]) -> str:
    """Median and worst of each stage over `rows`, one per seed; of layers the first, the middle and the last."""
    columns = list(rows[0])
    stages = list(rows[0][columns[0]])
    layers = [s for s in stages if " layer " in s]
    shown = {s for name in ("vision", "prefix", "suffix") for s in pick([x for x in layers if x.startswith(name)])}
    lines = ["stage".ljust(18) + "".join(column.rjust(19) for column in columns)]
    for stage in stages:
        if stage in layers and stage not in shown:
            continue
        cells = []
        for column in columns:
            found = [row[column][stage] for row in rows]
            cells.append(f"{np.median(found):.1e} {max(found):.1e}".rjust(19))
        lines.append(stage.ljust(18) + "".join(cells))
    return "\n".join(lines)


def pick(layers: list[str]) -> list[str]:
    return [layers[0], layers[len(layers) // 2], layers[-1]] if layers else []


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", help="address of a trained model (default: random models)")
    parser.add_argument("--kinds", nargs="+", default=KINDS, choices=KINDS)
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--depths", nargs="+", type=int, default=(3, 18), help="layers of random models (3 18)")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--spread", type=float, default=0.1, help="of the logarithm of norms' scales (default 0.1)")
    parser.add_argument(
        "--place", action="append", default=[], metavar="NAME=DTYPE", help="float32 or compute at a place of ROUNDING"
    )
    args = parser.parse_args(arguments)
    for place, _, dtype in (setting.partition("=") for setting in args.place):
        if place not in numerics.ROUNDING or dtype not in (numerics.FLOAT32, numerics.COMPUTE):
            parser.error(f"--place {place}={dtype}: it is NAME=float32 or NAME=compute, of {list(numerics.ROUNDING)}")
        numerics.ROUNDING[place] = dtype
    started = time.perf_counter()
    if args.checkpoint:
        checkpoint = open_checkpoint(args.checkpoint)
        trained = {n: t.read(()).astype(np.float32) for n, t in checkpoint.ours.items()}
        configs = [checkpoint.assets.model.with_runtime(remat="none")]
    else:
        configs = [narrow(kind, depth) for depth in args.depths for kind in args.kinds]
    for config in configs:
        rows = []
        title = f"{config.family.title}, {config.paligemma.depth} layers"
        with exact_matmuls():
            for seed in range(args.seeds):
                weights = trained if args.checkpoint else random_weights(config, seed, args.spread)
                rows.append(distances(config, weights, Inputs.random(config, args.batch, seed), seed))
                print(f"{time.perf_counter() - started:6.0f} s  {title}: seed {seed}", file=sys.stderr, flush=True)
        print(f"{title}: median and worst of {args.seeds} seeds\n{table(rows)}\n", flush=True)


if __name__ == "__main__":
    main()
