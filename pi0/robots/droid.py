"""The Franka arm of the DROID platform."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping, Sequence
from typing import ClassVar

from pi0.robots.robot import Robot, default_cameras


@dataclasses.dataclass(frozen=True, kw_only=True)
class Droid(Robot):
    """A Franka arm with an exterior camera and one at the wrist.

    state [8]: seven joints in radians, gripper from 0 (open) to 1 (closed); actions [T, 8]: joint velocities in [-1, 1]
    and the gripper position. With `delta` the recorded actions are joint positions in radians instead, and the model's
    are relative to the state. π0-FAST's cameras have other names: set the option `cameras` to
    {"exterior_image_1_left": "base_0_rgb", "wrist_image_left": "wrist_0_rgb"} (openpi `droid_policy.py`).
    """

    cameras: Mapping[str, str] = default_cameras(
        exterior_image_1_left="base_0_rgb", wrist_image_left="left_wrist_0_rgb"
    )

    state_dim, action_dim = 8, 8
    velocities: ClassVar[Sequence[str]] = ("action_dict/joint_velocity", "action_dict/gripper_position")  # of RLDS
    positions: ClassVar[Sequence[str]] = ("action_dict/joint_position", "action_dict/gripper_position")
    state_names = (("joint_position", "gripper_position"), ("state",))
    delta_dims = (7, -1)

    def action_keys(self, available: Collection[str]) -> list[str]:
        """Of RLDS, the columns of joint velocities or, with `delta`, positions; of others, as of any robot."""
        recorded = self.positions if self.delta else self.velocities
        return list(recorded) if all(name in available for name in recorded) else super().action_keys(available)
