"""Opening, shuffling and reading datasets of many episodes: seconds and memory, by the number of episodes.

python benchmarks/scale.py                          10³ to 10⁵ episodes of 250 frames, in a temporary folder
python benchmarks/scale.py --episodes 1000 5000

The metadata and numbers are real files in LeRobot's format v3.0 (1000 episodes in a file); all episodes show the same
frames of one bundled video. Opening is what training does: split the episodes, and open those of training and of
validation; CPU seconds are of that too. Each measurement is a process of its own. Memory is proportional (Pss), so
shared pages count once for all processes; that of 4 workers is of all of them and their parent together, after a batch
each.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pi0.datasets.base import Dataset
from pi0.datasets.mixture import Mixture, split_episodes
from pi0.datasets.registry import episode_numbers, open_dataset
from pi0.fetch import fetch
from pi0.robots.registry import make_robot

FRAMES, IN_A_FILE, DIMS, BATCH = 250, 1000, 4, 32
CAMERAS = ("observation.images.corner", "observation.images.wrist")


def make_dataset(root: Path, episodes: int) -> None:
    """Write a dataset of so many episodes."""
    info = json.loads((fetch("bundled://metaworld_v30") / "meta/info.json").read_text())
    source = fetch("bundled://metaworld_v30")
    fps = info["fps"]
    info |= {"total_episodes": episodes, "total_frames": episodes * FRAMES}
    for folder in ("meta/episodes/chunk-000", "data/chunk-000"):
        (root / folder).mkdir(parents=True)
    (root / "meta/info.json").write_text(json.dumps(info))
    shutil.copy(source / "meta/tasks.parquet", root / "meta")
    shutil.copytree(source / "videos", root / "videos")
    rng, counted = np.random.default_rng(0), np.arange(FRAMES)
    tasks = pq.read_table(source / "meta/tasks.parquet").num_rows
    for number, first in enumerate(range(0, episodes, IN_A_FILE)):
        own = np.arange(first, min(first + IN_A_FILE, episodes))
        rows = len(own) * FRAMES
        table: dict[str, Any] = {
            name: pa.FixedSizeListArray.from_arrays(pa.array(rng.random(rows * DIMS, np.float32)), DIMS)
            for name in ("observation.state", "action")
        }
        table |= {
            "timestamp": np.tile(counted / fps, len(own)).astype(np.float32),
            "frame_index": np.tile(counted, len(own)),
        }
        table |= {"episode_index": np.repeat(own, FRAMES), "index": first * FRAMES + np.arange(rows)}
        table |= {"task_index": np.repeat(own % tasks, FRAMES)}
        pq.write_table(pa.table(table), root / f"data/chunk-000/file-{number:03d}.parquet")
        listed: dict[str, Any] = {"episode_index": own, "length": np.full(len(own), FRAMES)}
        listed |= {"dataset_from_index": own * FRAMES, "data/chunk_index": np.zeros(len(own), int)}
        listed |= {"data/file_index": np.full(len(own), number)}
        for camera in CAMERAS:
            listed |= {f"videos/{camera}/{name}_index": np.zeros(len(own), int) for name in ("chunk", "file")}
            listed |= {f"videos/{camera}/from_timestamp": np.zeros(len(own))}
            listed |= {f"videos/{camera}/to_timestamp": np.full(len(own), FRAMES / fps)}
        pq.write_table(pa.table(listed), root / f"meta/episodes/chunk-000/file-{number:03d}.parquet")


def own_memory(field: str = "Pss") -> float:
    """The proportional memory of this process in MB, all of it or `Pss_Anon`, without the pages of mapped files."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(f"{field}:")).split()[1]) / 1e3


def worker(mixture: Mixture, number: int, found: Any, barrier: Any) -> None:
    """Read a batch in another process, and put its memory."""
    for position in range(number * BATCH, (number + 1) * BATCH):
        mixture[position]
    barrier.wait()
    found.put((own_memory(), own_memory("Pss_Anon")))
    barrier.wait()


def measure(root: Path) -> dict[str, float]:
    """One start of training's data, in this process."""
    robot, begin, cpu = make_robot("metaworld"), time.perf_counter(), time.process_time()
    before = own_memory()
    training, validation = split_episodes(episode_numbers(root), 0.01)
    options: dict[str, Any] = {"action_horizon": 50, "image_size": (224, 224)}
    datasets: list[Dataset] = [open_dataset(root, robot, episodes=part, **options) for part in (training, validation)]
    found = {"open": time.perf_counter() - begin, "of it CPU": time.process_time() - cpu}

    def timed(name: str, position: int, read: Any) -> None:
        start = time.perf_counter()
        for i in range(position, position + BATCH):
            read(i)
        found[name] = time.perf_counter() - start

    mixture = Mixture(datasets[:1], seed=1)
    timed("shuffle", 0, mixture.locate)
    timed("first batch", 0, mixture.__getitem__)
    timed("resume at 10⁶", 10**6 * BATCH, mixture.__getitem__)
    context = multiprocessing.get_context("spawn")
    queue, barrier = context.Queue(), context.Barrier(5)
    workers = [context.Process(target=worker, args=(mixture, n, queue, barrier)) for n in range(4)]
    for process in workers:
        process.start()
    barrier.wait()
    sizes = np.array([queue.get() for _ in workers] + [(own_memory(), own_memory("Pss_Anon"))]).sum(0)
    barrier.wait()
    for process in workers:
        process.join()
    return found | {"MB": own_memory(), "MB before": before, "MB of 5": sizes[0], "of it not files": sizes[1]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--episodes", type=int, nargs="+", default=[10**3, 10**4, 10**5])
    parser.add_argument("--folder", type=Path, help="for the datasets (default: temporary)")
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        print(json.dumps(measure(args.measure)))
        return
    names = ["open", "of it CPU", "shuffle", "first batch", "resume at 10⁶"]
    names += ["MB before", "MB", "MB of 5", "of it not files"]
    print(f"| episodes | start | {' | '.join(names)} |\n|{'---|' * (len(names) + 2)}", flush=True)
    for episodes in args.episodes:
        with tempfile.TemporaryDirectory(prefix="pi0-scale-", dir=args.folder) as folder:
            make_dataset(Path(folder, "dataset"), episodes)
            environment = os.environ | {"PI0_CACHE": str(Path(folder, "cache"))}
            for start in ("first", "second", "third"):
                command = [sys.executable, __file__, "--measure", str(Path(folder, "dataset"))]
                out = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
                if out.returncode:
                    raise SystemExit(out.stderr)
                found = json.loads(out.stdout.splitlines()[-1])
                row = " | ".join(f"{found[name]:.3g}" for name in names)
                print(f"| {episodes} | {start} | {row} |", flush=True)


if __name__ == "__main__":
    main()
