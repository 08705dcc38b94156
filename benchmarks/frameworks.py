"""Step times of JAX and PyTorch on the same model: loss with gradients, and sampling.

python benchmarks/frameworks.py                about 50 M parameters, float32, batch 1 and 4
python benchmarks/frameworks.py --kind pi05 --dtype bfloat16 --batch 1
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import torch
from flax import nnx

import pi0_jax
import pi0_torch
from convert.layouts.registry import LAYOUTS
from convert.tensors import Tensor
from pi0.config import GemmaConfig, ModelConfig, RuntimeConfig, VisionConfig
from pi0_eval.parity.compare import Inputs
from pi0_jax.loading import parameters_of
from pi0_torch.loading import to_torch, with_parameters

PALIGEMMA = GemmaConfig(width=512, depth=8, mlp_dim=2048, num_heads=8, num_kv_heads=1, head_dim=64)
MID_SIZE = ModelConfig(
    kind="pi0",
    vision=VisionConfig(width=384, depth=8, mlp_dim=1536, num_heads=6),
    paligemma=PALIGEMMA,
    action_expert=dataclasses.replace(PALIGEMMA, width=256, mlp_dim=1024),
    vocab_size=8192,
    image_resolution=(112, 112),
    runtime=RuntimeConfig(remat="none"),
)


def median_ms(run: Callable[[], object], repeats: int) -> float:
    """Median wall time of a call in milliseconds, after two that warm up."""
    times = []
    for i in range(repeats + 2):
        start = time.perf_counter()
        run()
        if i >= 2:
            times.append(time.perf_counter() - start)
    return statistics.median(times) * 1e3


def jax_runs(model: pi0_jax.Pi0, inputs: Inputs) -> dict[str, Callable[[], object]]:
    """Blocking calls in JAX, by name."""
    x = jax.device_put((inputs.observation, inputs.actions, inputs.noise, inputs.time))
    gradients = jax.jit(jax.grad(lambda model, o, a, n, t: model.compute_loss(o, a, n, t).mean()))
    sample = jax.jit(lambda model, o, n: model.sample_actions(o, n))
    return {
        "loss + gradients": lambda: jax.block_until_ready(gradients(model, *x)),
        "sampling": lambda: jax.block_until_ready(sample(model, x[0], x[2])),
    }


def torch_runs(model: pi0_torch.Pi0, inputs: Inputs) -> dict[str, Callable[[], object]]:
    """Blocking calls in PyTorch, by name."""
    observation = pi0_torch.to_device(inputs.observation)
    actions, noise, flow_time = (torch.from_numpy(a) for a in (inputs.actions, inputs.noise, inputs.time))

    def gradients() -> None:
        model.zero_grad()
        model.compute_loss(observation, actions, noise, flow_time).mean().backward()

    return {"loss + gradients": gradients, "sampling": lambda: model.sample_actions(observation, noise)}


def matmul_gflops(config: ModelConfig, repeats: int = 30) -> tuple[float, float]:
    """What a float32 matrix product of the prefix's MLP reaches in JAX and in PyTorch: the ceiling of the rest."""
    rows, inner, columns = config.prefix_len, config.paligemma.width, config.paligemma.mlp_dim
    x, weight = torch.randn(rows, inner), torch.randn(columns, inner)
    in_jax = jnp.asarray(x.numpy()), jnp.asarray(weight.numpy().T)
    product = jax.jit(jnp.matmul)
    runs = lambda: jax.block_until_ready(product(*in_jax)), lambda: torch.nn.functional.linear(x, weight)
    jax_gflops, torch_gflops = (2 * rows * inner * columns / median_ms(run, repeats) / 1e6 for run in runs)
    return jax_gflops, torch_gflops


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kind", choices=("pi0", "pi05"), default="pi0")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="compute dtype")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--repeats", type=int, default=7)
    args = parser.parse_args()

    config = dataclasses.replace(MID_SIZE, kind=args.kind).with_runtime(dtype=args.dtype)
    in_jax = jax.jit(lambda: pi0_jax.Pi0(config, rngs=nnx.Rngs(0)))()
    ours = {name: Tensor.of(np.asarray(value)) for name, value in parameters_of(in_jax).items()}
    theirs = LAYOUTS["pi0_torch"].from_ours(config, ours)
    in_torch = with_parameters(config, {name: to_torch(tensor.read(())) for name, tensor in theirs.items()})
    assert isinstance(in_torch, pi0_torch.Pi0)
    count = sum(p.numel() for p in in_torch.parameters())
    cores = torch.get_num_threads()
    print(f"{config.kind}, {count / 1e6:.0f} M parameters, {args.dtype}, {len(config.image_keys)} cameras of ", end="")
    steps = config.runtime.num_steps
    print(f"{config.image_resolution}, {steps} steps, {cores} threads, median of {args.repeats} calls\n")
    print(f"{'':<18}{'batch':>6}{'JAX ms':>10}{'PyTorch ms':>12}{'PyTorch / JAX':>15}")
    for batch in args.batch:
        inputs = Inputs.random(config, batch)
        times = jax_runs(in_jax, inputs), torch_runs(in_torch, inputs)
        for name in times[0]:
            jax_ms, torch_ms = (median_ms(runs[name], args.repeats) for runs in times)
            print(f"{name:<18}{batch:>6}{jax_ms:>10.0f}{torch_ms:>12.0f}{torch_ms / jax_ms:>15.2f}", flush=True)
    gflops = matmul_gflops(config)
    print(f"\none float32 matrix product: JAX {gflops[0]:.0f} GFLOP/s, PyTorch {gflops[1]:.0f} GFLOP/s")


if __name__ == "__main__":
    main()
