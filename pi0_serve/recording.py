"""`Recorder`: what a server got and answered, as LeRobot v3.0 datasets."""

from __future__ import annotations

import logging
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pi0.policy.policy import Policy
from pi0.storage import local_path

if TYPE_CHECKING:
    from pi0.datasets.writer import DatasetWriter, EpisodeWriter
    from pi0_serve.engine import Answer
    from pi0_serve.watch import Robot

logger = logging.getLogger(__name__)

MAX_FRAMES = 10_000  # of an episode
MAX_PENDING = 256  # frames that wait to be written


class Recorder:
    """Records the robots of a server: a frame for each request, an episode from one `reset` or connection to the next.

    `action` is the first action of the chunk that was sent; `policy.actions` is the whole chunk, flat, `policy.noise`
    the noise it was sampled from, with which `pi0-replay` gives the same actions, and `policy.time` seconds since the
    epoch. Images are kept as they came, without loss. With several policies each has a folder of its name. Writing is
    done in a thread of its own; where it cannot keep up, the episode ends, and a new one begins.
    """

    def __init__(self, root: str | Path, fps: float = 10.0, *, by_name: bool = False):
        from pi0.datasets import writer  # PyAV and pyarrow are an extra

        self.root, self.fps, self._by_name, self._module = local_path(root), fps, by_name, writer
        if self.root.exists() and any(self.root.iterdir()) and not self._ours():
            raise FileExistsError(f"{self.root} has something else than recordings of a server; choose another folder")
        self._writers: dict[str, DatasetWriter] = {}
        self._episodes: dict[int, EpisodeWriter] = {}
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="record")
        self._pending, self._lock = 0, threading.Lock()
        self._cut: set[int] = set()

    def add(
        self, robot: Robot, policy: Policy, observation: dict[str, Any], options: dict[str, Any], answer: Answer
    ) -> None:
        """Record an answered request."""
        if options.get("reset"):
            self.end(robot)
        with self._lock:
            full = self._pending >= MAX_PENDING
            self._pending += not full
        if full:
            if robot.number not in self._cut:
                logger.warning("recording cannot keep up: frames of robot %d are left out", robot.number)
                self._cut.add(robot.number)
            return
        if robot.number in self._cut:
            self._cut.discard(robot.number)
            self.end(robot)
        self._thread.submit(self._add, robot, policy, observation, answer, time.time())

    def end(self, robot: Robot) -> None:
        """The end of a robot's episode."""
        self._thread.submit(self._save, robot.number)

    def close(self) -> None:
        """Save what is open."""
        for number in list(self._episodes):
            self._thread.submit(self._save, number)
        self._thread.shutdown()
        for number in list(self._episodes):
            self._save(number)

    def _ours(self) -> bool:
        metas = [self.root / "meta" / "info.json", *self.root.glob("*/meta/info.json")]
        return any(meta.exists() for meta in metas)

    def _add(self, robot: Robot, policy: Policy, observation: dict[str, Any], answer: Answer, received: float) -> None:
        with self._lock:
            self._pending -= 1
        try:
            frame = policy.pipeline.robot.columns(observation)
            name = next(iter(policy.pipeline.robot.action_names))
            frame[name[0] if len(name) == 1 else "action"] = answer.actions[0]
            frame["policy.actions"] = answer.actions.reshape(-1)
            if answer.noise is not None:
                frame["policy.noise"] = answer.noise.reshape(-1)
            frame["policy.time"] = np.array([received])
            task = policy.pipeline.robot.prompt(observation)
            episode = self._episodes.get(robot.number)
            if episode is None or episode.length >= MAX_FRAMES:
                self._save(robot.number)
                episode = self._episodes[robot.number] = self._writer(robot.model, policy, frame).begin()
            episode.add(frame, task)
        except (ValueError, OSError) as error:
            logger.error("robot %d is not recorded: %s", robot.number, error)

    def _writer(self, model: str, policy: Policy, frame: dict[str, np.ndarray]) -> DatasetWriter:
        if model not in self._writers:
            features = {
                name: {"dtype": "video" if x.ndim == 3 else str(x.dtype), "shape": list(x.shape)}
                for name, x in frame.items()
            }
            kind = type(policy.pipeline.robot).__name__.lower()
            root = self.root / model if self._by_name else self.root
            options: dict[str, Any] = {"fps": self.fps, "features": features, "robot_type": kind}
            self._writers[model] = self._module.DatasetWriter(root, codec="lossless", resume=True, **options)
        return self._writers[model]

    def _save(self, number: int) -> None:
        episode = self._episodes.pop(number, None)
        if episode is None:
            return
        try:
            if episode.length:
                episode.save()
            else:
                episode.discard()
        except (ValueError, OSError) as error:
            logger.error("an episode of robot %d was not saved: %s", number, error)
