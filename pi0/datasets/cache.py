"""Decode and resize all images of a dataset once, into a folder that training maps into memory; `pi0-cache`.

The folder has a folder for each camera of a dataset at a size, named by a hash of all that its images depend on
(`Dataset.cache_name`), so that a stale one is never used; see `FrameCache` for the files in it.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import tempfile
from pathlib import Path

import numpy as np
from tqdm import tqdm

from pi0.command import add_dataset, exit_on_error, local_output_path, make_parser
from pi0.datasets.base import Dataset
from pi0.datasets.engine import add_engine, run_tasks
from pi0.datasets.registry import find_format
from pi0.fetch import cache_dir
from pi0.storage import local_path, write_text


def build_cache(dataset: Dataset, folder: Path, *, workers: int = 1, engine: str = "local") -> list[Path]:
    """Decode all images of a dataset's episodes into `folder`, and return the folders of its cameras.

    Existing ones are kept. A camera's folder gets its name when it is complete. A task of `run_tasks` decodes
    one file of images; on several machines, `folder` is one that they share. Raises DataError for a damaged image,
    OSError if the disk is too small, and
    ValueError without `image_size`, or for a dataset with only some or none of its undamaged episodes.
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
        target = folder / dataset.cache_name(camera)
        if not target.exists():
            with tempfile.TemporaryDirectory(dir=folder, prefix="partial-") as partial:
                _build(dataset, camera, Path(partial, "frames"), workers, engine)
                try:
                    Path(partial, "frames").rename(target)
                except OSError:
                    if not target.exists():  # else another process was faster
                        raise
        done.append(target)
    return done


def _build(dataset: Dataset, camera: str, folder: Path, workers: int, engine: str) -> None:
    folder.mkdir()
    assert dataset.image_size is not None
    shape, file = (len(dataset), *dataset.image_size, 3), folder / "frames.npy"
    free = shutil.disk_usage(folder).free
    if math.prod(shape) > free:  # writing to mapped memory would kill the process instead
        raise OSError(f"{folder.parent} has {free / 1e9:.1f} GB left; {camera} takes {math.prod(shape) / 1e9:.1f} GB")
    np.lib.format.open_memmap(file, "w+", np.uint8, shape).flush()
    by_file: dict[Path, list[int]] = {}  # positions of the episodes whose images share a file
    for position, episode in enumerate(dataset.episodes):
        by_file.setdefault(dataset.image_source(camera, episode)[0], []).append(position)
    with tqdm(total=len(dataset), desc=f"caching {camera}", unit="frame", mininterval=1.0) as progress:
        shared, tasks = (dataset, camera, file), list(by_file.values())
        for _ in run_tasks(
            _decode_into,
            shared,
            tasks,
            workers=workers,
            engine=engine,
            progress=progress,
            amount=lambda own: sum(dataset.episodes[p].length for p in own),
        ):
            pass
    starts = dict(zip((e.index for e in dataset.episodes), dataset.starts[:-1].tolist(), strict=True))
    about = {"dataset": str(dataset.root), "camera": camera, "size": dataset.image_size, "starts": starts}
    write_text(folder / "about.json", json.dumps(about))


def _decode_into(shared: tuple[Dataset, str, Path], positions: list[int]) -> None:
    """Decode some episodes into the file of frames."""
    dataset, camera, file = shared
    frames = np.lib.format.open_memmap(file, "r+")
    for position in positions:
        for frame in range(dataset.episodes[position].length):
            frames[dataset.starts[position] + frame] = dataset.image(camera, position, frame)
    frames.flush()


def _size(text: str) -> tuple[int, int]:
    height, _, width = text.partition("x")
    if not (height.isdecimal() and width.isdecimal() and int(height) and int(width)):
        raise argparse.ArgumentTypeError(f"{text!r} is not HEIGHTxWIDTH, such as 224x224")
    return int(height), int(width)


@exit_on_error("pi0-cache")
def main(arguments: list[str] | None = None) -> None:
    """The command `pi0-cache`."""
    parser = make_parser(
        "pi0-cache",
        "Decode and resize all images of a dataset once, into files that training maps into memory: a dataset opened "
        "with image_size=SIZE and cache=FOLDER decodes nothing. Existing ones are kept; changed recordings get a new "
        "folder.",
        "examples:\n"
        "  pi0-cache bundled://metaworld_v30\n"
        "  pi0-cache hf://datasets/lerobot/pusht --size 96x96 --workers 8 --cache /fast/frames",
    )
    add_dataset(parser)
    parser.add_argument("--size", type=_size, default=(224, 224), metavar="HxW", help="of images (default 224x224)")
    add_engine(parser)
    parser.add_argument(
        "--cache", type=local_output_path, default=cache_dir() / "frames", help="the folder (default %(default)s)"
    )
    parser.add_argument("--skip-damaged", action="store_true", help="leave episodes with damaged files out")
    args = parser.parse_args(arguments)
    options = {"image_size": args.size, "skip_damaged": args.skip_damaged}
    dataset = find_format(args.format)(args.dataset, states=(), actions=(), **options)
    for problem in dataset.skipped:
        print(f"left out: {problem}")
    folders = build_cache(dataset, args.cache, workers=args.workers, engine=args.engine)
    for camera, folder in zip(dataset.cameras, folders, strict=True):
        print(f"{camera}: {(folder / 'frames.npy').stat().st_size / 1e9:.2f} GB in {folder}")
