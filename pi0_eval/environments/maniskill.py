"""ManiSkill 3's tasks of one Panda arm, on which RoboFactory builds. The extra `sim-maniskill`."""

from __future__ import annotations

import re
import types
from collections.abc import Sequence
from typing import Any

import numpy as np

from pi0.plugins import require_extra
from pi0_eval.environments.environment import Environment

CAMERAS = {"base_camera": "base_0_rgb", "hand_camera": "left_wrist_0_rgb"}
ROBOT = "panda_wristcam"
INSTRUCTIONS = {
    "PickCube-v1": "pick up the cube and move it to the goal",
    "PushCube-v1": "push the cube to the goal",
    "StackCube-v1": "stack the red cube on the green one",
    "PegInsertionSide-v1": "insert the peg into the hole",
}


class ManiSkill(Environment):
    """A task of ManiSkill by its name there, such as "PickCube-v1", simulated by PhysX on the CPU.

    The state is [8]: seven joints in radians and a finger in metres; actions are targets of the joints, and the
    gripper, -1 (closed) to 1 (open). Images are those of the task's own cameras, 128 x 128 pixels by default. SAPIEN
    renders with Vulkan: without a GPU, Mesa's llvmpipe does from version 23 on (Debian: `mesa-vulkan-drivers` of
    bookworm-backports).
    """

    robot = types.MappingProxyType(
        {"name": "generic", "cameras": CAMERAS, "state": [[0, 8]], "actions": [[0, 8]], "delta_dims": [7, -1]}
    )
    default_cameras = tuple(CAMERAS)

    def __init__(self, task: str, cameras: Sequence[str] | None = None):
        (task,) = self.tasks(task)
        import gymnasium

        self.cameras = tuple(self.default_cameras if cameras is None else cameras)
        self.limit = gymnasium.spec(task).max_episode_steps or 200
        self.instruction = INSTRUCTIONS.get(task, " ".join(re.findall("[A-Z][a-z]*", task)).lower())
        options: dict[str, Any] = {"obs_mode": "rgb", "control_mode": "pd_joint_pos", "robot_uids": ROBOT}
        options |= {"sim_backend": "physx_cpu"}
        self._env: Any
        try:
            self._env = gymnasium.make(task, **options).unwrapped
        except RuntimeError as error:
            if "physical device" not in str(error) and "rendering device" not in str(error):
                raise
            raise RuntimeError(
                f"SAPIEN found no Vulkan device to render with ({error}); install a GPU's driver or "
                "mesa-vulkan-drivers 23 or newer"
            ) from error
        if unknown := sorted(set(self.cameras) - self._env._sensors.keys()):
            raise ValueError(f"{task} has no cameras {unknown}; it has {', '.join(self._env._sensors)}")
        self._env._obs_mode = "none"  # it renders all cameras at every step: `observe` renders
        self.fps = float(self._env.control_freq)
        self.reset(0, 0)
        self.idle_action = np.append(self._state()[:7], 1).astype(np.float32)

    @classmethod
    def tasks(cls, name: str) -> list[str]:
        require_extra("sim-maniskill", "mani_skill", "sapien")
        import mani_skill.envs  # noqa: F401  registers them
        from mani_skill.utils.registration import REGISTERED_ENVS

        if name not in REGISTERED_ENVS:
            raise ValueError(f"ManiSkill has no task {name!r}; it has {', '.join(sorted(REGISTERED_ENVS))}")
        return [name]

    def reset(self, seed: int, episode: int) -> None:
        # Everything is built anew: some tasks draw their objects only then.
        self._env.reset(seed=seed + episode, options={"reconfigure": True})
        self._success = False

    def step(self, action: np.ndarray) -> None:
        info = self._env.step(np.asarray(action, np.float32))[-1]
        self._success = bool(info.get("success", False))

    def observe(self) -> dict[str, Any]:
        found = self._env._get_obs_sensor_data()
        images = {name: found[name]["rgb"][0].cpu().numpy() for name in self.cameras}
        return images | {"state": self._state(), "prompt": self.instruction}

    def _state(self) -> np.ndarray:
        return self._env.agent.robot.get_qpos()[0, :8].cpu().numpy().astype(np.float32)

    @property
    def success(self) -> bool:
        return self._success

    def simulator_state(self) -> np.ndarray:
        return self._env.get_state()[0].cpu().numpy()

    def close(self) -> None:
        self._env.close()
