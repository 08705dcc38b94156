"""The Sawyer arm of Meta-World, as in the bundled sample."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from pi0.robots.robot import Robot, default_cameras


@dataclasses.dataclass(frozen=True, kw_only=True)
class MetaWorld(Robot):
    """A Sawyer arm with two cameras.

    state [4]: hand x, y, z in metres, gripper opening; actions [T, 4]: dx, dy, dz, gripper, each in [-1, 1].
    """

    cameras: Mapping[str, str] = default_cameras(corner="base_0_rgb", wrist="left_wrist_0_rgb")

    state_dim, action_dim = 4, 4
