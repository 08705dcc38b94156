"""Attack the proof of parity: correct pairs, one function computed in two ways, which must pass.

    python tests/pairs.py --count 1000 --out pairs.jsonl

A pair is two checkpoints of the same weights, written in two layouts, and `pi0-parity`'s own comparison of them. All of
it follows from its number. The lines of `--out` are kept: the same command goes on where it was stopped.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import re
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))

import jax
import ml_dtypes
import numpy as np
import torch

from convert.checkpoints import Checkpoint, write_checkpoint
from convert.fresh import with_fresh
from convert.layouts.registry import LAYOUTS
from convert.tensors import Tensor
from pi0.assets import Assets
from pi0.config import GemmaConfig, ModelConfig
from pi0.parameters import Parameter, parameters
from pi0.robots.normalize import NormStats
from pi0.storage import new_folder
from pi0.variants import get_variant
from pi0_eval.parity.compare import compare
from pi0_eval.parity.inputs import Inputs
from pi0_torch.loading import parameters_of, to_device, to_torch, with_parameters

Weights = dict[str, np.ndarray]
RECIPE = "tiny_pi05, recipe"  # trained by the recipe, writes a subtask before its actions
KINDS = ("tiny", "tiny_pi05", RECIPE, "tiny_pi0_fast", "tiny_lora", "tiny_pi0_fast_lora")
DTYPES = ("float32", "bfloat16")
ORIGINS = ("random", "initial", "trained")
# Layouts that a kind has; openpi's PyTorch has no π0-FAST and no LoRA.
OURS = ("pi0_jax", "pi0_torch")
LAYOUTS_OF = {
    "tiny": (*OURS, "openpi_jax", "openpi_torch", "lerobot"),
    "tiny_pi05": (*OURS, "openpi_jax", "openpi_torch", "lerobot"),
    RECIPE: (*OURS, "openpi_jax", "openpi_torch", "lerobot"),
    "tiny_pi0_fast": (*OURS, "openpi_jax", "lerobot"),
    "tiny_lora": (*OURS, "openpi_jax"),
    "tiny_pi0_fast_lora": (*OURS, "openpi_jax"),
}
PLAIN = ("jax", "torch")
# With their shares: two plain sides have every stage and gradients, others what is sampled.
SIDES = (
    *[PLAIN] * 6,
    ("jax", "jax:xla"),
    ("jax", "jax:sampler"),
    ("jax", "torch:sampler"),
    ("torch", "torch:sampler:eager"),
    ("torch:sampler:sdpa", "jax:sampler"),
)
STEPS = {"tiny": (3, 3), "deep": (2, 10)}  # rows, and Euler steps or tokens, of a size
TRAINED = 8  # steps of AdamW
CLEARED = 25  # pairs after which compiled programs leave memory: each sampler has its own


@dataclasses.dataclass(frozen=True)
class Pair:
    """A correct pair: everything that it is made of."""

    number: int
    kind: str
    size: str
    dtype: str
    origin: str
    scale: float
    stored: str
    layouts: tuple[str, str]
    sides: tuple[str, str]

    @classmethod
    def of(cls, number: int) -> Pair:
        """The pair of a number: kind, dtype and origin in turn, the rest at random."""
        kind, rest = KINDS[number % len(KINDS)], number // len(KINDS)
        dtype, rest = DTYPES[rest % 2], rest // 2
        rng = np.random.default_rng(number)

        def choose(options: Iterable[Any]) -> Any:
            return (options := list(options))[rng.integers(len(options))]

        sides = choose([pair for pair in SIDES if "fast" not in kind or "jax:xla" not in pair])
        sides = tuple("torch:sampler:eager" if "fast" in kind and "sdpa" in side else side for side in sides)
        return cls(
            number, kind, "tiny" if "lora" in kind else choose(STEPS), dtype, ORIGINS[rest % 3],
            scale=choose((0.25, 0.5, 1.0)),
            stored=choose(("float32", "float32", "bfloat16")),
            layouts=(choose(LAYOUTS_OF[kind]), choose(LAYOUTS_OF[kind])),
            sides=sides[:: choose((1, -1))],
        )  # fmt: skip

    def __str__(self) -> str:
        return ", ".join(f"{f.name} {getattr(self, f.name)}" for f in dataclasses.fields(self))


def config_of(kind: str, size: str) -> ModelConfig:
    """The model of a kind: as small as it gets, or with six layers and wider."""
    config = get_variant(kind.partition(",")[0], remat="none")
    if size == "tiny":
        return config
    gemma = GemmaConfig(width=96, depth=6, mlp_dim=192, num_heads=4, num_kv_heads=1, head_dim=24)
    gemma = dataclasses.replace(gemma, lora_rank=config.paligemma.lora_rank, lora_alpha=config.paligemma.lora_alpha)
    expert = None if config.action_expert is None else dataclasses.replace(gemma, width=64, mlp_dim=128)
    vision = dataclasses.replace(config.vision, width=48, depth=4, mlp_dim=96)
    return dataclasses.replace(
        config, vision=vision, paligemma=gemma, action_expert=expert, action_horizon=10, action_dim=12, max_token_len=24
    )


def weights_of(pair: Pair, config: ModelConfig) -> Weights:
    """The weights of a pair, float32 or rounded to what they are stored in."""
    rng = np.random.default_rng((pair.number, 1))
    if pair.origin == "trained":
        weights = trained(config, pair.number)
    elif pair.origin == "initial":
        weights = {name: near_initial(name, p, rng) for name, p in parameters(config).items()}
    else:
        weights = random_weights(config, pair.number, pair.scale * math.sqrt(32 / config.paligemma.width))
    return {name: x.astype(getattr(ml_dtypes, pair.stored, pair.stored)) for name, x in weights.items()}


def random_weights(config: ModelConfig, seed: int = 0, scale: float = 1.0) -> Weights:
    """Parameters of no special value: every gate is open, so every part has an influence."""
    rng = np.random.default_rng(seed)
    return {
        n: (rng.normal(size=p.shape) * scale * (0.3 if "kernel" in n or "lora" in n else 0.2)).astype(np.float32)
        for n, p in parameters(config).items()
    }


def near_initial(name: str, parameter: Parameter, rng: np.random.Generator) -> np.ndarray:
    """Values of the size that training starts from, norms and biases off their start so that each one counts."""
    shape = parameter.shape
    if name.endswith("scale"):
        return rng.normal(1.0 if name.startswith("vision") else 0.0, 0.1, shape).astype(np.float32)
    if name.endswith("bias"):
        return rng.normal(0.0, 0.02, shape).astype(np.float32)
    if ".lora." in name:
        return rng.normal(0.0, 0.1, shape).astype(np.float32)
    sizes = dict(zip(parameter.axes, shape, strict=True))
    inputs = "nh" if "attention.out" in name else "pqc" if "patch" in name else parameter.axes["l" in sizes]
    fan_in = math.prod(sizes[a] for a in inputs)
    return (rng.standard_normal(shape, np.float32) / np.sqrt(fan_in)).astype(np.float32)


def trained(config: ModelConfig, seed: int) -> Weights:
    """A new model after some steps of AdamW on one batch, in PyTorch."""
    fresh, _ = with_fresh(config, {}, seed)
    embedding = np.random.default_rng(seed).standard_normal(fresh["paligemma.embedding"].shape, np.float32)
    fresh["paligemma.embedding"] = Tensor.of(embedding * np.float32(config.paligemma.width**-0.5))
    tensors = {n: to_torch(t.read(())) for n, t in LAYOUTS["pi0_torch"].from_ours(config, fresh).items()}
    model, inputs = with_parameters(config, tensors), Inputs.random(config, batch=4, seed=seed)
    observation, batch = (
        to_device(inputs.observation),
        [torch.from_numpy(x) for x in (inputs.actions, inputs.noise, inputs.time)],
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=1e-4)
    for _ in range(TRAINED):
        optimizer.zero_grad()
        model.compute_loss(observation, *batch).mean().backward()
        optimizer.step()
    ours = LAYOUTS["pi0_torch"].to_ours(config, parameters_of(dict(model.named_parameters())))
    return {name: tensor.read(()).copy() for name, tensor in ours.items()}


def run(pair: Pair) -> dict[str, Any]:
    """A line of the result: the share of the allowed distance, by stage, and what is out."""
    started, config = time.perf_counter(), config_of(pair.kind, pair.size)
    ours = {name: Tensor.of(value) for name, value in weights_of(pair, config).items()}
    stats = {
        key: NormStats.from_data(np.random.default_rng((pair.number, i)).normal(i, 2, (9, dims)))
        for i, (key, dims) in enumerate((("state", config.state_size), ("actions", config.action_dim)))
    }
    assets = Assets(config, stats, "robot", config.family.normalization, subtasks=pair.kind == RECIPE)
    checkpoint = Checkpoint(Path("memory"), LAYOUTS["pi0_jax"], assets, ours)
    batch, steps = STEPS[pair.size]
    with tempfile.TemporaryDirectory(prefix="pi0-pairs-") as folder:
        sides = [Path(folder) / name for name in "ab"]
        for side, layout in zip(sides, pair.layouts, strict=True):
            with new_folder(side) as temporary:
                write_checkpoint(checkpoint, temporary, layout)
        report = compare(
            *sides,
            dtype=pair.dtype,
            side_a=pair.sides[0],
            side_b=pair.sides[1],
            batch=batch,
            seed=pair.number,
            num_steps=steps,
        )
    shares = {row.stage: row.share for row in report.rows}
    return dataclasses.asdict(pair) | {
        "seconds": round(time.perf_counter() - started, 2),
        "out": [row.stage for row in report.rows if not row.passed],
        "proof": max(row.proof for row in report.rows),
        "failed": [dataclasses.asdict(row) for row in report.rows if not row.passed],
        "shares": {stage: float(f"{share:.4g}") for stage, share in shares.items()},
    }


def results(count: int, kinds: tuple[str, ...], out: Path | None) -> Iterator[dict[str, Any]]:
    """The lines of the first `count` pairs that are of these kinds, those that `out` has first."""
    done = [json.loads(line) for line in out.read_text().splitlines()] if out and out.exists() else []
    done = [line for line in done if line["number"] < count and line["kind"] in kinds]
    yield from done
    left, ran = {*range(count)} - {line["number"] for line in done}, 0
    # Those that share a compiled program one after the other.
    for pair in sorted(
        map(Pair.of, left), key=lambda pair: (pair.size, pair.kind, pair.dtype, pair.number), reverse=True
    ):
        if pair.kind not in kinds:
            continue
        line = run(pair)
        if (ran := ran + 1) % CLEARED == 0:
            jax.clear_caches()
        if out:
            with out.open("a") as file:
                file.write(json.dumps(line) + "\n")
        if line["out"]:
            print(f"alarm: {pair}: {', '.join(line['out'])}", flush=True)
        yield line


def table(lines: list[dict[str, Any]]) -> str:
    """Pairs, alarms, worst and median share of what is allowed: by everything that pairs are made of, and by stage."""
    rows = [("", "pairs", "alarms", "worst", "median")]
    groups: dict[str, list[dict[str, Any]]] = {"all": lines}
    for field in ("kind", "size", "dtype", "origin", "stored", "sides"):
        for line in lines:
            value = line[field] if isinstance(line[field], str) else " against ".join(sorted(line[field]))
            groups.setdefault(f"{field} {value}", []).append(line)
    shares = {name: [max(line["shares"].values()) for line in group] for name, group in groups.items()}
    alarms = {name: sum(bool(line["out"]) for line in group) for name, group in groups.items()}
    for line in lines:
        for stage, share in line["shares"].items():
            name = f"stage {re.sub(r' [0-9]+$', '', stage)}"
            shares.setdefault(name, []).append(share)
            alarms[name] = alarms.get(name, 0) + (stage in line["out"])
    for name, values in shares.items():
        numbers = len(values), alarms[name]
        rows.append((name, *map(str, numbers), f"{max(values):.2f}", f"{np.median(values):.2f}"))
    width = max(len(row[0]) for row in rows)
    return "\n".join(f"{row[0]:<{width}}" + "".join(f"{cell:>9}" for cell in row[1:]) for row in rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=1000, help="correct pairs (default 1000)")
    parser.add_argument("--kinds", nargs="+", default=KINDS, choices=KINDS)
    parser.add_argument("--out", type=Path, help="keep a line for each pair in this file, and go on from there")
    args = parser.parse_args()
    started, lines = time.perf_counter(), []
    for line in results(args.count, tuple(args.kinds), args.out):
        lines.append(line)
        if len(lines) % 50 == 0:
            print(f"{time.perf_counter() - started:6.0f} s  {len(lines)} pairs", flush=True)
    print(table(lines))
    proof = max(line["proof"] for line in lines)
    print(f"{len(lines)} pairs, {sum(bool(line['out']) for line in lines)} alarms; float64 at most {proof:.1e} apart")
    sys.exit(1 if any(line["out"] for line in lines) else 0)


if __name__ == "__main__":
    main()
