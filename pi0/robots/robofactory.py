"""One arm of RoboFactory's multi-robot tasks."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from pi0.robots.robot import Robot, default_cameras


@dataclasses.dataclass(frozen=True, kw_only=True)
class RoboFactory(Robot):
    """A simulated Panda arm with three cameras: at its side, above the scene, and at its wrist.

    state [8] and actions [T, 8]: seven joint positions in radians and the gripper; with `delta` the model's actions are
    relative to the state. Its checkpoints are normalized by "quantile01", and take the camera above the scene where
    others take the left wrist (OpenMARL's data processing for π0).
    """

    cameras: Mapping[str, str] = default_cameras(
        head_camera="base_0_rgb", global_camera="left_wrist_0_rgb", wrist_camera="right_wrist_0_rgb"
    )

    state_dim, action_dim = 8, 8
    delta_dims = (7, -1)
