"""LIBERO's simulated Panda arm, by the conventions of openpi's evaluation. The extra `sim-libero`.

openpi's `examples/libero/main.py` is the reference for images, state, actions and initial states.
"""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pi0.plugins import require_extra
from pi0_eval.environments.environment import Environment
from pi0_eval.environments.mujoco import import_mujoco
from pi0_eval.environments.protocols import PROTOCOLS

CAMERAS = {"image": "agentview", "wrist_image": "robot0_eye_in_hand"}
IDLE = [0.0] * 6 + [-1.0]


class Libero(Environment):
    """A task of a LIBERO suite, "libero_spatial/0" to "libero_90/89".

    Images are `size` pixels high and wide, and turned by 180°. The state is the hand's position in metres, its rotation
    as an axis times an angle in radians, and the two fingers in metres, [8]. An episode's number is that of its
    recorded initial state; where fixtures such as cabinets stand is drawn from the seed plus this number. (openpi seeds
    once: there it depends on how many episodes were run before, and only episode 0 of a task is the same as here.)
    """

    robot = "libero"
    default_cameras = tuple(CAMERAS)
    fps = 20.0

    def __init__(self, task: str, cameras: Sequence[str] | None = None, *, size: int = 256):
        (task,) = self.tasks(task)
        self.cameras = tuple(self.default_cameras if cameras is None else cameras)
        if unknown := sorted(set(self.cameras) - CAMERAS.keys()):
            raise ValueError(f"LIBERO has no cameras {unknown}; it has {', '.join(CAMERAS)}")
        suite_name, _, number = task.partition("/")
        self.limit = PROTOCOLS["libero"].limit({"name": "libero", "task": task}) or 520
        from libero.libero import get_libero_path
        from libero.libero.envs import OffScreenRenderEnv

        suite = _suite(suite_name)
        found = suite.get_task(int(number))
        self.instruction, self.idle_action = str(found.language), np.array(IDLE, np.float32)
        self._states = np.asarray(suite.get_task_init_states(int(number)))
        file = Path(get_libero_path("bddl_files")) / found.problem_folder / found.bddl_file
        # Without camera observations, of which the simulator renders all at every step: `observe` renders.
        sizes = {"camera_heights": size, "camera_widths": size}
        self._env: Any = OffScreenRenderEnv(bddl_file_name=str(file), **sizes, use_camera_obs=False)
        self._size, self._rendered = size, _Snapshot(self._env)

    @classmethod
    def tasks(cls, name: str) -> list[str]:
        require_extra("sim-libero", "libero", "robosuite")
        import_mujoco()  # before robosuite, which would have it render to a display
        suite_name, _, number = name.partition("/")
        count = _suite(suite_name).n_tasks
        if not number:
            return [f"{suite_name}/{i}" for i in range(count)]
        if not number.isdecimal() or int(number) >= count:
            raise ValueError(f"{suite_name} has no task {number!r}; it has 0 to {count - 1}")
        return [f"{suite_name}/{int(number)}"]

    def reset(self, seed: int, episode: int) -> None:
        if episode >= len(self._states):
            raise ValueError(f"LIBERO has {len(self._states)} initial states of a task, and no {episode}")
        self._env.seed(seed + episode)
        self._env.reset()
        self._seen = self._env.set_init_state(self._states[episode])

    def step(self, action: np.ndarray) -> None:
        self._seen, _, _, _ = self._env.step(np.asarray(action, np.float32).tolist())

    def observe(self) -> dict[str, Any]:
        images = {name: self._render(CAMERAS[name]) for name in self.cameras}
        rotation = axis_angle(self._seen["robot0_eef_quat"])
        state = np.concatenate((self._seen["robot0_eef_pos"], rotation, self._seen["robot0_gripper_qpos"]))
        return images | {"state": state.astype(np.float32), "prompt": self.instruction}

    def _render(self, camera: str) -> np.ndarray:
        """The image that robosuite's observations have, which is upside down, turned by 180°."""
        with self._rendered.in_place():
            image = self._env.sim.render(camera_name=camera, width=self._size, height=self._size)
        return np.ascontiguousarray(image[::-1, ::-1])

    @property
    def success(self) -> bool:
        return bool(self._env.check_success())

    def simulator_state(self) -> np.ndarray:
        return np.asarray(self._env.get_sim_state())

    def close(self) -> None:
        self._env.close()


class _Snapshot:
    """The physics at the time of the observation, to render later what robosuite renders then.

    After a step of 25 substeps, robosuite's observations, images and state, are of the first one (its observables
    sample as soon as a period begins). Demonstrations were recorded so, and policies are trained on it.
    """

    def __init__(self, env: Any):
        from robosuite.utils.observables import Observable, sensor

        self._env: Any = env
        self._copy: Any = None

        @sensor(modality="snapshot")
        def snapshot(obs_cache: Any) -> float:
            self._copy = copy.copy(env.sim.data._data)
            return 0.0

        env.env.add_observable(Observable("snapshot", snapshot, sampling_rate=env.env.control_freq))

    @contextlib.contextmanager
    def in_place(self) -> Iterator[None]:
        """Have the simulator render it."""
        data = self._env.sim._render_context_offscreen.data
        present, data._data = data._data, self._copy
        try:
            yield
        finally:
            data._data = present


def _suite(name: str) -> Any:
    from libero.libero import benchmark

    known = benchmark.get_benchmark_dict()
    if name not in known:
        raise ValueError(f"LIBERO has no suite {name!r}; it has {', '.join(sorted(known))}")
    return known[name]()


def axis_angle(quaternion: np.ndarray) -> np.ndarray:
    """A rotation as its axis times its angle in radians, [3], of a unit quaternion x, y, z, w.

    openpi `_quat2axisangle`. Angles are 0 to 2π, not the shorter way round: what policies were trained with.
    """
    w = min(max(float(quaternion[3]), -1.0), 1.0)
    length = math.sqrt(1.0 - w * w)
    if math.isclose(length, 0.0):
        return np.zeros(3)
    return np.asarray(quaternion[:3]) * 2.0 * math.acos(w) / length
