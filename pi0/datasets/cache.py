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
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from pi0.command import add_dataset, exit_on_error, local_output_path, make_parser, output_path
from pi0.datasets.arrayrecord_writer import build_records
from pi0.datasets.base import Dataset, is_camera
from pi0.datasets.engine import add_engine, require_all_episodes, run_tasks
from pi0.datasets.identity import contents_of_folder
from pi0.datasets.images import Encoding
from pi0.datasets.registry import find_format
from pi0.fetch import cache_dir
from pi0.storage import list_files, local_path, write_text

DEFAULT_ENCODING = "jpeg:95"  # of records; benchmarks/encodings.py measures all


def build_cache(dataset: Dataset, folder: Path, *, workers: int = 1, engine: str = "local") -> list[Path]:
    """Decode all images of a dataset's episodes into `folder`, and return the folders of its cameras.

    Existing ones are kept. A camera's folder gets its name when it is complete. A task of `run_tasks` decodes
    one file of images; on several machines, `folder` is one that they share. Raises DataError for a damaged image,
    OSError if the disk is too small, and
    ValueError without `image_size`, or for a dataset with only some or none of its undamaged episodes.
    """
    if dataset.image_size is None:
        raise ValueError("a cache needs a dataset with an image_size")
    require_all_episodes(dataset)
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


def _size(text: str) -> tuple[int, int] | None:
    height, _, width = text.partition("x")
    if text == "recorded":
        return None
    if not (height.isdecimal() and width.isdecimal() and int(height) and int(width)):
        raise argparse.ArgumentTypeError(f"{text!r} is not HEIGHTxWIDTH, such as 224x224, or 'recorded'")
    return int(height), int(width)


def _encoding(text: str) -> Encoding:
    try:
        return Encoding(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


@exit_on_error("pi0-cache")
def main(arguments: list[str] | None = None) -> None:
    """The command `pi0-cache`."""
    parser = make_parser(
        "pi0-cache",
        "Decode and resize all images of a dataset once. Raw, for one machine: files that training maps into memory; a "
        "dataset opened with image_size=SIZE and cache=FOLDER decodes nothing. Existing ones are kept; changed "
        "recordings get a new folder. For clusters, ArrayRecord: a dataset of the format arrayrecord with encoded "
        "images and all else, in a folder or a bucket, where training reads it at random.",
        "examples:\n"
        "  pi0-cache bundled://metaworld_v30\n"
        "  pi0-cache hf://datasets/lerobot/pusht --size 96x96 --workers 8 --cache /fast/frames\n"
        "  pi0-cache data/droid --format rlds --to arrayrecord --out gs://bucket/droid_224 --engine ray\n"
        "  pi0-train --config ... --config.data.root=gs://bucket/droid_224 --config.data.format=arrayrecord",
    )
    add_dataset(parser)
    parser.add_argument("--to", choices=("raw", "arrayrecord"), default="raw", help="what is written (default raw)")
    parser.add_argument(
        "--size", type=_size, default=(224, 224), metavar="HxW", help="of images (default 224x224), or recorded"
    )
    add_engine(parser)
    parser.add_argument(
        "--cache", type=local_output_path, help=f"raw: the folder of all caches (default {cache_dir() / 'frames'})"
    )
    parser.add_argument("--out", type=output_path, metavar="FOLDER", help="arrayrecord: the new dataset, may be gs://")
    parser.add_argument(
        "--encoding",
        type=_encoding,
        help=f"arrayrecord: of images: raw, png, jpeg:QUALITY or jpeg:QUALITY:420 (default {DEFAULT_ENCODING})",
    )
    parser.add_argument(
        "--columns", nargs="+", metavar="NAME", help="arrayrecord: of states and actions (default: all vectors)"
    )
    parser.add_argument("--skip-damaged", action="store_true", help="leave episodes with damaged files out")
    args = parser.parse_args(arguments)
    others = ("cache",) if args.to == "arrayrecord" else ("out", "encoding", "columns")
    if given := [f"--{name}" for name in others if getattr(args, name) is not None]:
        parser.error(f"{', '.join(given)}: not with --to {args.to}")
    if args.to == "arrayrecord" and args.out is None:
        parser.error("--to arrayrecord needs --out FOLDER")
    found = find_format(args.format)
    columns = args.columns or (_vectors(found.contents(found.locate(args.dataset)).features) if args.out else [])
    options = {"image_size": args.size, "skip_damaged": args.skip_damaged}
    dataset = found(args.dataset, states=columns, actions=(), **options)
    for problem in dataset.skipped:
        print(f"left out: {problem}")
    run = {"workers": args.workers, "engine": args.engine}
    if args.to == "arrayrecord":
        encoding, content = args.encoding or Encoding(DEFAULT_ENCODING), contents_of_folder(dataset.root)
        build_records(dataset, content, args.out, encoding, **run)
        size = sum(file.size for file in list_files(args.out).values())
        print(f"{len(dataset)} frames, {size / 1e9:.2f} GB, {size / len(dataset):,.0f} bytes per frame: {args.out}")
        print(f"train with --config.data.root={args.out} --config.data.format=arrayrecord")
        return
    folders = build_cache(dataset, args.cache or cache_dir() / "frames", **run)
    for camera, folder in zip(dataset.cameras, folders, strict=True):
        print(f"{camera}: {(folder / 'frames.npy').stat().st_size / 1e9:.2f} GB in {folder}")


def _vectors(features: Mapping[str, Any]) -> list[str]:
    """The columns of floats that may be a state or actions."""
    floats = {name: f for name, f in features.items() if str(f["dtype"]).startswith("float") and not is_camera(f)}
    return [name for name, feature in floats.items() if len(feature["shape"]) <= 1 and name != "timestamp"]
