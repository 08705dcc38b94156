"""Robots by name."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from pi0.plugins import resolve
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


def make_robot(reference: str | Mapping[str, Any], imports: bool = True) -> Robot:
    """The robot of a name, one of ROBOTS or "module:Name" of another package, or of {"name": name, **options}.

    Without `imports`, for a reference that comes with a checkpoint, the module must have been imported already. Raises
    ValueError for an unknown robot, a class that is not a Robot, and options that are unknown, missing or wrong.
    """
    options = {"name": reference} if isinstance(reference, str) else dict(reference)
    name = options.pop("name", None)
    found = resolve(name, ROBOTS, "robot", imports=imports)
    if not (isinstance(found, type) and issubclass(found, Robot)):
        raise ValueError(f"the robot {name!r} must be a subclass of pi0.robots.robot.Robot; it is {found!r:.80}")
    fields = {f.name: f for f in dataclasses.fields(found)}
    unknown = sorted(options.keys() - fields.keys())
    if unknown:
        raise ValueError(f"robot {name!r} has no options {unknown}; it has {sorted(fields)}")
    needed = {n for n, f in fields.items() if f.default is f.default_factory is dataclasses.MISSING}
    missing = sorted(needed - options.keys())
    if missing:
        raise ValueError(f"robot {name!r} needs the options {missing}")
    return found(**options)
