"""Environments in processes of their own: `Pool`.

A slot is an episode in progress; slot s lives in worker s modulo their number. The parent never imports a simulator:
MuJoCo's software renderer and PyTorch's compiler do not load into one process in every order.
"""

from __future__ import annotations

import contextlib
import dataclasses
import multiprocessing
import signal
import time
import traceback
from collections.abc import Mapping, Sequence
from multiprocessing.connection import Connection
from types import TracebackType
from typing import Any, Self

import numpy as np

from pi0.plugins import MissingExtraError
from pi0_eval.environments.environment import Environment, EnvironmentFailed, Expert
from pi0_eval.environments.registry import find_tasks, make_environment


@dataclasses.dataclass(frozen=True)
class Begin:
    """Begin an episode of an entry of `find_tasks`; see `Environment` for the rest.

    `idle` are first steps with the idle action, which count for no limit. With `record` every step's observation comes
    back, not only the last one of a `Play`.
    """

    reference: Mapping[str, Any]
    seed: int
    episode: int
    cameras: tuple[str, ...] | None = None
    limit: int | None = None
    idle: int = 0
    record: bool = False


@dataclasses.dataclass(frozen=True, eq=False)
class Play:
    """Apply actions [N, A], until the task is done or the episode at its limit."""

    actions: np.ndarray


@dataclasses.dataclass(frozen=True)
class Demonstrate:
    """Let the scripted expert act in a new episode until `after` steps after its success, or replay `actions` [N, A].

    With `noise`, Gaussian noise of this standard deviation, relative to the range of [-1, 1], is added to what is
    applied, and what is recorded is the expert's own action in the state that came of it (DART, Laskey et al. 2017).
    """

    begin: Begin
    noise: float = 0.0
    after: int = 0
    actions: np.ndarray | None = None


@dataclasses.dataclass(eq=False)
class Reply:
    """What a slot did: the observation that it waits with, whether the episode is over and how, and its records.

    `frames` are pairs of an observation and the action taken in it; `states` [N, S] are the
    simulator's, the initial one or those after each step; `seconds` by what took them.
    """

    observation: dict[str, Any] | None = None
    done: bool = False
    success: bool = False
    steps: int = 0
    states: np.ndarray | None = None
    frames: list[tuple[dict[str, Any], np.ndarray]] = dataclasses.field(default_factory=list)
    seconds: dict[str, float] = dataclasses.field(default_factory=dict)
    fps: float = 0.0
    instruction: str = ""
    error: str = ""


class _Slot:
    """An environment, and the episode that it is in."""

    def __init__(self) -> None:
        self.environment: Environment | None = None
        self._made: Any = None
        self._seconds: dict[str, float] = {}

    def close(self) -> None:
        if self.environment is not None:
            self.environment.close()
        self.environment, self._made = None, None

    def run(self, command: Begin | Play | Demonstrate) -> Reply:
        self._seconds = {}
        if isinstance(command, Begin):
            reply = self._begin(command)
        elif isinstance(command, Play):
            reply = self._play(command.actions)
        else:
            reply = self._demonstrate(command)
        assert self.environment is not None
        reply.seconds, reply.fps, reply.instruction = self._seconds, self.environment.fps, self.environment.instruction
        return reply

    @contextlib.contextmanager
    def _timed(self, part: str) -> Any:
        start = time.perf_counter()
        yield
        self._seconds[part] = self._seconds.get(part, 0.0) + time.perf_counter() - start

    def _begin(self, command: Begin) -> Reply:
        wanted = (dict(command.reference), command.cameras)
        if wanted != self._made:
            with self._timed("build"):
                self.close()
                self.environment, self._made = make_environment(command.reference, command.cameras), wanted
        environment = self.environment
        assert environment is not None
        self._left = environment.limit if command.limit is None else command.limit
        self._record = command.record
        with self._timed("reset"):
            environment.reset(command.seed, command.episode)
            for _ in range(command.idle):
                environment.step(environment.idle_action)
        return Reply(self._observe(), states=environment.simulator_state().astype(np.float64)[None])

    def _observe(self) -> dict[str, Any]:
        assert self.environment is not None
        with self._timed("render"):
            self._seen = self.environment.observe()
        return self._seen

    def _play(self, actions: np.ndarray) -> Reply:
        environment, reply, states = self.environment, Reply(), []
        if environment is None:
            raise RuntimeError("no episode was begun")
        for i, action in enumerate(actions):
            if self._record:
                reply.frames.append((self._seen if i == 0 else self._observe(), action))
            with self._timed("step"):
                environment.step(action)
            states.append(environment.simulator_state().astype(np.float64))
            self._left -= 1
            reply.steps, reply.success = i + 1, environment.success
            reply.done = reply.success or self._left <= 0
            if reply.done:
                break
        reply.states = np.stack(states)
        if not reply.done or self._record:
            reply.observation = self._observe()
        return reply

    def _demonstrate(self, command: Demonstrate) -> Reply:
        self._begin(command.begin)
        assert self.environment is not None
        expert: Expert = self.environment.expert() if command.actions is None else iter(command.actions).__next__
        if command.actions is not None:
            self._left = min(self._left, len(command.actions))
        rng = np.random.default_rng([command.begin.seed, command.begin.episode])
        reply, left = Reply(success=False), None
        while self._left > 0 and left != 0:
            observation = self._observe() if reply.steps else self._seen
            action = expert()
            reply.frames.append((observation, action))
            applied = action
            if command.noise:
                applied = np.clip(action + rng.normal(scale=command.noise, size=action.shape), -1, 1)
            with self._timed("step"):
                self.environment.step(applied.astype(np.float32))
            self._left -= 1
            reply.steps += 1
            reply.success |= self.environment.success
            left = command.after if reply.success and left is None else left if left is None else left - 1
        reply.done = True
        return reply


def _serve(connection: Connection) -> None:
    """A worker's loop: lists of (slot, command) in, lists of replies out; None, or the parent's end, ends it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's
    slots: dict[int, _Slot] = {}
    while (message := _next(connection)) is not None:
        if isinstance(message, str):
            try:
                connection.send(find_tasks(message))
            except (ValueError, MissingExtraError, ImportError) as error:
                connection.send(error if isinstance(error, ValueError | MissingExtraError) else ValueError(str(error)))
            continue
        replies = []
        for number, command in message:
            slot = slots.setdefault(number, _Slot())
            try:
                replies.append(slot.run(command))
            except Exception:
                replies.append(Reply(done=True, error=traceback.format_exc()))
                with contextlib.suppress(Exception):
                    slot.close()
                slots.pop(number)
        connection.send(replies)
    for slot in slots.values():
        with contextlib.suppress(Exception):
            slot.close()


def _next(connection: Connection) -> Any:
    try:
        return connection.recv()
    except EOFError:
        return None


class _Worker:
    def __init__(self) -> None:
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs,), daemon=True)
        self.process.start()
        theirs.close()


class Pool:
    """`workers` processes with environments. `run` gives every slot one command, and returns when all have replied.

    An exception in an environment is the `error` of its reply. Where a worker dies, or does not answer within `timeout`
    seconds, it is started again, and that is the error of all its slots.
    """

    def __init__(self, workers: int, timeout: float = 600.0):
        if workers < 1:
            raise ValueError(f"workers is {workers}; at least 1 process runs environments")
        self.timeout = timeout
        self._workers = [_Worker() for _ in range(workers)]

    def tasks(self, references: Sequence[str]) -> list[dict[str, Any]]:
        """`find_tasks` of each. Raises ValueError and MissingExtraError as it does."""
        found: list[dict[str, Any]] = []
        for reference in references:
            self._workers[0].connection.send(reference)
            answer = self._receive(0)
            if isinstance(answer, Exception):
                raise answer
            found += answer
        return found

    def run(self, commands: Mapping[int, Begin | Play | Demonstrate]) -> dict[int, Reply]:
        """The reply of each slot to its command."""
        parts: dict[int, list[tuple[int, Any]]] = {}
        for slot, command in sorted(commands.items()):
            parts.setdefault(slot % len(self._workers), []).append((slot, command))
        replies: dict[int, Reply] = {}
        sent = {}
        for number, part in parts.items():
            try:
                self._workers[number].connection.send(part)
                sent[number] = part
            except OSError as error:
                replies |= self._restart(number, part, error)
        for number, part in sent.items():
            try:
                answers = self._receive(number)
                replies |= {slot: reply for (slot, _), reply in zip(part, answers, strict=True)}
            except EnvironmentFailed as error:
                replies |= self._restart(number, part, error)
        return replies

    def _restart(self, number: int, part: Sequence[tuple[int, Any]], error: Exception) -> dict[int, Reply]:
        worker = self._workers[number]
        worker.process.kill()
        worker.process.join()
        worker.connection.close()
        self._workers[number] = _Worker()
        return {slot: Reply(done=True, error=str(error)) for slot, _ in part}

    def _receive(self, number: int) -> Any:
        worker = self._workers[number]
        try:
            if worker.connection.poll(self.timeout):
                return worker.connection.recv()
        except (EOFError, OSError) as error:
            worker.process.join(5)
            raise EnvironmentFailed(f"the worker's process died, exit code {worker.process.exitcode}") from error
        raise EnvironmentFailed(f"the worker did not answer within {self.timeout:g} s")

    def close(self) -> None:
        """End the workers."""
        for worker in self._workers:
            with contextlib.suppress(OSError):
                worker.connection.send(None)
        for worker in self._workers:
            worker.process.join(10)
            worker.process.kill()
            worker.connection.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self.close()
