"""Measure time and memory of converting a full-size checkpoint, relative to copying its files.

python benchmarks/conversion.py --workdir /tmp                      3.24 B parameters: 35 GB of disk
python benchmarks/conversion.py --workdir /tmp --scale 0.1          a tenth of that
python benchmarks/conversion.py --workdir /tmp --layouts pi0_torch pi0_jax

The source is a π0 with random float32 weights in openpi's layout, chunked like Orbax checkpoints of a single device.
Each step runs in a process of its own, for its own peak of resident memory.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from convert.conversion import convert
from convert.formats.orbax import write_orbax
from convert.layouts.registry import LAYOUTS, WRITABLE
from convert.tensors import Tensor
from pi0.assets import Assets
from pi0.command import local_output_path
from pi0.config import ModelConfig
from pi0.variants import GEMMA_300M, get_variant

# Orbax's default chunk size in bytes (`ocdbt_target_data_file_size`).
ORBAX_CHUNK = 2**31


def model(scale: float) -> ModelConfig:
    """π0 with scaled depth and vocabulary."""
    released = get_variant("pi0")

    def scaled(n: int) -> int:
        return max(round(n * scale), 1)

    return dataclasses.replace(
        released,
        vision=dataclasses.replace(released.vision, depth=scaled(released.vision.depth)),
        paligemma=dataclasses.replace(released.paligemma, depth=scaled(released.paligemma.depth)),
        action_expert=dataclasses.replace(GEMMA_300M, depth=scaled(GEMMA_300M.depth)),
        vocab_size=scaled(released.vocab_size),
    )


def orbax_chunk(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The chunk shape of Orbax 0.12 for a float32 array of a single device: the largest axis is split until it fits."""
    chunk = list(shape)
    while 4 * math.prod(chunk) > ORBAX_CHUNK:
        largest = max(range(len(chunk)), key=lambda axis: chunk[axis])
        chunk[largest] = max(n for n in range(1, chunk[largest]) if chunk[largest] % n == 0)
    return tuple(chunk)


def random_tensor(shape: tuple[int, ...], block: np.ndarray) -> Tensor:
    """Weights that repeat `block`."""

    def read(index: tuple[int | slice, ...]) -> np.ndarray:
        return np.resize(block, [len(range(n)[i]) for n, i in zip(shape, index, strict=True) if isinstance(i, slice)])

    return Tensor(shape, np.dtype(np.float32), read)


def write_source(folder: Path, scale: float) -> None:
    """A random checkpoint in openpi's layout."""
    config = model(scale)
    # As incompressible as trained weights: compressors do not see repetitions after 64 MiB.
    block = np.random.default_rng(0).standard_normal((1 << 24) + 1, np.float32) * np.float32(0.02)
    tensors = {name: random_tensor(shape, block) for name, shape in LAYOUTS["openpi_jax"].shapes(config).items()}
    chunks = {name: orbax_chunk(tensor.shape) for name, tensor in tensors.items()}
    write_orbax(folder / "params", tensors, ("params",), chunks)
    Assets(config).save(folder / "assets")


def size_of(folder: Path) -> int:
    """The size of all files in a folder, in bytes."""
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def step(arguments: list[str]) -> tuple[float, float]:
    """Run one step in its own process; returns seconds and GiB, which it prints last."""
    command = [sys.executable, __file__, "--step", *arguments]
    out = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    seconds, gib = out.split()[-2:]
    return float(seconds), float(gib)


def run_step(name: str, *arguments: str) -> None:
    """Run one step and print its time in seconds, with files flushed to disk, and its peak resident memory in GiB."""
    start = time.perf_counter()
    if name == "source":
        write_source(Path(arguments[0]), float(arguments[1]))
    elif name == "copy":
        shutil.copytree(arguments[0], arguments[1])
    else:
        convert(arguments[0], arguments[1], to=name, dtype="bfloat16", verify=False)
    subprocess.run(["sync"], check=True)
    print(time.perf_counter() - start, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workdir", type=local_output_path, help="where to create a temporary folder")
    parser.add_argument("--scale", type=float, default=1.0, help="of depth and vocabulary")
    parser.add_argument("--layouts", nargs="+", choices=WRITABLE, default=["pi0_torch"])
    parser.add_argument("--step", nargs="+", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.step:
        run_step(*args.step)
        return
    with tempfile.TemporaryDirectory(prefix="pi0-conversion-", dir=args.workdir) as temporary:
        root = Path(temporary)
        source = root / "source"
        seconds, gib = step(["source", str(source), str(args.scale)])
        total = size_of(source)
        print(f"source: {total / 1e9:.2f} GB in {seconds:.0f} s, peak {gib:.2f} GiB\n", flush=True)
        print("| step | time, s | source, GB/s | time / copy | peak memory, GiB | written, GB |")
        print("|---|---|---|---|---|---|", flush=True)
        copy = 0.0
        for name in ("copy", *args.layouts):
            target = root / "target"
            seconds, gib = step([name, str(source), str(target)])
            copy = copy or seconds
            print(
                f"| {name} | {seconds:.1f} | {total / seconds / 1e9:.2f} | {seconds / copy:.2f} "
                f"| {gib:.2f} | {size_of(target) / 1e9:.2f} |",
                flush=True,
            )
            shutil.rmtree(target)


if __name__ == "__main__":
    main()
