"""Dataset formats by name, and how to open a robot's recordings in any of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pi0.datasets.base import Dataset
from pi0.datasets.frames import MEMORY
from pi0.plugins import require_extra, resolve
from pi0.robots.robot import Robot

FORMATS = {
    "lerobot": "pi0.datasets.lerobot:LeRobotDataset",
    "rlds": "pi0.datasets.rlds:RLDSDataset",
    "arrayrecord": "pi0.datasets.arrayrecord:ArrayRecordDataset",
}


def find_format(name: str) -> type[Dataset]:
    """The class of a dataset format: one of FORMATS, or "module:Name" of another package.

    Raises ValueError for an unknown format, and MissingExtraError where its packages are not installed.
    """
    found = resolve(name, FORMATS, "dataset format")
    if name in FORMATS:
        require_extra("data", "av", "pyarrow")
        found = resolve(found, {}, "dataset format")
    if not isinstance(found, type) or Dataset not in found.__mro__:
        raise ValueError(f"the dataset format {name!r} must be a subclass of pi0.datasets.base.Dataset; it is {found}")
    return found


def open_dataset(root: str | Path, robot: Robot, *, format: str = "lerobot", **options: Any) -> Dataset:
    """The recordings of a robot: its cameras, and the columns of its state and actions.

    `options` are those of `Dataset`. A robot that adapts images gets them at their recorded size, as live ones, so
    `image_size` does not apply to it. Raises ValueError where the dataset is not the robot's, and for such a robot with
    a cache of resized images.
    """
    found = find_format(format)
    root = found.locate(root)
    features = found.contents(root).features
    actions = robot.action_keys(features)
    if not actions:
        raise ValueError(f"{root} has no actions; it has {sorted(features)}")
    if robot.adapts_images:
        options["image_size"] = None
        if (size := found.stored_size(root)) is not None:
            raise ValueError(
                f"{root}: {type(robot).__name__} adapts images at their recorded size, and here they have {size}: "
                "make it again with pi0-cache --to arrayrecord --size recorded"
            )
        if (cache := options.get("cache")) not in (None, MEMORY):
            raise ValueError(
                f"cache {cache}: {type(robot).__name__} adapts images at their recorded size, and the cache has "
                f"resized ones; use {MEMORY!r} or no cache"
            )
    own = {"cameras": robot.camera_keys(features), "states": robot.state_keys(features), "actions": actions}
    return found(root, **own | options)


def episode_numbers(root: str | Path, format: str = "lerobot") -> list[int]:
    """The numbers of a dataset's episodes, without reading them."""
    found = find_format(format)
    return found.episode_numbers(found.locate(root))
