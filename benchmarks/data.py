"""Samples per second of reading recordings at random, against the decoder alone.

python benchmarks/data.py                                             the bundled recordings and those of the tests
python benchmarks/data.py hf://datasets/lerobot/pusht --size 96x96    another dataset

A sample is a frame with the images of all cameras, its state and chunk of actions; batches of 32 are stacked in the
worker processes and not sent anywhere. The decoder alone decodes the same videos from start to end, one thread in each
process, without color conversion and resizing: once all frames, once the keyframes, which take longer. Random access
decodes all frames from the keyframe to the requested one, so its limit is the decoder's time for a keyframe per image
and for all other frames that were decoded. Ratios are of CPU time, which other work on the machine changes little.

The last rows are those of training: batches from the cache with all transforms, by Grain's worker processes, on the
device; in wall time.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import dataclasses
import functools
import multiprocessing
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import av
import jax
import numpy as np

import pi0_jax.models  # noqa: F401  # registers Observation in JAX
from pi0.datasets.cache import build_cache
from pi0.datasets.lerobot import LeRobotDataset
from pi0.robots.registry import make_robot
from pi0.run_config import DataConfig, RunConfig
from pi0.training.data import AHEAD, Loader, load_data
from pi0.variants import get_variant

BATCH = 32
Job = tuple[int, int, float]  # number of samples, video frames decoded for them, and seconds of CPU time

work: LeRobotDataset  # in a worker process


def start(dataset: LeRobotDataset) -> None:
    global work
    work = dataset


def wait(_: int) -> None:
    time.sleep(0.5)  # long enough for every process to take one


def read_batch(indices: Sequence[int]) -> Job:
    """Read and stack a batch."""
    before, begin = work.decoded, time.process_time()
    items = [work[int(i)] for i in indices]
    for key in items[0]:
        if isinstance(items[0][key], np.ndarray):
            np.stack([item[key] for item in items])
    return len(items), work.decoded - before, time.process_time() - begin


def decode(file: Path, keyframes_only: bool = False) -> Job:
    """Decode a video with the decoder alone."""
    begin, count = time.process_time(), 0
    with av.open(str(file)) as container:
        stream = container.streams.video[0]
        stream.codec_context.thread_count = 1
        for packet in container.demux(stream):
            if packet.is_keyframe or packet.dts is None or not keyframes_only:  # without a time: the end
                count += len(packet.decode())
    return count, count, time.process_time() - begin


decode_keyframes = functools.partial(decode, keyframes_only=True)


@dataclasses.dataclass(frozen=True)
class Rate:
    """Samples (of the decoder alone: frames) per second; decoded frames and ms of CPU time of each."""

    per_second: float
    decoded: float
    ms: float


def rate(dataset: LeRobotDataset, workers: int, job: Callable[[Any], Job], arguments: Sequence[Any]) -> Rate:
    """The rate of processes, all started before, over a list of jobs."""
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(workers, context, start, (dataset,)) as pool:
        list(pool.map(wait, range(workers)))
        begin = time.perf_counter()
        count, decoded, seconds = np.array(list(pool.map(job, arguments))).sum(0)
    return Rate(count / (time.perf_counter() - begin), decoded / count, seconds / count * 1e3)


def keyframe_share(files: Sequence[Path]) -> float:
    """The share of keyframes."""
    keyframes: list[bool] = []
    for file in files:
        with av.open(str(file)) as container:
            keyframes += [entry.is_keyframe for entry in container.streams.video[0].index_entries]
    return float(np.mean(keyframes))


def training(root: str, robot: str, size: tuple[int, int], samples: int, workers: int, cache: Path) -> dict[str, float]:
    """Samples per second through the whole pipeline, without and with augmentation."""
    cameras = make_robot(robot).cameras.values()
    model = get_variant(
        "tiny", image_keys=tuple(cameras), image_resolution=size, action_horizon=50, action_dim=32, max_token_len=48
    )
    found = {}
    for name, augment in (("Grain, from the cache", False), ("Grain, from the cache, augmented", True)):
        data = DataConfig(
            robot,
            "benchmark",
            root,
            tokenizer="bundled://tokenizer.model",
            cache=str(cache),
            workers=workers,
            skip_damaged=True,
            augment=augment,
        )
        _, batches, _ = load_data(RunConfig(model, data, batch_size=BATCH))
        with Loader(batches, model, np.arange(BATCH), jax.device_put, workers=workers) as loader:
            for _ in range(2 * AHEAD * workers + AHEAD):  # all processes have started, and nothing was ready before
                next(loader)
            begin, count = time.perf_counter(), -(-samples // BATCH)
            for _ in range(count):
                jax.block_until_ready(next(loader))
            found[name] = count * BATCH / (time.perf_counter() - begin)
    return found


def benchmark(root: str, robot: str, size: tuple[int, int], samples: int, workers: int, cache: Path) -> None:
    """Print a dataset's rows of the table."""
    options: dict[str, Any] = {"action_horizon": 50, "skip_damaged": True}
    plain = LeRobotDataset(root, **options)
    resized = LeRobotDataset(root, image_size=size, **options)
    build_cache(resized, cache, workers=workers)
    cached = LeRobotDataset(root, image_size=size, cache=cache, **options)
    rng = np.random.default_rng(0)
    batches = [rng.integers(0, len(plain), BATCH) for _ in range(-(-samples // BATCH))]
    in_order = [np.arange(n * BATCH, (n + 1) * BATCH) for n in range(len(plain) // BATCH)]
    files = sorted({segment.file for episode in plain.episodes for segment in episode.videos.values()})
    alone, keyframes = (rate(plain, workers, job, files * 2) for job in (decode, decode_keyframes))
    share = keyframe_share(files)
    other = (alone.ms - share * keyframes.ms) / (1 - share) if share < 1 else 0.0

    def row(name: str, found: Rate, cold: Rate | None = None) -> None:
        images = min(len(plain.cameras), found.decoded)
        limit = alone.ms * found.decoded
        if name.startswith("random"):
            limit = keyframes.ms * images + other * (found.decoded - images)
        faster = f"{cold.ms / found.ms:.0f}" if cold else ""
        print(
            f"| {Path(root).name} | {workers} | {name} | {found.per_second:.0f} | {found.ms:.3f} | {found.decoded:.1f} "
            f"| {limit:.3f} | {limit / found.ms:.2f} | {faster} |",
            flush=True,
        )

    own = " x ".join(map(str, plain[0][plain.cameras[0]].shape[:2]))
    row(f"in order, {own}", rate(plain, workers, read_batch, in_order))
    row(f"random, {own}", rate(plain, workers, read_batch, batches))
    row(f"in order, {size[0]} x {size[1]}", rate(resized, workers, read_batch, in_order))
    cold = rate(resized, workers, read_batch, batches)
    row(f"random, {size[0]} x {size[1]}", cold)
    row("random, from the cache", rate(cached, workers, read_batch, batches * 10), cold)
    for name, per_second in training(root, robot, size, samples, workers, cache).items():
        print(f"| {Path(root).name} | {workers} | {name} | {per_second:.0f} | | | | | |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    tests = Path(__file__).parents[1] / "tests" / "datasets" / "metaworld_v21"
    parser.add_argument("datasets", nargs="*", default=["bundled://metaworld_v30", str(tests)])
    parser.add_argument("--size", default="224x224", help="height x width of the images (default %(default)s)")
    parser.add_argument("--samples", type=int, default=1024, help="to read at random (default %(default)s)")
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2], help="processes (default: 1 and 2)")
    parser.add_argument("--robot", default="metaworld", help="that recorded them (default %(default)s)")
    args = parser.parse_args()
    height, width = map(int, args.size.split("x"))
    print("| dataset | workers | read | samples/s | ms per sample | decoded | decoder alone, ms | ratio | times cold |")
    print("|---|---|---|---|---|---|---|---|---|", flush=True)
    with tempfile.TemporaryDirectory(prefix="pi0-data-") as cache:
        for root in args.datasets:
            for workers in args.workers:
                benchmark(root, args.robot, (height, width), args.samples, workers, Path(cache))


if __name__ == "__main__":
    main()
