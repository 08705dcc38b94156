"""Measure a policy server under load: 32 robots at 10 Hz, and its throughput with batches and without.

    python benchmarks/serve.py
    python benchmarks/serve.py --seconds 10 --framework jax

A tiny model is served by `pi0-serve` in a process of its own. Every answer is compared with that of the same request
alone; `/healthz` is asked meanwhile. The throughput is that of robots which ask again as soon as they are answered.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import dataclasses
import http.client
import importlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from websockets.asyncio.client import connect

from convert.checkpoints import Checkpoint, write_checkpoint
from convert.layouts.registry import LAYOUTS
from pi0.assets import Assets
from pi0.robots.normalize import NormStats
from pi0.storage import new_folder
from pi0.tokenizers.text import BUNDLED, TextTokenizer
from pi0.variants import get_variant
from pi0_serve import protocol

POOL = 64  # different requests
TOLERANCE = 3e-6  # relative L2, float32: batches sum in another order


def write_model(folder: Path, framework: str) -> Path:
    """A randomly initialized tiny checkpoint of a Meta-World robot."""
    config = get_variant("tiny", max_token_len=24, image_resolution=(28, 28))
    data = np.random.default_rng(0).normal(size=(500, 4))
    stats = {"state": NormStats.from_data(data), "actions": NormStats.from_data(data)}
    text = TextTokenizer(BUNDLED).reference()
    assets = Assets(config, stats, "metaworld", "zscore", text, "metaworld")
    checkpoint = Checkpoint(folder, LAYOUTS["pi0_jax"], assets, random_parameters(config))
    with new_folder(folder) as temporary:
        write_checkpoint(checkpoint, temporary, f"pi0_{framework}")
    return folder


def random_parameters(config: Any) -> dict[str, Any]:
    """Parameters of the config's shapes, of about the size that training starts from."""
    from convert.tensors import Tensor
    from pi0.parameters import parameters

    rng = np.random.default_rng(0)
    return {name: Tensor.of(rng.normal(0, 0.1, p.shape).astype(np.float32)) for name, p in parameters(config).items()}


@contextlib.contextmanager
def serving(folder: Path, sizes: list[int], steps: int, args: argparse.Namespace) -> Iterator[int]:
    """A running server; gives its port."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-c", "from pi0_serve.command import main; main()", str(folder), "--port", str(port)]
    command += ["--framework", args.framework, "--num-steps", str(steps), "--access-log", "none"]
    command += ["--batch-wait", str(args.batch_wait), "--batch-sizes", *map(str, sizes)]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as process:
        try:
            end = time.monotonic() + 300
            while time.monotonic() < end and process.poll() is None:
                with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
                    break
                time.sleep(0.1)
            yield port
        finally:
            process.send_signal(signal.SIGTERM)
            if process.wait(60) != 0:
                raise RuntimeError(f"the server exited with {process.returncode}")


def requests() -> list[dict[str, Any]]:
    """Different observations, each with a seed of its noise."""
    rng = np.random.default_rng(1)
    found = []
    for i in range(POOL):
        images = {name: rng.integers(0, 256, (56, 56, 3)).astype(np.uint8) for name in ("corner", "wrist")}
        found.append(images | {"state": rng.normal(size=4).astype(np.float32), "prompt": "open the drawer", "seed": i})
    return found


@dataclasses.dataclass
class Load:
    """What the robots saw: answers by request, latencies in seconds, and what went wrong."""

    answers: list[tuple[int, np.ndarray]] = dataclasses.field(default_factory=list)
    latencies: list[float] = dataclasses.field(default_factory=list)
    sent: int = 0
    swapped: int = 0


async def robot(port: int, number: int, pool: list[dict[str, Any]], hz: float, end: float, load: Load) -> None:
    """One robot until `end`, at `hz`, or as fast as it is answered for 0."""
    async with connect(f"ws://127.0.0.1:{port}", compression=None, max_size=None) as websocket:
        await websocket.recv()
        tick = time.monotonic() + (number % 32) / 32 / (hz or 1e9)
        step = 0
        while (now := time.monotonic()) < end:
            if hz and tick > now:
                await asyncio.sleep(tick - now)
            tick += 1 / hz if hz else 0
            chosen, identity = (7 * number + step) % POOL, number * 1_000_000 + step
            start = time.perf_counter()
            load.sent += 1
            await websocket.send(protocol.pack(pool[chosen] | {"request_id": identity}))
            message = await websocket.recv()
            load.latencies.append(time.perf_counter() - start)
            if isinstance(message, str):
                raise RuntimeError(message)
            answer = protocol.unpack(message)
            load.swapped += answer["request_id"] != identity
            load.answers.append((chosen, answer["actions"]))
            step += 1


def drive(port: int, count: int, hz: float, seconds: float) -> Load:
    """Many robots."""
    load, pool = Load(), requests()

    async def all_robots() -> None:
        end = time.monotonic() + seconds
        await asyncio.gather(*(robot(port, i, pool, hz, end, load) for i in range(count)))

    asyncio.run(all_robots())
    return load


def ask_health(port: int, stop: threading.Event, latencies: list[float]) -> None:
    """Ask for health 20 times a second."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    while not stop.wait(0.05):
        start = time.perf_counter()
        connection.request("GET", "/healthz")
        response = connection.getresponse()
        if response.read() != b"OK\n":
            raise RuntimeError("the server is not well")
        latencies.append(time.perf_counter() - start)


def errors(folder: Path, load: Load, args: argparse.Namespace) -> float:
    """The largest relative L2 distance of an answer from that of the same request alone."""
    module = importlib.import_module(f"pi0_{args.framework}")
    policy = module.Policy.from_pretrained(folder, use_sampler=True, num_steps=args.load_steps)
    alone = []
    for request in requests():
        noise = policy.noise(1, seed=request.pop("seed"))
        alone.append(policy.infer(request, noise[0])["actions"].astype(np.float64))
    return max(float(np.linalg.norm(a - alone[i]) / np.linalg.norm(alone[i])) for i, a in load.answers)


def main() -> None:
    """Print the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--framework", choices=("torch", "jax"), default="torch")
    parser.add_argument("--robots", type=int, default=32)
    parser.add_argument("--hz", type=float, default=10)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--throughput-seconds", type=float, default=10)
    parser.add_argument("--load-steps", type=int, default=2, help="Euler steps of the load at --hz")
    parser.add_argument("--num-steps", type=int, default=10, help="of the throughput: so many that sampling dominates")
    parser.add_argument("--batch-wait", type=float, default=2, metavar="MS")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = write_model(Path(temporary) / "checkpoint", args.framework)
        health: list[float] = []
        stop, rates = threading.Event(), dict[str, float]()
        with serving(folder, [8], args.load_steps, args) as port:
            thread = threading.Thread(target=ask_health, args=(port, stop, health))
            thread.start()
            load = drive(port, args.robots, args.hz, args.seconds)
            stop.set()
            thread.join()
        for size in ("8", "1"):
            with serving(folder, [int(size)], args.num_steps, args) as port:
                rates[size] = _rate(port, args)
        worst = errors(folder, load, args)
    figures = {
        "requests": load.sent,
        "lost": load.sent - len(load.answers),
        "swapped": load.swapped,
        "worst relative L2 to the same request alone": worst,
        "latency ms (p50, p99)": _quantiles(load.latencies),
        "healthz ms (p50, p99)": _quantiles(health),
        "requests/s with batches of 8": round(rates["8"], 1),
        "requests/s with batches of 1": round(rates["1"], 1),
        "ratio": round(rates["8"] / rates["1"], 2),
    }
    print(json.dumps(figures, indent=2))
    if figures["lost"] or load.swapped or worst > TOLERANCE:
        sys.exit("an answer was lost, swapped or wrong")


def _rate(port: int, args: argparse.Namespace) -> float:
    drive(port, args.robots, 0, 1.0)  # warm
    load = drive(port, args.robots, 0, args.throughput_seconds)
    return len(load.answers) / args.throughput_seconds


def _quantiles(seconds: list[float]) -> list[float]:
    return [round(1e3 * float(np.quantile(seconds, q)), 2) for q in (0.5, 0.99)]


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
