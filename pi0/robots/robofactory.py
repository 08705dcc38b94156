"""One arm of RoboFactory's multi-robot tasks."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from pi0.robots.robot import Robot


@dataclasses.dataclass(frozen=True, kw_only=True)
class RoboFactory(Robot):
    """A simulated Panda arm with three views: from its side, from above the scene, and from its wrist.

    state and actions [T,8]: seven joint positions in radians and the gripper, absolute (or relative to the state, with
    `delta`). Its checkpoints are normalized by "quantile01", and have the view from above where others have the left
    wrist (OpenMARL's data processing for π0).
    """

    cameras: Mapping[str, str] = dataclasses.field(
        default_factory=lambda: {
            "head_camera": "base_0_rgb",
            "global_camera": "left_wrist_0_rgb",
            "wrist_camera": "right_wrist_0_rgb",
        }
    )

    state_dim, action_dim = 8, 8
    delta_dims = (7, -1)
