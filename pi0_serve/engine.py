"""`Engine`, a policy that answers many robots: requests of one model join into batches, outside of the event loop."""

from __future__ import annotations

import collections
import dataclasses
import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np

from pi0.observation import Observation
from pi0.policy.buckets import placeholder, text_lengths
from pi0.policy.policy import Policy
from pi0.policy.rtc import Previous
from pi0_serve.limits import SIZES, WAIT
from pi0_serve.protocol import RequestError

logger = logging.getLogger(__name__)


class InferenceError(RuntimeError):
    """A batch failed, by no fault of its requests; the log says how."""


@dataclasses.dataclass(eq=False)
class Session:
    """What the server keeps of one connection: π0.5's subtask, how many chunks it was kept for, and the last chunk."""

    subtask: np.ndarray | None = None  # tokens [D]
    chunks: int = 0
    actions: np.ndarray | None = None  # [T, robot dims], for real-time chunking
    delay: int = 0

    def reset(self) -> None:
        """Begin a new episode: the next request predicts a new subtask."""
        self.subtask, self.chunks, self.actions = None, 0, None


@dataclasses.dataclass(eq=False)
class Request:
    """A prepared request: inputs of one row, noise [1, T, A] or None, tokens of a subtask [D] that is kept or given.

    `previous` is the chunk that its robot executes, of a policy with real-time chunking.
    """

    session: Session
    observation: Observation
    noise: np.ndarray | None
    subtask: np.ndarray | None
    previous: Previous | None
    received: float
    queued: float
    answer: Future[Answer] = dataclasses.field(default_factory=Future)


@dataclasses.dataclass(frozen=True, eq=False)
class Answer:
    """An action chunk [T, robot dims] in the robot's units, and how it came about; `seconds` by stage."""

    actions: np.ndarray
    outputs: Mapping[str, Any]  # `decoded` and `subtask`, of models that have them
    observation: Observation
    noise: np.ndarray | None
    batch: int
    seconds: Mapping[str, float]


class Engine:
    """Answers requests with a policy, in a thread of its own that alone touches the model.

    Requests wait up to `wait` seconds for others to join them, up to the largest of `sizes`; a batch is filled up to
    the next size, whose program is compiled. They are served in the order in which they came. A connection has one
    request at a time, so none is served twice while another waits. `submit`, which resizes and tokenizes, runs in
    `pool`. A π0.5 that writes subtasks keeps one for `subtask_every` requests of a connection.
    """

    def __init__(
        self,
        policy: Policy,
        *,
        sizes: Sequence[int] = SIZES,
        wait: float = WAIT,
        subtask_every: int = 1,
        threads: int = 2,
        max_queue: int = 1024,
    ):
        if not sizes or any(type(size) is not int or size < 1 for size in sizes):
            raise ValueError(f"batch sizes are {list(sizes)}; they must be positive whole numbers")
        if not 0 <= wait <= 10:
            raise ValueError(f"the wait for a batch is {wait} s; it must be from 0 to 10")
        if subtask_every < 1:
            raise ValueError(f"subtask_every is {subtask_every}; a subtask is kept for at least 1 request")
        self.policy, self.sizes, self.wait = policy, tuple(sorted(set(sizes))), wait
        self.subtask_every, self.max_queue = subtask_every, max_queue
        self.on_batch: Callable[[int], None] = lambda size: None
        self._queue: collections.deque[Request] = collections.deque()
        self._changed, self._closed = threading.Condition(), False
        self._drawing = threading.Lock()
        self.pool = ThreadPoolExecutor(threads, thread_name_prefix="prepare")
        self._thread = threading.Thread(target=self._run, name="inference", daemon=True)
        self._thread.start()

    @property
    def waiting(self) -> int:
        """The number of requests in the queue."""
        return len(self._queue)

    def warm_up(self) -> None:
        """Compile the programs of all batch sizes, for this robot's cameras and any prompt."""
        policy, config = self.policy, self.policy.config
        robot = policy.pipeline.robot
        cameras = len(set(robot.cameras.values())) if config.family.masked_cameras else len(config.image_keys)
        fewest = cameras - len({robot.cameras[name] for name in robot.optional_cameras})
        for count in range(max(fewest, 1), cameras + 1) if config.family.masked_cameras else [cameras]:
            if policy.sampler is not None:
                policy.sampler.warm_up(self.sizes, [count])
                continue
            for size in self.sizes:  # a model takes all cameras, masked or not, and its longest prompt
                observation = placeholder(config, size, len(config.image_keys), text_lengths(config)[-1])
                none = None if policy.rtc is None else Previous.none(size, config.action_horizon, config.action_dim)
                self._sample(observation, policy.noise(size), None, none)
            break

    def submit(self, session: Session, observation: Mapping[str, Any], options: Mapping[str, Any]) -> Request:
        """Prepare a request and queue it; it has its `answer` as a future. To be called in a thread of `pool`.

        Raises ObservationError or RequestError for what does not fit.
        """
        received = time.perf_counter()
        if options.get("reset"):
            session.reset()
        policy, subtask, noise = self.policy, self._subtask(session, options), options.get("noise")
        inputs = policy.inputs([observation])
        previous = policy.previous([{**observation, **self._executed(session, options)}])
        with self._drawing:  # one generator for all
            noise = policy.noise(1, None if noise is None else noise[None], options.get("seed"))
        request = Request(session, inputs, noise, subtask, previous, received, time.perf_counter())
        with self._changed:
            if self._closed:
                raise RequestError("the server is shutting down")
            if len(self._queue) >= self.max_queue:
                raise RequestError(f"{self.max_queue} requests wait already; try again later")
            self._queue.append(request)
            self._changed.notify()
        return request

    def _subtask(self, session: Session, options: Mapping[str, Any]) -> np.ndarray | None:
        """The tokens of the subtask that a request gives, or that is kept; None where one is to be predicted."""
        policy, text = self.policy, options.get("subtask")
        if text is not None:
            if not policy.assets.subtasks:
                raise RequestError("subtask: this policy writes no subtasks; leave it out")
            try:
                return policy.pipeline.subtask_tokens(text, policy.config.runtime.max_decoding_steps)
            except ValueError as error:
                raise RequestError(f"subtask: {error}") from error
        return None if session.chunks % self.subtask_every == 0 else session.subtask

    def _executed(self, session: Session, options: Mapping[str, Any]) -> dict[str, Any]:
        """`prev_chunk` and `delay` of a request, for `Policy.previous`: those that it has, or else that are kept.

        What is left of the kept chunk is known from `executed`, the actions since the last request; without it and
        without `prev_chunk` a request has no previous chunk.
        """
        delay, chunk, executed = options.get("delay"), options.get("prev_chunk"), options.get("executed")
        if self.policy.rtc is None:
            given = [key for key in ("prev_chunk", "executed", "delay") if key in options]
            if given:
                raise RequestError(f"{given[0]}: this server has no real-time chunking; start it with --rtc guided")
            return {}
        if executed is not None and not 0 <= executed < 2**31:
            raise RequestError(f"executed is {executed}; expected the number of actions since the last request")
        if executed is not None and session.actions is not None:
            chunk = session.actions[executed:] if executed < len(session.actions) else None
        if delay is not None:
            session.delay = delay
        if chunk is None:
            return {}
        return {"prev_chunk": chunk, "delay": min(session.delay, len(chunk)) if delay is None else delay}

    def close(self) -> None:
        """Answer what is queued, take nothing more, and end the threads."""
        self.pool.shutdown()
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join()

    def _run(self) -> None:
        while batch := self._next():
            try:
                self._answer(batch)
            except Exception as error:
                logger.exception("a batch of %d failed", len(batch))
                for request in batch:
                    if not request.answer.done():
                        request.answer.set_exception(InferenceError(f"inference failed: {type(error).__name__}"))

    def _next(self) -> list[Request]:
        """The next batch, of requests that are alike; empty when closed and nothing is left."""
        most = self.sizes[-1]
        with self._changed:
            while True:
                while not self._queue and not self._closed:
                    self._changed.wait()
                end = time.perf_counter() + self.wait
                while 0 < len(self._queue) < most and not self._closed:
                    left = end - time.perf_counter()
                    if left <= 0 or not self._changed.wait(left):
                        break
                first = next((r for r in self._queue if not r.answer.cancelled()), None)
                if first is None:
                    self._queue.clear()
                    if self._closed:
                        return []
                    continue
                batch: list[Request] = []
                rest: collections.deque[Request] = collections.deque()
                for request in self._queue:
                    alike = (request.subtask is None) == (first.subtask is None)
                    if not (alike and len(batch) < most):
                        rest.append(request)
                    elif request.answer.set_running_or_notify_cancel():
                        batch.append(request)
                self._queue = rest
                if batch:
                    return batch

    def _answer(self, batch: list[Request]) -> None:
        start = time.perf_counter()
        count = len(batch)
        size = next(size for size in self.sizes if size >= count)
        rows = batch + batch[-1:] * (size - count)
        observation = Observation.join([r.observation for r in rows])
        noise = None if batch[0].noise is None else np.concatenate([r.noise for r in rows if r.noise is not None])
        subtask = None if batch[0].subtask is None else np.stack([r.subtask for r in rows if r.subtask is not None])
        previous = None
        if self.policy.rtc is not None:
            previous = Previous.join([r.previous for r in rows if r.previous is not None])
        tokens, outputs = self._sample(observation, noise, subtask, previous)
        sampled = time.perf_counter()
        self.on_batch(count)
        for i, request in enumerate(batch):
            if tokens is not None:
                request.session.subtask = tokens[i]
                request.session.chunks += 1
            try:
                own = None if tokens is None else tokens[i : i + 1]
                result = self.policy.outputs(outputs[i : i + 1], request.observation.state, own)
            except ValueError as error:  # tokens of π0-FAST that are no actions
                request.answer.set_exception(RequestError(str(error)))
                continue
            result = {key: value[0] for key, value in result.items()}
            seconds = {
                "inputs": request.queued - request.received,
                "queue": start - request.queued,
                "model": sampled - start,
            }
            actions = request.session.actions = result.pop("actions")
            request.answer.set_result(Answer(actions, result, request.observation, request.noise, count, seconds))

    def _sample(
        self,
        observation: Observation,
        noise: np.ndarray | None,
        subtask: np.ndarray | None,
        previous: Previous | None,
    ) -> tuple[np.ndarray | None, np.ndarray]:
        """The subtask's tokens, if any, and the model's outputs, as arrays: the device has finished."""
        options = () if previous is None else (previous,)
        if self.policy.assets.subtasks:
            assert noise is not None
            return self.policy.sample_with_subtask(observation, noise, subtask, *options)
        return None, self.policy.sample(observation, noise, *options)
