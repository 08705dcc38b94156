"""A hand that is to be moved onto a point, which only the image shows, for tests of rollouts."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from pi0_eval.environments.environment import Environment, Expert

NEAR = 0.1
TASKS = ("left", "right")


class Reach(Environment):
    """The robot `metaworld`. At its third step episode `raises` raises, `dies` ends the process, `sleeps` waits 60 s.

    Only where there is no file `marker` yet, which is made then.
    """

    robot = "metaworld"
    default_cameras = ("corner", "wrist")
    fps, limit = 10.0, 12

    def __init__(
        self,
        task: str,
        cameras: Sequence[str] | None = None,
        *,
        raises: int = -1,
        dies: int = -1,
        sleeps: int = -1,
        marker: str = "",
    ):
        self.cameras = tuple(self.default_cameras if cameras is None else cameras)
        self.instruction = f"reach to the {task}"
        self.idle_action = np.zeros(4, np.float32)
        self._side = -1.0 if task == "left" else 1.0
        self._raises, self._dies, self._sleeps, self._marker = raises, dies, sleeps, marker
        self.hand = np.full(4, 9.0)  # of no episode

    @classmethod
    def tasks(cls, name: str) -> list[str]:
        if name not in ("", *TASKS):
            raise ValueError(f"no task {name!r}; there are {', '.join(TASKS)}")
        return [name] if name else list(TASKS)

    def reset(self, seed: int, episode: int) -> None:
        rng = np.random.default_rng([seed, episode])
        self.hand = rng.normal(scale=0.05, size=4)
        self.goal = np.array([0.3 * self._side, *rng.uniform(-0.3, 0.3, 2)])
        self._episode, self._steps = episode, 0

    def step(self, action: np.ndarray) -> None:
        self._steps += 1
        if self._steps == 3 and self._episode in (self._raises, self._dies, self._sleeps):
            self._misbehave()
        self.hand[:3] += 0.1 * np.clip(action[:3], -1, 1)
        self.hand[3] = action[3]

    def _misbehave(self) -> None:
        if self._marker:
            if os.path.exists(self._marker):
                return
            open(self._marker, "w").close()
        if self._episode == self._dies:
            os._exit(3)
        if self._episode == self._sleeps:
            time.sleep(60)
        raise RuntimeError("the simulation became unstable")

    def observe(self) -> dict[str, Any]:
        image = np.zeros((16, 16, 3), np.uint8)
        image[tuple(np.clip((self.goal[1:] * 20 + 8).astype(int), 0, 15))] = 255
        state = self.hand.astype(np.float32)
        return {name: image for name in self.cameras} | {"state": state, "prompt": self.instruction}

    @property
    def success(self) -> bool:
        return bool(np.abs(self.hand[:3] - self.goal).max() < NEAR)

    def simulator_state(self) -> np.ndarray:
        return np.concatenate([self.hand, self.goal])

    def expert(self) -> Expert:
        return lambda: np.append(np.clip(5 * (self.goal - self.hand[:3]), -1, 1), 0.0).astype(np.float32)
