"""Measure step times of JAX and PyTorch on the same model: loss with gradients, and sampling.

python benchmarks/frameworks.py                about 50 M parameters, float32, batch 1 and 4
python benchmarks/frameworks.py --model bench_pi05 --dtype bfloat16 --batch 1
"""

from __future__ import annotations

import argparse
import math
import statistics
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import torch
from flax import nnx

import pi0_jax.loading
import pi0_torch.loading
from pi0.config import DTYPES, ModelConfig
from pi0.parameters import parameters
from pi0.variants import get_variant
from pi0_eval.bench import times_ms
from pi0_eval.parity.inputs import Inputs


def jax_runs(config: ModelConfig, inputs: Inputs) -> dict[str, Callable[[], object]]:
    """Blocking calls in JAX, by name."""
    model = jax.jit(lambda: pi0_jax.loading.make_model(config, rngs=nnx.Rngs(0)))()
    x = jax.device_put((inputs.observation, inputs.actions, inputs.noise, inputs.time))
    gradients = jax.jit(jax.grad(lambda model, x: model.compute_loss(*x).mean()))
    sample = jax.jit(lambda model, observation, noise: model.sample(observation, noise))
    return {
        "loss + gradients": lambda: jax.block_until_ready(gradients(model, x)),
        "sampling": lambda: jax.block_until_ready(sample(model, x[0].prompt_only(), x[2])),
    }


def torch_runs(config: ModelConfig, inputs: Inputs) -> dict[str, Callable[[], object]]:
    """Blocking calls in PyTorch, by name."""
    model: Any = pi0_torch.loading.make_model(config)
    observation = pi0_torch.loading.to_device(inputs.observation)
    actions, noise, flow_time = (torch.from_numpy(a) for a in (inputs.actions, inputs.noise, inputs.time))

    def gradients() -> None:
        model.zero_grad()
        model.compute_loss(observation, actions, noise, flow_time).mean().backward()

    prompt = observation.prompt_only()
    return {"loss + gradients": gradients, "sampling": lambda: model.sample(prompt, noise)}


def matmul_gflops(config: ModelConfig, repeats: int = 30) -> tuple[float, float]:
    """The speed of a float32 matrix product of the prefix's MLP in JAX and in PyTorch, the ceiling of the rest."""
    rows, inner, columns = config.prefix_len, config.paligemma.width, config.paligemma.mlp_dim
    x, weight = torch.randn(rows, inner), torch.randn(columns, inner)
    in_jax = jnp.asarray(x.numpy()), jnp.asarray(weight.numpy().T)
    product = jax.jit(jnp.matmul)
    runs = lambda: jax.block_until_ready(product(*in_jax)), lambda: torch.nn.functional.linear(x, weight)
    times = (statistics.median(times_ms(run, repeats)) for run in runs)
    jax_gflops, torch_gflops = (2 * rows * inner * columns / ms / 1e6 for ms in times)
    return jax_gflops, torch_gflops


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="bench", help="a variant of pi0.variants (default bench)")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="compute dtype")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--repeats", type=int, default=7)
    args = parser.parse_args()

    config = get_variant(args.model, image_resolution=(112, 112), dtype=args.dtype)
    count, cores = sum(math.prod(p.shape) for p in parameters(config).values()), torch.get_num_threads()
    print(f"{config.kind}, {count / 1e6:.0f} M parameters, {args.dtype}, {len(config.image_keys)} cameras of ", end="")
    steps = config.runtime.num_steps
    print(f"{config.image_resolution}, {steps} steps, {cores} threads, median of {args.repeats} calls\n")
    print(f"{'':<18}{'batch':>6}{'JAX ms':>10}{'PyTorch ms':>12}{'PyTorch / JAX':>15}")
    for batch in args.batch:
        inputs = Inputs.random(config, batch)
        times = jax_runs(config, inputs), torch_runs(config, inputs)
        for name in times[0]:
            jax_ms, torch_ms = (statistics.median(times_ms(runs[name], args.repeats)) for runs in times)
            print(f"{name:<18}{batch:>6}{jax_ms:>10.0f}{torch_ms:>12.0f}{torch_ms / jax_ms:>15.2f}", flush=True)
    gflops = matmul_gflops(config)
    print(f"\none float32 matrix product: JAX {gflops[0]:.0f} GFLOP/s, PyTorch {gflops[1]:.0f} GFLOP/s")


if __name__ == "__main__":
    main()
