"""Meta-World's Sawyer arm: 50 tasks, and the scripted expert of each. The extra `sim-metaworld`."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np

from pi0.plugins import require_extra
from pi0_eval.environments.environment import Environment, Expert
from pi0_eval.environments.mujoco import Renderer, import_mujoco

# The cameras of Meta-World's scenes, and the name that recordings of the robot `metaworld` have for one.
CAMERAS = ("corner", "corner2", "corner3", "corner4", "topview", "behindGripper", "gripperPOV")
ALIASES = {"wrist": "gripperPOV"}
# What a policy is told where the name of a task says it less well.
INSTRUCTIONS = {
    "reach-v3": "reach the red target",
    "push-v3": "push the puck to the goal",
    "drawer-open-v3": "open the drawer",
    "button-press-topdown-v3": "press the button from the top",
    "door-open-v3": "open the door",
    "window-open-v3": "open the window",
}


class MetaWorld(Environment):
    """A task of Meta-World (v3).

    The state is that of the hand and the gripper alone, [4]: where the goal and the objects are, only the images tell.
    The goal of some tasks is a coloured ball in them. A seed draws the goal and the objects' places anew; Meta-World
    itself repeats the last ones unless it is told to. Images are `size` pixels high and wide and as MuJoCo renders
    them: those of `corner` show the arm from above, hanging, as in the bundled recordings. `full` renders as Meta-World
    does, with shadows, reflections and antialiasing.
    """

    robot = "metaworld"
    default_cameras = ("corner", "wrist")
    fps, limit = 80.0, 500

    def __init__(self, task: str, cameras: Sequence[str] | None = None, *, size: int = 128, full: bool = False):
        (task,) = self.tasks(task)
        self.cameras = tuple(self.default_cameras if cameras is None else cameras)
        if unknown := sorted(set(self.cameras) - {*CAMERAS, *ALIASES}):
            raise ValueError(f"Meta-World has no cameras {unknown}; it has {', '.join((*CAMERAS, *ALIASES))}")
        self._mujoco = import_mujoco()
        from metaworld.env_dict import ALL_V3_ENVIRONMENTS
        from metaworld.policies import ENV_POLICY_MAP

        self.instruction = INSTRUCTIONS.get(task, task.removesuffix("-v3").replace("-", " "))
        self.idle_action = np.array([0, 0, 0, -1], np.float32)
        self._env: Any = ALL_V3_ENVIRONMENTS[task]()
        self._env.__dict__.pop("sawyer_observation_space", None)  # was made with the goal clipped to zero
        self._env._partially_observable = False  # for the expert, which is told the goal
        self._env._freeze_rand_vec, self._env.seeded_rand_vec = False, True
        self._env._set_task_called = True
        self._env.max_path_length = 10**9  # the limit is the rollout's
        self._policy: Any = ENV_POLICY_MAP[task]
        self._renderer: Renderer | None = None
        self._size, self._full = size, full
        self._ids = {name: self._env.model.camera(ALIASES.get(name, name)).id for name in self.cameras}

    @classmethod
    def tasks(cls, name: str) -> list[str]:
        require_extra("sim-metaworld", "metaworld", "mujoco")
        import_mujoco()  # before Meta-World, which would have it render to a display
        from metaworld.env_dict import ALL_V3_ENVIRONMENTS

        if name not in ALL_V3_ENVIRONMENTS:
            raise ValueError(f"Meta-World has no task {name!r}; it has {', '.join(ALL_V3_ENVIRONMENTS)}")
        return [name]

    def reset(self, seed: int, episode: int) -> None:
        self._env.seed(seed + episode)
        self._seen, _ = self._env.reset()
        self._success = False

    def step(self, action: np.ndarray) -> None:
        self._seen, _, _, _, info = self._env.step(np.clip(action, -1, 1))
        if self._env._did_see_sim_exception:
            raise RuntimeError("MuJoCo's simulation became unstable")
        self._success = bool(info["success"])

    def observe(self) -> dict[str, Any]:
        if self._renderer is None:
            self._renderer = Renderer(self._env.model, self._size, self._full)
        images = {name: self._renderer.render(self._env.data, number) for name, number in self._ids.items()}
        return images | {"state": self._seen[:4].astype(np.float32), "prompt": self.instruction}

    @property
    def success(self) -> bool:
        return self._success

    def simulator_state(self) -> np.ndarray:
        data = self._env.data
        return np.concatenate([data.qpos, data.qvel, self._env._target_pos])

    def expert(self) -> Expert:
        policy = self._policy()

        def act() -> np.ndarray:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # that actions are clipped
                return np.clip(policy.get_action(self._seen), -1, 1).astype(np.float32)

        return act

    def close(self) -> None:
        if self._renderer is not None:
            self._renderer.close()
        self._env.close()
