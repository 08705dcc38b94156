"""Bytes and time of a camera's frame in each encoding of `pi0-cache --to arrayrecord`, and what it does to pixels.

python benchmarks/encodings.py                                          the recordings that come along
python benchmarks/encodings.py hf://datasets/lerobot/pusht --size 96x96

Frames are drawn at random, over all cameras, from images that are resized as in training. Times are CPU time of one
thread, encodings in turn for each frame, the median over frames. Pixels are compared with those before encoding: what
the recording's own encoding, such as a video's, did to them is there already.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from pi0.datasets.images import Encoding
from pi0.datasets.lerobot import LeRobotDataset

ENCODINGS = ("raw", "png", "jpeg:98", "jpeg:95", "jpeg:90", "jpeg:98:420", "jpeg:95:420", "jpeg:90:420")


def timed(function: Callable[..., Any], *arguments: Any) -> tuple[Any, float]:
    """What a call returns, and its milliseconds of CPU time."""
    begin = time.thread_time()
    found = function(*arguments)
    return found, 1e3 * (time.thread_time() - begin)


def benchmark(root: str, size: tuple[int, int], count: int, names: list[str]) -> None:
    """Print a dataset's rows of the table."""
    dataset = LeRobotDataset(root, image_size=size, skip_damaged=True)
    rng = np.random.default_rng(0)
    rows: dict[str, list[tuple[float, ...]]] = {name: [] for name in names}
    for i in rng.choice(len(dataset), min(count, len(dataset)), replace=False):
        item = dataset[int(i)]
        for camera in dataset.cameras:
            image = item[camera]
            for name, row in rows.items():
                encoding = Encoding(name)
                stored, encode_ms = timed(encoding.encode, image)
                found, decode_ms = timed(encoding.decode, stored, size)
                error = np.abs(found.astype(int) - image)
                row.append((len(stored), encode_ms, decode_ms, error.mean(), error.max()))
    for name, row in rows.items():
        columns: Any = zip(*row, strict=True)
        sizes, encode, decode, mean, largest = columns
        cells = f"{statistics.mean(sizes):,.0f} | {statistics.median(encode):.2f} | {statistics.median(decode):.2f}"
        print(f"| {Path(root).name} | {name} | {cells} | {statistics.mean(mean):.2f} | {max(largest)} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    tests = Path(__file__).parents[1] / "tests" / "datasets" / "metaworld_v21"
    parser.add_argument("datasets", nargs="*", default=["bundled://metaworld_v30", str(tests)])
    parser.add_argument("--size", default="224x224", help="height x width of the images (default %(default)s)")
    parser.add_argument("--frames", type=int, default=100, help="of each dataset (default %(default)s)")
    parser.add_argument("--encodings", nargs="+", default=list(ENCODINGS), help="(default: all)")
    args = parser.parse_args()
    height, width = map(int, args.size.split("x"))
    print("| dataset | encoding | bytes | encode ms | decode ms | mean difference of 255 | largest |")
    print("|---|---|---|---|---|---|---|", flush=True)
    for root in args.datasets:
        benchmark(root, (height, width), args.frames, args.encodings)


if __name__ == "__main__":
    main()
