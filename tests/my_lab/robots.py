"""A robot of another package, named as "tests.my_lab.robots:TwoCameras"."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import numpy as np

from pi0.robots.robot import Robot


@dataclasses.dataclass(frozen=True, kw_only=True)
class TwoCameras(Robot):
    """An arm of three joints and a gripper: its views left and right, cropped, stacked; the wrist's upside down."""

    cameras: Mapping[str, str] = dataclasses.field(
        default_factory=lambda: {"left": "base_0_rgb", "right": "base_0_rgb", "wrist": "left_wrist_0_rgb"}
    )

    state_dim, action_dim = 4, 4
    state_names = (("arm", "gripper"), ("state",))
    action_names = (("action.arm", "action.gripper"), ("action",))

    def adapt_images(self, images: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        halves = [images[name][2:-3, 5:31] for name in ("left", "right")]
        return {"base_0_rgb": np.concatenate(halves), "left_wrist_0_rgb": images["wrist"][::-1, ::-1]}
