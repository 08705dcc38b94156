"""ALOHA: two arms of six joints and a gripper each, real or simulated."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping

import numpy as np

from pi0.robots.robot import Robot, default_cameras

SIGNS = np.array([1, -1, -1, 1, 1, 1, 1] * 2)  # the joint directions in the data of the base models
GRIPPERS = [6, 13]
LINEAR = (0.01844, 0.05800)  # metres, closed and open
ANGLE = (0.5476, 1.6296)  # radians, gripper angles of the base models' data
OWN_ANGLE = (-0.6213, 1.4910)  # radians, gripper angles of ALOHA's commands
HORN, ARM = 0.022, 0.036  # metres, links of the gripper


@dataclasses.dataclass(frozen=True, kw_only=True)
class Aloha(Robot):
    """Two arms with a camera above and one at either wrist; in simulation only the one above ("top").

    openpi masks the wrist cameras that a frame lacks: set the option `optional_cameras` to them for that.

    state [14] and actions [T, 14]: for each arm six joints in radians and the gripper from 0 (closed) to 1 (open).
    `adapt_to_pi` converts to the joint signs and gripper angles of the base models' data; with `delta` the joints of
    the model's actions are relative to the state, the grippers never (openpi `aloha_policy.py`).
    """

    cameras: Mapping[str, str] = default_cameras(
        cam_high="base_0_rgb", cam_left_wrist="left_wrist_0_rgb", cam_right_wrist="right_wrist_0_rgb"
    )
    delta: bool = True
    adapt_to_pi: bool = True

    state_dim, action_dim = 14, 14
    delta_dims = (6, -1, 6, -1)

    def adapt_state(self, state: np.ndarray) -> np.ndarray:
        return self._adapt(state, gripper_to_angle)

    def adapt_actions(self, actions: np.ndarray) -> np.ndarray:
        return self._adapt(actions, lambda x: x * (OWN_ANGLE[1] - OWN_ANGLE[0]) + OWN_ANGLE[0] - ANGLE[0])

    def restore_actions(self, actions: np.ndarray) -> np.ndarray:
        return self._adapt(actions, lambda x: (x + ANGLE[0] - OWN_ANGLE[0]) / (OWN_ANGLE[1] - OWN_ANGLE[0]))

    def _adapt(self, x: np.ndarray, gripper: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
        if not self.adapt_to_pi:
            return x
        x = x * SIGNS
        x[..., GRIPPERS] = gripper(x[..., GRIPPERS])
        return x


def gripper_to_angle(x: np.ndarray) -> np.ndarray:
    """Convert a gripper position in [0, 1] of LINEAR to the angle of its horn in [0, 1] of ANGLE."""
    p = x * (LINEAR[1] - LINEAR[0]) + LINEAR[0]
    angle = np.arcsin(np.clip((HORN**2 + p**2 - ARM**2) / (2 * HORN * p), -1, 1))
    return (angle - ANGLE[0]) / (ANGLE[1] - ANGLE[0])
