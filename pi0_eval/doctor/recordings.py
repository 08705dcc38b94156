"""What a policy sees, or saw in training: `Recording`, of a dataset or of an episode in simulation.

Axes: F frames, N samples, T action horizon, S state dim, A action dim, all of the robot.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from pi0.datasets.base import Dataset
from pi0.datasets.statistics import absolute_numbers
from pi0.robots.robot import Robot
from pi0_eval.environments.environment import Environment

MAX_FRAMES = 20_000  # of which numbers are compared: more tell no more
SAMPLES = 32  # frames with images
SERVED = "policy.actions"  # a column of what `pi0-serve --record` wrote

Predict = Callable[[Sequence[dict[str, Any]]], np.ndarray]  # frames to actions [N, T, A] in the robot's units


@dataclasses.dataclass(frozen=True, eq=False)
class Recording:
    """Frames in a robot's keys, and their numbers in the model's units.

    Attributes:
        fps: of the frames; None for those of `pi0-serve --record`, which are requests, and whose actions are the
            policy's own.
        state: [F, S], of at most MAX_FRAMES frames.
        actions: [F, T, A], absolute chunks; None where none were recorded.
        starts: the first frame of each episode, and the number of all frames.
        speed: [S], the mean change of the state from a frame to the next.
        samples: N frames with images; `episode` is the episode of each, as a number.
        later: by the number of a sample, the frame `ahead` frames later in its episode.
        prompts: all instructions.
        state_names, action_names: of dimensions; empty where they have none.
    """

    name: str
    fps: float | None
    state: np.ndarray
    actions: np.ndarray | None
    starts: np.ndarray
    speed: np.ndarray
    samples: list[dict[str, Any]]
    episode: np.ndarray
    later: dict[int, dict[str, Any]]
    ahead: int
    prompts: tuple[str, ...]
    state_names: tuple[str, ...]
    action_names: tuple[str, ...]

    @property
    def frames(self) -> int:
        """The number of all frames."""
        return int(self.starts[-1])


def of_dataset(dataset: Dataset, robot: Robot, ahead: int, samples: int = SAMPLES) -> Recording:
    """The recording of a dataset, with samples evenly spaced. Raises ValueError where it is not the robot's."""
    count = len(dataset)
    rows = np.unique(np.linspace(0, count - 1, min(count, MAX_FRAMES)).astype(int))
    data, served = absolute_numbers(dataset, robot, rows), SERVED in dataset.features
    inside = np.setdiff1d(rows, dataset.starts[1:] - 1)  # with a next frame in its episode
    following = absolute_numbers(dataset, robot, inside + 1)["state"]
    speed = np.abs(following - data["state"][np.searchsorted(rows, inside)]).mean(axis=0)
    chosen = np.unique(np.linspace(0, count - 1, min(count, samples)).astype(int))
    episode = np.searchsorted(dataset.starts, chosen, side="right") - 1
    ends = dataset.starts[episode + 1]
    later = {n: dataset[int(i) + ahead] for n, (i, end) in enumerate(zip(chosen, ends, strict=True)) if i + ahead < end}
    prompts = dict.fromkeys(dataset.tasks.values()) if dataset.tasks else dict.fromkeys([robot.default_prompt or ""])
    names = [
        tuple(name for key in keys for name in dataset.dimension_names(key))
        for keys in (robot.state_keys(dataset.features), robot.action_keys(dataset.features))
    ]
    return Recording(
        name=str(dataset.root),
        fps=None if served else dataset.fps,
        state=data["state"],
        actions=None if served else data["actions"],
        starts=dataset.starts,
        speed=speed,
        samples=[dataset[int(i)] for i in chosen],
        episode=episode,
        later=later,
        ahead=ahead,
        prompts=tuple(prompts),
        state_names=names[0] if len(names[0]) == robot.state_dim else (),
        action_names=names[1] if len(names[1]) == robot.action_dim else (),
    )


def of_environment(
    environment: Environment, robot: Robot, predict: Predict, replan: int, *, name: str, steps: int, seed: int = 0
) -> Recording:
    """The recording of an episode in simulation, in which the policy acts, `replan` actions of each chunk."""
    environment.reset(seed, 0)
    frames: list[dict[str, Any]] = []
    chunk = np.zeros((0, robot.action_dim))
    for step in range(min(steps, environment.limit)):
        frames.append(environment.observe())
        if step % replan == 0:
            chunk = predict([frames[-1]])[0]
        environment.step(chunk[step % replan])
        if environment.success:
            break
    state = np.stack([robot.numbers({key: frame[key] for key in robot.state_keys(frame)})["state"] for frame in frames])
    chosen = np.unique(np.linspace(0, len(frames) - 1, min(len(frames), SAMPLES)).astype(int))
    return Recording(
        name=name,
        fps=environment.fps,
        state=state,
        actions=None,
        starts=np.array([0, len(frames)]),
        speed=np.abs(np.diff(state, axis=0)).mean(axis=0) if len(frames) > 1 else np.zeros(state.shape[1]),
        samples=[frames[i] for i in chosen],
        episode=np.zeros(len(chosen), int),
        later={n: frames[i + replan] for n, i in enumerate(chosen) if i + replan < len(frames)},
        ahead=replan,
        prompts=(environment.instruction,),
        state_names=(),
        action_names=(),
    )
