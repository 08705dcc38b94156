"""Decoded pictures, resized once and kept: in memory, or in a folder that `pi0-cache` fills; see `build_cache`.

In the folder there is a folder for each camera of a dataset at a size, named by a hash of all that its pictures depend
on, so that a stale one is never found. It holds `frames.npy`, uint8 [F, H, W, 3], which is mapped into memory, and
`about.json`, which says where in it each episode starts.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import hashlib
import json
import logging
import math
import multiprocessing
import os
import shutil
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from tqdm import tqdm

from pi0.command import output_path
from pi0.fetch import cache_dir
from pi0.storage import local_path

if TYPE_CHECKING:
    from pi0.datasets.lerobot import LeRobotDataset

MEMORY = "memory"  # in place of a folder
REVISION = 1  # of what is stored: raise it when decoding or resizing changes

_work: tuple[LeRobotDataset, str, np.memmap]  # in a worker: what it decodes, and into what

logger = logging.getLogger(__name__)


class FrameMemory:
    """One camera's pictures by (episode, frame), each kept once it has been decoded. A pickled one starts empty."""

    def __init__(self) -> None:
        self._pictures: dict[tuple[int, int], np.ndarray] = {}

    def __reduce__(self) -> tuple[type[FrameMemory], tuple[()]]:
        return FrameMemory, ()

    def read(self, episode: int, frame: int) -> np.ndarray | None:
        """The picture [H, W, 3], read-only, if it is there."""
        return self._pictures.get((episode, frame))

    def store(self, episode: int, frame: int, picture: np.ndarray) -> None:
        """Keep a picture."""
        picture.flags.writeable = False
        self._pictures[episode, frame] = picture


class FrameCache:
    """One camera's pictures from a folder that `build_cache` wrote. A pickled one opens the folder again."""

    def __init__(self, folder: Path):
        self.folder = folder
        self._frames = np.asarray(np.load(folder / "frames.npy", mmap_mode="r"))
        self._starts = {int(n): start for n, start in json.loads((folder / "about.json").read_text())["starts"].items()}

    def __reduce__(self) -> tuple[type[FrameCache], tuple[Path]]:
        return FrameCache, (self.folder,)

    def read(self, episode: int, frame: int) -> np.ndarray | None:
        """The picture [H, W, 3], read-only, unless its episode was damaged when the cache was built."""
        start = self._starts.get(episode)
        return None if start is None else self._frames[start + frame]

    def store(self, episode: int, frame: int, picture: np.ndarray) -> None:
        """Nothing: what is there was complete when it was written."""


def open_cache(dataset: LeRobotDataset, folder: Path) -> dict[str, FrameCache]:
    """The caches in `folder` that are complete, by camera; the other cameras have to be decoded, which is logged."""
    found = {camera: _folder(dataset, camera, folder) for camera in dataset.cameras}
    missing = [camera for camera, path in found.items() if not path.exists()]
    if missing:
        logger.warning("%s has no pictures of %s of %s: decoding them", folder, missing, dataset.root)
    return {camera: FrameCache(path) for camera, path in found.items() if path.exists()}


def build_cache(dataset: LeRobotDataset, folder: Path, *, workers: int = 1) -> list[Path]:
    """Decode all pictures of a dataset's episodes into `folder`, and return the folders of its cameras.

    What is there already is kept. A camera's folder gets its name once it is complete. Each of the `workers` processes
    takes one file of pictures after the other. Raises DataError for a damaged picture, OSError if the disk is too
    small, and ValueError without `image_size`, or for a dataset with only some or none of the episodes that are whole.
    """
    if dataset.image_size is None:
        raise ValueError("a cache needs a dataset with an image_size")
    damaged = {problem.episode for problem in dataset.skipped}
    if {episode.index for episode in dataset.every_episode} - damaged != {e.index for e in dataset.episodes}:
        raise ValueError("a cache needs a dataset with all of its episodes")
    if not dataset.episodes:
        raise ValueError(f"all episodes of {dataset.root} are damaged")
    folder = local_path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    done = []
    for camera in dataset.cameras:
        target = _folder(dataset, camera, folder)
        if not target.exists():
            with tempfile.TemporaryDirectory(dir=folder, prefix="partial-") as partial:
                _build(dataset, camera, Path(partial, "frames"), workers)
                try:
                    Path(partial, "frames").rename(target)
                except OSError:
                    if not target.exists():  # else another process was faster
                        raise
        done.append(target)
    return done


def _build(dataset: LeRobotDataset, camera: str, folder: Path, workers: int) -> None:
    folder.mkdir()
    assert dataset.image_size is not None
    shape, file = (len(dataset), *dataset.image_size, 3), folder / "frames.npy"
    free = shutil.disk_usage(folder).free
    if math.prod(shape) > free:  # writing to mapped memory would kill the process instead
        raise OSError(f"{folder.parent} has {free / 1e9:.1f} GB left; {camera} takes {math.prod(shape) / 1e9:.1f} GB")
    np.lib.format.open_memmap(file, "w+", np.uint8, shape).flush()
    by_source: dict[Path, list[int]] = {}  # positions of the episodes whose pictures share a file
    for position, episode in enumerate(dataset.episodes):
        source = episode.clips[camera].file if camera in episode.clips else episode.data_file
        by_source.setdefault(source, []).append(position)
    progress = tqdm(total=len(dataset), desc=f"caching {camera}", unit="frame", mininterval=1.0)
    with progress:
        if workers == 1:
            _start_worker(dataset, camera, file)
            for positions in by_source.values():
                progress.update(_decode_into(positions))
        else:
            context = multiprocessing.get_context("spawn")
            arguments = (dataset, camera, file)
            with concurrent.futures.ProcessPoolExecutor(workers, context, _start_worker, arguments) as pool:
                jobs = [pool.submit(_decode_into, positions) for positions in by_source.values()]
                try:
                    for job in concurrent.futures.as_completed(jobs):
                        progress.update(job.result())
                finally:
                    pool.shutdown(cancel_futures=True)
    starts = dict(zip((e.index for e in dataset.episodes), dataset.starts.tolist(), strict=False))
    about = {"dataset": str(dataset.root), "camera": camera, "size": dataset.image_size, "starts": starts}
    (folder / "about.json").write_text(json.dumps(about))


def _start_worker(dataset: LeRobotDataset, camera: str, file: Path) -> None:
    global _work
    _work = dataset, camera, np.lib.format.open_memmap(file, "r+")


def _decode_into(positions: list[int]) -> int:
    """Decode some episodes into the file of frames, and return how many frames they have."""
    dataset, camera, frames = _work
    count = 0
    for position in positions:
        for frame in range(dataset.episodes[position].length):
            frames[dataset.starts[position] + frame] = dataset.picture(camera, position, frame)
            count += 1
    frames.flush()
    return count


def _folder(dataset: LeRobotDataset, camera: str, folder: Path) -> Path:
    """Where a camera's cache lies: named by a hash of the episode table, and of size and time of every file in it."""
    parts: list[object] = [REVISION, dataset.image_size, dataset.fps, camera]
    files: set[Path] = set()
    for episode in dataset.every_episode:
        clip = episode.clips.get(camera)
        source = episode.data_file if clip is None else clip.file
        files.add(source)
        place = episode.first_index if clip is None else (clip.start, clip.end)
        parts.append((episode.index, episode.length, source.relative_to(dataset.root).as_posix(), place))
    for file in sorted(files):
        stat = file.stat() if file.exists() else None
        parts.append(stat and (stat.st_size, stat.st_mtime_ns))
    return folder / hashlib.sha256(repr(parts).encode()).hexdigest()[:32]


def _size(text: str) -> tuple[int, int]:
    height, _, width = text.partition("x")
    if not (height.isdecimal() and width.isdecimal() and int(height) and int(width)):
        raise argparse.ArgumentTypeError(f"{text!r} is not HEIGHTxWIDTH, such as 224x224")
    return int(height), int(width)


def main(arguments: list[str] | None = None) -> None:
    """The command `pi0-cache`."""
    from pi0.datasets.lerobot import LeRobotDataset

    parser = argparse.ArgumentParser(
        prog="pi0-cache",
        description="Decode and resize all pictures of a LeRobot dataset once, into files that training maps into "
        "memory: `LeRobotDataset(DATASET, image_size=SIZE, cache=FOLDER)` then decodes nothing. What is there is kept; "
        "changed recordings get a new place.",
        epilog="examples:\n"
        "  pi0-cache bundled://metaworld_v30\n"
        "  pi0-cache hf://datasets/lerobot/pusht --size 96x96 --workers 8 --cache /fast/frames",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("dataset", help="a dataset's folder, hf://datasets/... or bundled://...")
    parser.add_argument("--size", type=_size, default=(224, 224), metavar="HxW", help="of pictures (default 224x224)")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes (default: one per core)")
    parser.add_argument(
        "--cache", type=output_path, default=cache_dir() / "frames", help="the folder (default %(default)s)"
    )
    parser.add_argument("--skip-damaged", action="store_true", help="leave episodes with damaged files out")
    args = parser.parse_args(arguments)
    try:
        if args.workers < 1:
            raise ValueError(f"--workers is {args.workers}; at least 1 is needed")
        dataset = LeRobotDataset(args.dataset, image_size=args.size, skip_damaged=args.skip_damaged)
        for problem in dataset.skipped:
            print(f"left out: {problem}")
        for camera, folder in zip(dataset.cameras, build_cache(dataset, args.cache, workers=args.workers), strict=True):
            print(f"{camera}: {(folder / 'frames.npy').stat().st_size / 1e9:.2f} GB in {folder}")
    except (ValueError, OSError) as error:
        print(f"pi0-cache: {error}", file=sys.stderr)
        sys.exit(1)
