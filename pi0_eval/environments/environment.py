"""`Environment`: what a rollout needs of a simulator."""

from __future__ import annotations

import abc
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import numpy as np

Expert = Callable[[], np.ndarray]  # the action [A] of a scripted expert in the present state


class EnvironmentFailed(RuntimeError):
    """A simulator raised, or its process died: an error of the episode, never a failure of the policy."""


class Environment(abc.ABC):
    """One task of a simulator. A subclass in another package is named as "module:Name".

    Its constructor takes `task`, one of what `tasks` returns, `cameras`, the names of those that `observe` renders
    (None: `default_cameras`), and options. Nothing is rendered but by `observe`. A seed and an episode number give the
    same episode, bit for bit, whatever was run before.

    Attributes:
        robot: the adapter that fits, as `pi0.robots.registry.make_robot` takes it.
        fps: control steps per second.
        limit: the steps after which an episode ends as a failure, unless a protocol says otherwise.
        instruction: the task as text.
        idle_action: [A], what does nothing, for the first steps in which objects settle.
        cameras: the names of the images of `observe`.
    """

    robot: ClassVar[str | Mapping[str, Any]]
    default_cameras: ClassVar[Sequence[str]]
    fps: float
    limit: int
    instruction: str
    idle_action: np.ndarray
    cameras: Sequence[str]

    @classmethod
    @abc.abstractmethod
    def tasks(cls, name: str) -> list[str]:
        """The tasks that a name stands for: itself, or those of a suite. Raises ValueError for an unknown one."""

    @abc.abstractmethod
    def reset(self, seed: int, episode: int) -> None:
        """Begin an episode. Which initial state it has is decided by the seed and its number."""

    @abc.abstractmethod
    def step(self, action: np.ndarray) -> None:
        """Apply an action, float32 [A] in the robot's units."""

    @abc.abstractmethod
    def observe(self) -> dict[str, Any]:
        """The present observation in the keys of the robot's adapter: images uint8 [H, W, 3], `state` [S], `prompt`."""

    @property
    @abc.abstractmethod
    def success(self) -> bool:
        """Whether the task is done in the present state."""

    @abc.abstractmethod
    def simulator_state(self) -> np.ndarray:
        """The whole state of the physics [N], to compare episodes by."""

    def expert(self) -> Expert:
        """A scripted expert for this episode. Raises ValueError where there is none."""
        raise ValueError(f"{type(self).__name__} has no scripted expert")

    def close(self) -> None:
        """Free what the simulator holds."""
        return None
