"""One adapter per robot: its recordings in, the model's keys out, and its actions back. `ROBOTS` has them by name."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from pi0.robots.aloha import Aloha
from pi0.robots.droid import Droid
from pi0.robots.generic import Generic
from pi0.robots.libero import Libero
from pi0.robots.metaworld import MetaWorld
from pi0.robots.robofactory import RoboFactory
from pi0.robots.robot import Robot

ROBOTS: dict[str, type[Robot]] = {
    "aloha": Aloha,
    "droid": Droid,
    "generic": Generic,
    "libero": Libero,
    "metaworld": MetaWorld,
    "robofactory": RoboFactory,
}


def make_robot(reference: str | Mapping[str, Any]) -> Robot:
    """The robot that a checkpoint or a config names: "aloha", or {"name": "aloha", **options}.

    Raises ValueError for an unknown robot, and for options that are unknown, missing or wrong.
    """
    options = {"name": reference} if isinstance(reference, str) else dict(reference)
    name = options.pop("name", None)
    if name not in ROBOTS:
        raise ValueError(f"unknown robot {name!r}; known are {', '.join(ROBOTS)}")
    fields = {f.name: f for f in dataclasses.fields(ROBOTS[name])}
    unknown = sorted(options.keys() - fields.keys())
    if unknown:
        raise ValueError(f"robot {name!r} has no options {unknown}; it has {sorted(fields)}")
    needed = {n for n, f in fields.items() if f.default is f.default_factory is dataclasses.MISSING}
    missing = sorted(needed - options.keys())
    if missing:
        raise ValueError(f"robot {name!r} needs the options {missing}")
    return ROBOTS[name](**options)


__all__ = ["ROBOTS", "Aloha", "Droid", "Generic", "Libero", "MetaWorld", "RoboFactory", "Robot", "make_robot"]
