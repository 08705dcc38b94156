"""ALOHA's two simulated arms (gym-aloha). The extra `sim-aloha`."""

from __future__ import annotations

import types
from collections.abc import Sequence
from typing import Any

import numpy as np

from pi0.plugins import require_extra
from pi0_eval.environments.environment import Environment
from pi0_eval.environments.mujoco import import_mujoco

INSTRUCTIONS = {"transfer_cube": "Transfer cube", "insertion": "Insert the peg into the socket"}
CAMERAS = {"cam_high": "top"}


class AlohaSim(Environment):
    """The tasks "transfer_cube" and "insertion".

    The state is [14]: six joints in radians and the gripper, 0 (closed) to 1 (open), of each arm; actions are
    targets of the same. Rewards are those of gym-aloha, 4 of which is success. One camera, `cam_high`, as in openpi's
    `examples/aloha_sim`, with 640 x 480 pixels.
    """

    robot = types.MappingProxyType({"name": "aloha", "cameras": {"cam_high": "base_0_rgb"}, "adapt_to_pi": False})
    default_cameras = tuple(CAMERAS)
    fps, limit = 50.0, 300

    def __init__(self, task: str, cameras: Sequence[str] | None = None):
        (task,) = self.tasks(task)
        self.cameras = tuple(self.default_cameras if cameras is None else cameras)
        if unknown := sorted(set(self.cameras) - CAMERAS.keys()):
            raise ValueError(f"gym-aloha has no cameras {unknown}; it has {', '.join(CAMERAS)}")
        from gym_aloha.env import AlohaEnv
        from gym_aloha.tasks.sim import BOX_POSE
        from gym_aloha.utils import sample_box_pose, sample_insertion_pose

        self.instruction = INSTRUCTIONS[task]
        self._pose: Any = BOX_POSE  # where gym-aloha looks for what an episode begins with
        self._sample: Any = (
            sample_box_pose if task == "transfer_cube" else lambda n: np.concatenate(sample_insertion_pose(n))
        )
        self._env: Any = AlohaEnv(task, obs_type="pixels_agent_pos")._env
        self._env.task.get_observation = lambda physics: {}  # it renders three cameras at every step
        self._reward = 0.0
        self.reset(0, 0)
        self.idle_action = self._state()

    @classmethod
    def tasks(cls, name: str) -> list[str]:
        require_extra("sim-aloha", "gym_aloha")
        import_mujoco()  # before dm_control, which would have it render to a display
        if name not in INSTRUCTIONS:
            raise ValueError(f"gym-aloha has no task {name!r}; it has {', '.join(INSTRUCTIONS)}")
        return [name]

    def reset(self, seed: int, episode: int) -> None:
        self._pose[0] = self._sample(seed + episode)
        self._env.reset()
        self._reward = 0.0

    def step(self, action: np.ndarray) -> None:
        self._reward = float(self._env.step(np.asarray(action, np.float64)).reward)

    def observe(self) -> dict[str, Any]:
        render = self._env.physics.render
        images = {name: render(height=480, width=640, camera_id=CAMERAS[name]).copy() for name in self.cameras}
        return images | {"state": self._state(), "prompt": self.instruction}

    def _state(self) -> np.ndarray:
        return self._env.task.get_qpos(self._env.physics).astype(np.float32)

    @property
    def success(self) -> bool:
        return self._reward == 4

    def simulator_state(self) -> np.ndarray:
        return np.concatenate([self._env.physics.data.qpos, self._env.physics.data.qvel])

    def close(self) -> None:
        self._env.close()
