"""Time and memory of a training step in JAX and in PyTorch, compiled and not, beside each other.

python benchmarks/training.py                                       π0 of 58 M parameters, float32, batch 4
python benchmarks/training.py --model pi0 --dtype bfloat16 --batch 8 16 32 --remat full --sides jax torch
python benchmarks/training.py --model pi0_lora --freeze lora --frozen-dtype bfloat16 --dtype bfloat16 --batch 8 16 32

A step is that of `pi0-train`: loss, gradient, clipping, AdamW and moving average, on random inputs, which lie on the
device. Each side runs in a process of its own; the sides take turns, `--rounds` times, and the best round counts. On a
GPU, memory is the peak of what was allocated, and MFU is operations of the loss and its gradient, counted in PyTorch
without what is computed again, relative to the device's bfloat16 peak.
"""

from __future__ import annotations

import argparse
import functools
import json
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

from pi0.run_config import DataConfig, OptimizerConfig, RunConfig
from pi0.training.metrics import utilization
from pi0.variants import get_variant
from pi0_eval.parity.training import random_batches

SIDES = ("jax", "torch", "torch-compiled")
WARM_UP, STEPS = 2, 3


def run_config(args: argparse.Namespace, batch: int) -> RunConfig:
    """The config of a run, whose data is not read."""
    model = get_variant(args.model, dtype=args.dtype, remat=args.remat)
    options = {"freeze": args.freeze, "frozen_dtype": args.frozen_dtype, "batch_size": batch}
    return RunConfig(model, DataConfig("none", "none"), optimizer=OptimizerConfig(), **options)


def in_jax(config: RunConfig) -> tuple[Callable[[], Any], Callable[[], dict[str, float]]]:
    """A step, and what is measured after some."""
    import jax

    from pi0_jax.training.optimizer import make_optimizer, make_schedule
    from pi0_jax.training.train import init_state, train_step

    optimizer = make_optimizer(config.optimizer, make_schedule(config.optimizer, config.steps))
    state = jax.jit(functools.partial(init_state, config, optimizer))()
    step = jax.jit(functools.partial(train_step, config, optimizer), donate_argnums=0)
    batch = jax.device_put(random_batches(config, 1, config.batch_size, 0)[0])

    def run() -> None:
        nonlocal state
        state, scalars = step(state, batch)
        jax.block_until_ready(scalars)

    def measured() -> dict[str, float]:
        stats = jax.local_devices()[0].memory_stats() or {}
        return {"memory_gib": stats["peak_bytes_in_use"] / 2**30} if "peak_bytes_in_use" in stats else {}

    return run, measured


def in_torch(config: RunConfig, compiled: bool) -> tuple[Callable[[], Any], Callable[[], dict[str, float]]]:
    """A step, and what is measured after some."""
    import torch

    from pi0_torch.loading import map_tensors
    from pi0_torch.training.metrics import device_metrics
    from pi0_torch.training.optimizer import make_optimizer, make_schedule
    from pi0_torch.training.sharding import find_mesh_device
    from pi0_torch.training.train import count_flops, fill, init_state, mean_loss, read_base, train_step

    device = find_mesh_device(None)
    optimizer = make_optimizer(config.optimizer, make_schedule(config.optimizer, config.steps))
    root, state = init_state(config, optimizer, None, device)
    fill(state, read_base(config), root)
    loss: Any = functools.partial(root, mean_loss)
    step = functools.partial(train_step, config, optimizer, root, torch.compile(loss) if compiled else loss, None)
    numpy_batch = random_batches(config, 1, config.batch_size, 0)[0]
    batch = map_tensors(lambda x: torch.as_tensor(x).to(device), numpy_batch)
    flops = count_flops(root, batch, config) if device.type == "cuda" else 0.0

    def run() -> None:
        for value in step(state, batch).values():
            value.item()

    return run, lambda: {**device_metrics(device, 0, 0), "flops": flops}


def measure(args: argparse.Namespace, side: str, batch: int) -> dict[str, float]:
    """Seconds of a step on one side, in this process."""
    config = run_config(args, batch)
    run, measured = in_jax(config) if side == "jax" else in_torch(config, side.endswith("compiled"))
    for _ in range(WARM_UP):
        run()
    start, cpu = time.perf_counter(), time.process_time()
    for _ in range(STEPS):
        run()
    wall, cpu = time.perf_counter() - start, time.process_time() - cpu
    return {"seconds": wall / STEPS, "cpu": cpu / STEPS, **measured()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="bench", help="a variant of pi0.variants (default bench)")
    parser.add_argument("--batch", type=int, nargs="+", default=[4])
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--remat", default="none", help="none or full")
    parser.add_argument("--freeze", default="")
    parser.add_argument("--frozen-dtype", default="float32")
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=SIDES)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(json.dumps(measure(args, args.one[0], int(args.one[1]))))
        return
    print("| side | batch | steps/s | samples/s | times the first | CPU seconds of a step | GiB | MFU |")
    print("|---|---|---|---|---|---|---|---|")
    for batch in args.batch:
        best: dict[str, dict[str, float]] = {}
        for _ in range(args.rounds):
            for side in args.sides:
                command = [sys.executable, *sys.argv, "--one", side, str(batch)]
                result = subprocess.run(command, capture_output=True, text=True, check=False)
                if result.returncode:
                    reason = result.stderr.strip().splitlines()[-1:] or [f"exit code {result.returncode}"]
                    print(f"| {side} | {batch} | {reason[0][:80]} | | | | | |", flush=True)
                    continue
                found = json.loads(result.stdout.splitlines()[-1])
                best[side] = min(best.get(side, found), found, key=lambda x: x["seconds"])
        flops = max((found.get("flops", 0.0) for found in best.values()), default=0.0)
        first = next(iter(best.values()), {})
        for side, found in best.items():
            rate = 1 / found["seconds"]
            memory = f"{found['memory_gib']:.1f}" if "memory_gib" in found else ""
            share = utilization(device_name(), flops, rate) if flops else {}
            mfu = f"{share['mfu']:.1%}" if share else ""
            ratio = f"{rate * first['seconds']:.2f}"
            numbers = f"{rate:.3f} | {rate * batch:.2f} | {ratio} | {found['cpu']:.1f} | {memory} | {mfu}"
            print(f"| {side} | {batch} | {numbers} |", flush=True)


def device_name() -> str:
    """The name of the GPU."""
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else ""


if __name__ == "__main__":
    main()
