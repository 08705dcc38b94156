"""LIBERO's simulated Panda arm, as openpi and LeRobot record it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from pi0.robots.robot import Robot, default_cameras


@dataclasses.dataclass(frozen=True, kw_only=True)
class Libero(Robot):
    """A Panda arm with two cameras and end-effector control.

    state [8]: hand x, y, z in metres, axis-angle in radians, two fingers in metres; actions [T, 7]: position and
    rotation deltas and the gripper, each in [-1, 1]. `delta` subtracts the state from these deltas once more, as openpi
    did for its π0 and π0-FAST LIBERO checkpoints, but not for π0.5's (openpi `LeRobotLiberoDataConfig`). Those of
    π0-FAST have the cameras of π0, in their order: the wrist is the second camera, in the place of `base_1_rgb`, not of
    `wrist_0_rgb`, so their model config has π0's `image_keys` (the preset `pi0_fast_libero`).
    """

    cameras: Mapping[str, str] = default_cameras(image="base_0_rgb", wrist_image="left_wrist_0_rgb")

    state_dim, action_dim = 8, 7
    delta_dims = (6, -1)
