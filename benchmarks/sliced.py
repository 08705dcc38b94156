"""Measure time and memory of `pi0-parity --sliced` at full size: a checkpoint in JAX against its PyTorch export.

python benchmarks/sliced.py --workdir /tmp                          π0, 3.24 B float32 parameters: 26 GB of disk
python benchmarks/sliced.py --workdir /tmp --variant pi05 --arguments=--batch=1
python benchmarks/sliced.py --workdir /tmp --depth 1                full width and vocabulary, one layer of each stack
python benchmarks/sliced.py --workdir /tmp --variant tiny

The weights are random, of the size that training starts from. Parity runs in a process of its own, whose peak of
resident memory is printed, and of it what is not pages of mapped files (Linux).
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import resource
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np

from convert.checkpoints import Checkpoint, write_checkpoint
from convert.conversion import convert
from convert.layouts.registry import LAYOUTS
from convert.tensors import Tensor
from pi0.assets import Assets
from pi0.command import local_output_path
from pi0.config import ModelConfig
from pi0.parameters import Parameter, parameters
from pi0.variants import get_variant


def random_tensor(name: str, parameter: Parameter, block: np.ndarray) -> Tensor:
    """Weights that repeat `block`, which is normal, divided by sqrt(fan-in); biases and norms about 0.1."""
    sizes = dict(zip(parameter.axes, parameter.shape, strict=True))
    inputs = "nh" if "attention.out" in name else "pqc" if "patch" in name else parameter.axes["l" in sizes]
    fan_in = math.prod(sizes[axis] for axis in inputs if axis in sizes)
    scale = np.float32(fan_in**-0.5 if name.endswith("kernel") else 0.1)

    def read(index: tuple[int | slice, ...]) -> np.ndarray:
        full = index + (slice(None),) * (len(parameter.shape) - len(index))
        shape = [len(range(n)[i]) for n, i in zip(parameter.shape, full, strict=True) if isinstance(i, slice)]
        return np.resize(block, shape) * scale

    return Tensor(parameter.shape, np.dtype(np.float32), read)


def model(variant: str, depth: int | None) -> ModelConfig:
    """The variant, with so many layers in each stack where that is given."""
    config = get_variant(variant)
    if depth is None:
        return config
    stacks: dict[str, Any] = {"vision": config.vision, **config.experts}
    return dataclasses.replace(config, **{n: dataclasses.replace(s, depth=depth) for n, s in stacks.items()})


def write_source(folder: Path, config: ModelConfig) -> int:
    """A random checkpoint in JAX's layout; returns how many parameters it has."""
    block = np.random.default_rng(0).standard_normal((1 << 22) + 1, np.float32)
    ours = {name: random_tensor(name, parameter, block) for name, parameter in parameters(config).items()}
    write_checkpoint(Checkpoint(folder, LAYOUTS["pi0_jax"], Assets(config), ours), folder, "pi0_jax")
    return sum(math.prod(tensor.shape) for tensor in ours.values())


@dataclasses.dataclass
class Memory:
    """The peak of a process, in GiB: resident, and of it what no file backs."""

    process: int
    resident: float = 0.0
    anonymous: float = 0.0

    def watch(self, done: threading.Event) -> None:
        """Look ten times a second."""
        while not done.wait(0.1):
            try:
                status = Path(f"/proc/{self.process}/status").read_text()
            except OSError:
                return
            found = {line.split(":")[0]: line.split()[1] for line in status.splitlines() if line.endswith(" kB")}
            if "VmHWM" in found:
                self.resident = int(found["VmHWM"]) / 2**20
                self.anonymous = max(self.anonymous, int(found["RssAnon"]) / 2**20)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workdir", type=local_output_path, help="where to create a temporary folder")
    parser.add_argument("--variant", default="pi0", help="of the model (default pi0)")
    parser.add_argument("--depth", type=int, help="layers of each stack (default: the variant's)")
    parser.add_argument("--arguments", nargs="*", default=[], help="for pi0-parity, as --arguments=--batch=1")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="pi0-sliced-", dir=args.workdir) as temporary:
        jax, torch = Path(temporary) / "jax", Path(temporary) / "torch"
        count = write_source(jax, model(args.variant, args.depth))
        convert(jax, torch, to="pi0_torch", verify=False)
        print(f"{args.variant}: {count / 1e9:.3f} B parameters, float32", flush=True)
        command = [sys.executable, "-c", "from pi0_eval.parity.command import main; main()"]
        started, done = time.perf_counter(), threading.Event()
        process = subprocess.Popen([*command, str(jax), str(torch), "--sliced", *args.arguments])
        memory = Memory(process.pid)
        watcher = threading.Thread(target=memory.watch, args=(done,))
        watcher.start()
        code = process.wait()
        done.set()
        watcher.join()
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    minutes, of_cpu = (time.perf_counter() - started) / 60, (used.ru_utime + used.ru_stime) / 60
    print(f"{minutes:.1f} minutes, {of_cpu:.1f} of CPU; at most {memory.resident:.2f} GiB resident, ", end="")
    print(f"{memory.anonymous:.2f} GiB of it without a file")
    sys.exit(code)


if __name__ == "__main__":
    main()
