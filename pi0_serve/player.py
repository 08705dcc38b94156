"""`ChunkPlayer`: a control loop at a fixed rate that asks for the next chunk while the last one is played. NumPy alone.

Steps count the actions that were sent, not ticks of the clock: where the robot holds, so does the count, and a chunk's
action i belongs to the step i after the one whose observation it was predicted for.
"""

from __future__ import annotations

import collections
import dataclasses
import math
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import numpy as np

MODES = ("sync", "async", "rtc")
COLD = 2  # answers whose latency is not counted: programs are compiled, caches filled
KEPT = 200  # latencies


class LateError(RuntimeError):
    """The server was late, and the player was told to stop then."""


class Policy(Protocol):
    """What is played: `Client`, openpi's client, or a policy in this process."""

    def infer(self, observation: Any) -> dict[str, Any]:
        """{"actions": [T, A]} for an observation."""

    def reset(self) -> None:
        """Begin a new episode."""


@dataclasses.dataclass(frozen=True, eq=False)
class Chunk:
    """Actions [T, A], the first of which belongs to the step `start`."""

    start: int
    actions: np.ndarray

    def at(self, step: int) -> np.ndarray | None:
        """The action [A] of a step, None beyond the chunk."""
        return self.actions[step - self.start] if 0 <= step - self.start < len(self.actions) else None


@dataclasses.dataclass(frozen=True)
class Played:
    """What a run did: actions sent, ticks without one, chunks, and latencies of requests in seconds."""

    steps: int
    held: int
    chunks: int
    latencies: tuple[float, ...]


class ChunkPlayer:
    """Plays a policy's chunks: every 1/`rate` seconds `act` gets one action [A], in the robot's units.

    `observe()` returns an observation. In mode "sync" the loop waits for each chunk, holding the robot, and plays
    `execute` actions of it (default: all). In mode "async" the next chunk is asked for in another thread, `execute`
    actions after the last one was (default: half a chunk), or earlier where the answer would come too late; when it is
    there, it goes on at the step that the robot has reached: actions that have become past are left out, none is sent
    twice, and none ahead of its step. Mode "rtc" is "async" with real-time chunking, for a policy that has it: each
    observation has the rest of the last chunk as `prev_chunk`, and the `delay` in actions, and the new chunk goes on
    from these without a jump.

    The delay is the `quantile` of measured latencies, the first COLD left out, in steps. With `ensemble`, the weight m
    of ACT's temporal ensembling, an action is the mean of all chunks that have one for its step, the oldest weighted by
    exp(0), the next by exp(-m), and so on; chunks are then asked for as fast as they are answered. `limits` (low,
    high), each [A] or a number, clip what is sent. Where no action is there in time, `late` "hold" calls `hold()` at
    every tick, if given, and sends nothing; "stop" calls it once and raises LateError. After `timeout` seconds without
    an answer both stop. An error of the policy ends the run, after `hold()`.
    """

    def __init__(
        self,
        policy: Policy,
        observe: Callable[[], Mapping[str, Any]],
        act: Callable[[np.ndarray], None],
        *,
        rate: float,
        mode: str = "async",
        execute: int | None = None,
        ensemble: float | None = None,
        limits: tuple[Any, Any] | None = None,
        late: str = "hold",
        hold: Callable[[], None] | None = None,
        quantile: float = 0.95,
        timeout: float = 10.0,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ):
        if mode not in MODES:
            raise ValueError(f"mode is {mode!r}; it must be one of {', '.join(MODES)}")
        if late not in ("hold", "stop"):
            raise ValueError(f"late is {late!r}; it must be hold or stop")
        if not 0 < rate <= 10_000 or not 0 < quantile <= 1 or not timeout > 0:
            raise ValueError(
                f"rate {rate} Hz, timeout {timeout} s and quantile {quantile} must be positive, the last ≤ 1"
            )
        if execute is not None and execute < 1:
            raise ValueError(f"execute is {execute}; at least 1 action of a chunk is played")
        if ensemble is not None and (mode != "async" or ensemble < 0):
            raise ValueError("temporal ensembling needs mode async, and a weight of at least 0")
        if limits is not None and np.any(np.asarray(limits[0]) > np.asarray(limits[1])):
            raise ValueError("limits are (low, high); a low one is above its high one")
        self.policy, self.observe, self.act, self.hold = policy, observe, act, hold
        self.rate, self.mode, self.execute, self.ensemble = rate, mode, execute, ensemble
        self.limits, self.late, self.quantile, self.timeout = limits, late, quantile, timeout
        self._clock, self._sleep = clock, sleep
        self.latencies: collections.deque[float] = collections.deque(maxlen=KEPT)
        self._answers = 0
        self._begin()

    def _begin(self) -> None:
        self.step = 0  # actions sent
        self._held = self._received = 0
        self._chunks: list[Chunk] = []  # oldest first
        self._asked, self._asked_at = -1, 0.0  # the step and time of the last request
        self._thread: threading.Thread | None = None
        self._reply: Any = None

    @property
    def delay(self) -> int:
        """The steps that an answer takes: a high quantile of what was measured, 0 before the first."""
        if not self.latencies:
            return 0
        return math.ceil(float(np.quantile(self.latencies, self.quantile)) * self.rate)

    def run(self, steps: int | None = None, until: Callable[[], bool] = lambda: False) -> Played:
        """Play an episode of so many actions, or until `until()` is true, asked before each.

        Raises LateError, and what the policy, `observe` and `act` raise.
        """
        self.policy.reset()
        self._begin()
        try:
            self._wait_first()
            tick = self._clock()
            while (steps is None or self.step < steps) and not until():
                self._tick()
                tick += 1 / self.rate
                left = tick - self._clock()
                if left > 0:
                    self._sleep(left)
                else:
                    tick = self._clock()  # a tick that took too long is not made up for in a rush
        except BaseException:
            if self.hold is not None:
                self.hold()
            raise
        finally:
            self._join()
        return Played(self.step, self._held, self._received, tuple(self.latencies))

    def _tick(self) -> None:
        self._collect()
        if self.mode != "sync":
            self._ask_if_due()
        action = self._action()
        if action is None and self.mode == "sync":
            self._ask()
            self._await()
            action = self._action()
        if action is None:
            self._be_late()
            return
        if self.limits is not None:
            action = np.clip(action, *self.limits)
        self.act(action)
        self.step += 1

    def _action(self) -> np.ndarray | None:
        """The action of this step, None where no chunk has one."""
        found = [action for chunk in self._chunks if (action := chunk.at(self.step)) is not None]
        if not found:
            return None
        if self.mode == "sync" and self.execute is not None and self.step - self._chunks[-1].start >= self.execute:
            return None
        if self.ensemble is None:
            return np.array(found[-1])
        weights = np.exp(-self.ensemble * np.arange(len(found)))
        return np.average(np.stack(found), axis=0, weights=weights).astype(found[0].dtype)

    def _ask_if_due(self) -> None:
        if self._thread is not None:
            return
        last = self._chunks[-1]
        every = len(last.actions) // 2 if self.execute is None else self.execute
        due = self.step - last.start >= max(every, 1)
        wait = self._expected_delay(last)
        short = last.start + len(last.actions) - self.step <= wait + 1
        past = self.step == self._asked and self._action() is None  # answered, and nothing left of it
        if past or (self.step > self._asked and (due or short or self.ensemble is not None)):
            self._ask()

    def _expected_delay(self, last: Chunk) -> int:
        """The steps until the next answer; half a chunk where nothing is known yet."""
        return self.delay if self.latencies else len(last.actions) // 2

    def _ask(self) -> None:
        """Ask for the chunk of this step, in another thread."""
        observation, self._asked, self._asked_at = self.observe(), self.step, self._clock()
        if (
            self.mode == "rtc"
            and self._chunks
            and (rest := self._chunks[-1].actions[self.step - self._chunks[-1].start :]).size
        ):
            delay = min(self._expected_delay(self._chunks[-1]), len(rest))
            observation = {**observation, "prev_chunk": rest, "delay": delay}

        def ask(reply: list[Any]) -> None:
            try:
                reply.append(np.asarray(self.policy.infer(observation)["actions"]))
            except BaseException as error:
                reply.append(error)

        self._reply = []
        self._thread = threading.Thread(target=ask, args=(self._reply,), name="infer", daemon=True)
        self._thread.start()

    def _collect(self) -> None:
        """Take the answer, if it is there. Raises what the policy raised."""
        if self._thread is None or self._thread.is_alive():
            return
        self._thread.join()
        self._thread = None
        (answer,) = self._reply
        if isinstance(answer, BaseException):
            raise answer
        if answer.ndim != 2 or not len(answer) or not np.isfinite(answer).all():
            raise ValueError(f"the policy's actions are {list(answer.shape)}; expected finite numbers [T, A]")
        self._answers += 1
        self._received += 1
        if self._answers > COLD:
            self.latencies.append(self._clock() - self._asked_at)
        self._chunks = [chunk for chunk in self._chunks if chunk.at(self.step) is not None]
        self._chunks = [*(self._chunks if self.ensemble is not None else []), Chunk(self._asked, answer)]

    def _wait_first(self) -> None:
        self._ask()
        self._await()

    def _await(self) -> None:
        """Wait for the answer. Raises LateError after `timeout`."""
        thread = self._thread
        assert thread is not None
        thread.join(self.timeout)
        if thread.is_alive():
            raise LateError(f"no chunk within {self.timeout:g} s")
        self._collect()

    def _be_late(self) -> None:
        self._held += 1
        waited = self._clock() - self._asked_at
        if self.late == "stop" or waited > self.timeout:
            raise LateError(f"no action for step {self.step}: the chunk was asked for {waited:.3f} s ago")
        if self.hold is not None:
            self.hold()

    def _join(self) -> None:
        """Leave no thread that uses the policy, as far as it answers."""
        if self._thread is not None:
            self._thread.join(self.timeout)
            self._thread = None
