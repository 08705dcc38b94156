"""What can be seen of a server: metrics for Prometheus, a JSON access log, and the state of robots for the page."""

from __future__ import annotations

import collections
import dataclasses
import functools
import json
import logging
import time
from collections.abc import Mapping
from typing import Any

import numpy as np
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from pi0.look import data_address
from pi0.policy.policy import Policy
from pi0.robots.transforms import DeltaActions
from pi0_serve.engine import Answer, Engine

SECONDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10)
KEPT = 300  # latencies of a robot
MARGIN = 0.5  # of the range from q01 to q99: a state further outside of it is warned of

access = logging.getLogger("pi0_serve.access")


@dataclasses.dataclass(eq=False)
class Robot:
    """A connected robot, as the page shows it. `latencies` are pairs of seconds: since the epoch, and of a request."""

    number: int
    model: str
    key: str
    address: str
    since: float = dataclasses.field(default_factory=time.time)
    requests: int = 0
    errors: int = 0
    last_error: str = ""
    latencies: collections.deque[tuple[float, float]] = dataclasses.field(
        default_factory=lambda: collections.deque(maxlen=KEPT)
    )
    answer: Answer | None = None


class Watch:
    """Counts what happens in a server, by the names of its engines."""

    def __init__(self, engines: Mapping[str, Engine]):
        self.engines, self.robots = engines, dict[int, Robot]()
        self.registry, self.started, self._connections = CollectorRegistry(), time.time(), 0
        options: dict[str, Any] = {"registry": self.registry}
        self._seconds = Histogram(
            "pi0_request_seconds", "Time of requests by stage", ["model", "stage"], buckets=SECONDS, **options
        )
        sizes = sorted({size for engine in engines.values() for size in engine.sizes})
        self._batches = Histogram("pi0_batch_size", "Requests in a batch", ["model"], buckets=sizes, **options)
        self._errors = Counter("pi0_errors", "Requests that were not answered, by kind", ["model", "kind"], **options)
        robots = Gauge("pi0_robots", "Connected robots", ["model"], **options)
        queue = Gauge("pi0_queue", "Requests that wait for a batch", ["model"], **options)
        for name, engine in engines.items():
            robots.labels(name).set_function(functools.partial(self._count, name))
            queue.labels(name).set_function(functools.partial(getattr, engine, "waiting"))
            engine.on_batch = self._batches.labels(name).observe

    def _count(self, model: str) -> int:
        return sum(robot.model == model for robot in list(self.robots.values()))

    def metrics(self) -> bytes:
        """The text that Prometheus reads."""
        return generate_latest(self.registry)

    def connected(self, model: str, key: str, address: str) -> Robot:
        """A new robot."""
        self._connections += 1
        robot = self.robots[self._connections] = Robot(self._connections, model, key, address)
        self._log(robot, "connected")
        return robot

    def disconnected(self, robot: Robot, code: int) -> None:
        """A robot that is gone, by a code of the websocket protocol."""
        del self.robots[robot.number]
        self._log(robot, "disconnected", code=code, requests=robot.requests, errors=robot.errors)

    def answered(self, robot: Robot, answer: Answer, total: float) -> None:
        """A request that was answered within `total` seconds."""
        robot.requests += 1
        robot.answer = answer
        robot.latencies.append((time.time(), total))
        for stage, seconds in {**answer.seconds, "total": total}.items():
            self._seconds.labels(robot.model, stage).observe(seconds)
        stages = {f"{stage}_ms": round(1e3 * seconds, 3) for stage, seconds in answer.seconds.items()}
        self._log(robot, "answered", batch=answer.batch, total_ms=round(1e3 * total, 3), **stages)

    def failed(self, robot: Robot | None, model: str, kind: str, error: str, address: str = "") -> None:
        """A request, or without a robot a connection, that was refused."""
        self._errors.labels(model, kind).inc()
        if robot is not None:
            robot.errors += 1
            robot.last_error = error
            self._log(robot, "failed", kind=kind, error=error)
        else:
            self._write("refused", model=model, kind=kind, error=error, address=address)

    def _log(self, robot: Robot, event: str, **fields: Any) -> None:
        self._write(event, robot=robot.number, model=robot.model, key=robot.key, address=robot.address, **fields)

    def _write(self, event: str, **fields: Any) -> None:
        if access.isEnabledFor(logging.INFO):
            access.info(json.dumps({"time": round(time.time(), 3), "event": event, **fields}))

    def state(self) -> dict[str, Any]:
        """What the page shows, as plain values."""
        robots = [self._robot(robot) for robot in list(self.robots.values())]
        queues = {name: engine.waiting for name, engine in self.engines.items()}
        return {"time": time.time(), "started": self.started, "queues": queues, "robots": robots}

    def _robot(self, robot: Robot) -> dict[str, Any]:
        shown = {
            name: getattr(robot, name)
            for name in ("number", "model", "key", "address", "since", "requests", "errors", "last_error")
        }
        shown["latencies"] = [[round(t, 2), round(1e3 * s, 2)] for t, s in robot.latencies]
        if robot.answer is None:
            return shown | {"images": {}, "chunk": [], "warnings": []}
        policy, observation = self.engines[robot.model].policy, robot.answer.observation
        names = {target: name for name, target in policy.pipeline.robot.cameras.items()}
        present = [key for key in observation.images if observation.image_masks[key][0]]
        seen = {names.get(key, key): data_address(observation.images[key][0]) for key in present}
        return shown | {
            "images": seen,
            "chunk": chunk_and_bounds(policy, robot.answer),
            "subtask": robot.answer.outputs.get("subtask", ""),
            "warnings": warnings(policy, observation.state[0]),
        }


def chunk_and_bounds(policy: Policy, answer: Answer) -> list[dict[str, Any]]:
    """The predicted chunk by dimension, in the units of the model's norm stats, which are its bounds."""
    robot, stats = policy.pipeline.robot, policy.assets.norm_stats
    assert stats is not None
    data = {
        "actions": robot.adapt_actions(answer.actions.astype(np.float64)),
        "state": model_state(policy, answer.observation.state[0]),
    }
    if robot.delta_mask is not None:
        data = DeltaActions(robot.delta_mask)(data)
    low, high = stats["actions"].bounds()
    dims = range(min(data["actions"].shape[-1], len(low)))  # norm stats may be those of a padded model
    values = np.round(data["actions"], 5).T.tolist()
    return [{"values": values[i], "low": float(low[i]), "high": float(high[i])} for i in dims]


def model_state(policy: Policy, state: np.ndarray) -> np.ndarray:
    """A normalized, padded state [S] in the model's units."""
    stats, (modes, eps) = policy.pipeline.normalize.stats["state"], policy.pipeline.normalize.modes
    return stats.invert(state, modes["state"], eps, exact=True)


def warnings(policy: Policy, state: np.ndarray) -> list[str]:
    """The dimensions of a normalized, padded state [S] that lie outside of what training saw."""
    stats = policy.pipeline.normalize.stats["state"]
    size = min(policy.pipeline.robot.state_dim or len(state), len(state), len(stats.mean))
    low, high = stats.bounds()
    room = MARGIN * np.maximum(high - low, 1e-6)
    values = model_state(policy, state)
    return [
        f"state[{i}] is {values[i]:.4g}, outside of {low[i]:.4g} to {high[i]:.4g} in training"
        for i in range(size)
        if not low[i] - room[i] <= values[i] <= high[i] + room[i]
    ]
