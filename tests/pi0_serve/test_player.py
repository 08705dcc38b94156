"""The control loop, by a clock of its own: no test here waits, but that of threads."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pi0_serve import ChunkPlayer, Client, LateError
from pi0_serve.player import COLD
from tests.pi0_serve.serving import Slow, observation, serve, write_tiny


class Counting:
    """Action i of the chunk for an observation at step s is [s + i, number of the chunk]; takes `seconds`."""

    def __init__(self, seconds: float = 0.0, length: int = 10):
        self.seconds, self.length, self.calls, self.resets = seconds, length, 0, 0

    def infer(self, observation: Any) -> dict[str, Any]:
        seconds = (
            self.seconds[min(self.calls, len(self.seconds) - 1)] if isinstance(self.seconds, list) else self.seconds
        )
        self.calls += 1
        time.sleep(seconds)
        steps = observation["step"] + np.arange(self.length)
        return {"actions": np.stack([steps, np.full(self.length, self.calls)], axis=1).astype(np.float32)}

    def reset(self) -> None:
        self.resets += 1


class Arm:
    """A robot that counts the actions it was sent."""

    def __init__(self) -> None:
        self.sent: list[np.ndarray] = []
        self.holds = 0

    def observe(self) -> dict[str, int]:
        return {"step": len(self.sent)}

    def act(self, action: np.ndarray) -> None:
        self.sent.append(action)

    def hold(self) -> None:
        self.holds += 1


def play(policy: Any, steps: int, arm: Arm | None = None, **options: Any) -> tuple[Arm, Any]:
    arm = arm or Arm()
    player = ChunkPlayer(policy, arm.observe, arm.act, hold=arm.hold, **{"rate": 200, **options})
    return arm, player.run(steps)


@pytest.mark.parametrize("mode", ["sync", "async"])
@pytest.mark.parametrize("execute", [None, 3, 10])
@pytest.mark.parametrize("seconds", [0.0, 0.013, 0.12])
def test_every_step_gets_its_own_action_once(mode: str, execute: int | None, seconds: float):
    """Whatever the latency: action i was predicted for step i, no step is left out or sent twice."""
    arm, played = play(Counting(seconds), 37, mode=mode, execute=execute)
    np.testing.assert_array_equal([action[0] for action in arm.sent], np.arange(37))
    chunks = [action[1] for action in arm.sent]
    assert chunks == sorted(chunks) and played.steps == 37
    if mode == "sync":
        assert played.chunks == -(-37 // (execute or 10)) and played.held == 0
    elif seconds == 0.013:
        assert played.held <= 2  # asked for in time: 3 steps of 10; a busy machine may delay one


def test_async_is_faster_than_sync():
    """With answers in 20 ms and chunks of 50 ms the one never waits, the other at every chunk: 50 to 70 ms."""
    start = time.perf_counter()
    play(Counting(0.02), 100, mode="async")
    between = time.perf_counter()
    play(Counting(0.02), 100, mode="sync")
    assert between - start < 0.9 * (time.perf_counter() - between)


def test_the_delay_is_a_high_quantile_without_the_cold_start():
    arm = Arm()
    player = ChunkPlayer(Counting([0.3, 0.2, 0.02]), arm.observe, arm.act, rate=100, execute=4)
    assert player.delay == 0
    player.run(80)
    assert max(player.latencies) < 0.15 and 2 <= player.delay <= 8


def test_a_late_server_holds_or_stops():
    arm, played = play(Counting([0.0, 0.15], length=4), 12, execute=4)
    assert played.held > 0 and arm.holds == played.held and [a[0] for a in arm.sent] == list(range(12))
    arm = Arm()
    with pytest.raises(LateError, match="no action for step 4"):
        play(Counting([0.0, 0.15], length=4), 12, arm, execute=4, late="stop")
    assert len(arm.sent) == 4 and arm.holds == 1


def test_a_server_that_never_answers_ends_the_run():
    class Silent(Counting):
        def infer(self, observation: Any) -> dict[str, Any]:
            stuck.wait(5)
            return super().infer(observation)

    stuck, arm = threading.Event(), Arm()
    with pytest.raises(LateError, match=r"no chunk within 0\.1 s"):
        play(Silent(), 5, arm, timeout=0.1)
    stuck.set()
    assert not arm.sent and arm.holds == 1


def test_temporal_ensembling_is_the_weighted_mean_of_all_chunks():
    """With answers at once every step has the newest chunk and up to 9 older ones."""

    class Biased(Counting):
        def infer(self, observation: Any) -> dict[str, Any]:
            actions = super().infer(observation)["actions"]
            actions[:, 0] += observation["step"]  # chunks do not agree
            return {"actions": actions}

    arm, played = play(Biased(0.001), 20, ensemble=0.1, rate=50)
    assert played.held == 0 and played.chunks >= 15
    last = arm.sent[-1][0] - 19  # a mean of the steps of chunks that are at most 9 steps old
    assert 10 <= last < 19


def test_limits_clip():
    arm, _ = play(Counting(), 10, limits=(np.array([2, 0]), np.array([6, 1])))
    assert [a[0] for a in arm.sent] == [2, 2, 2, 3, 4, 5, 6, 6, 6, 6] and {a[1] for a in arm.sent} == {1}


def test_errors_of_the_policy_end_the_run():
    class Broken(Counting):
        def infer(self, observation: Any) -> dict[str, Any]:
            if self.calls:
                raise ConnectionError("gone")
            return super().infer(observation)

    arm = Arm()
    with pytest.raises(ConnectionError, match="gone"):
        play(Broken(), 50, arm)
    assert arm.holds == 1 and len(arm.sent) < 20


def test_a_new_run_begins_anew():
    policy, arm = Counting(0.01), Arm()
    player = ChunkPlayer(policy, arm.observe, arm.act, rate=200)
    player.run(7)
    arm.sent.clear()
    player.run(7)
    assert [a[0] for a in arm.sent] == list(range(7)) and policy.resets == 2


@pytest.mark.parametrize("ensemble", [None, 0.01])
def test_a_server_and_its_client(ensemble: float | None):
    """The served policy answers with the state, which is the step: the noise of a seed is the same in every chunk."""

    class Seeded:
        def __init__(self, client: Client):
            self.client, self.reset = client, client.reset

        def infer(self, item: dict[str, Any]) -> dict[str, Any]:
            return self.client.infer(item, seed=0)

    arm = Arm()

    def observe() -> dict[str, Any]:
        return observation() | {"state": np.full(4, len(arm.sent) / 10, np.float32)}

    with serve(Slow(0.01)) as found, Client(port=found.port) as client:
        played = ChunkPlayer(Seeded(client), observe, arm.act, rate=50, ensemble=ensemble).run(30)
    assert played.steps == len(arm.sent) == 30 and played.chunks >= 7
    steps = np.diff([action[0] for action in arm.sent])
    assert (steps >= -1e-6).all() and arm.sent[-1][0] > arm.sent[0][0]


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"mode": "fast"}, "mode is 'fast'"),
        ({"late": "panic"}, "late is 'panic'"),
        ({"rate": 0}, "rate 0"),
        ({"execute": 0}, "execute is 0"),
        ({"mode": "sync", "ensemble": 0.1}, "temporal ensembling"),
        ({"limits": (1, 0)}, "limits"),
    ],
)
def test_wrong_options(options: dict[str, Any], named: str):
    arm = Arm()
    with pytest.raises(ValueError, match=named):
        ChunkPlayer(Counting(), arm.observe, arm.act, **{"rate": 10, **options})


def test_real_time_chunking_sends_the_rest_of_the_last_chunk():
    """From the observation's step on, and the delay, in actions."""
    asked: list[Any] = []

    class Recording(Counting):
        def infer(self, observation: Any) -> dict[str, Any]:
            asked.append(observation)
            return super().infer(observation)

    arm, played = play(Recording(0.012), 60, mode="rtc", rate=100)
    assert played.held == 0 and [int(a[0]) for a in arm.sent] == list(range(60))
    assert "prev_chunk" not in asked[0]
    for request in asked[1:]:
        rest, step = request["prev_chunk"], request["step"]
        np.testing.assert_array_equal(rest[:, 0], np.arange(step, step + len(rest)))
        assert 0 <= request["delay"] <= len(rest)
    assert asked[-1]["delay"] >= 2  # of 12 ms at 100 Hz


@pytest.mark.parametrize("seconds", [3, pytest.param(60, marks=pytest.mark.slow)])
def test_real_time_chunking_through_a_server(seconds: int, tmp_path: Path):
    """20 Hz, 200 ms of latency: every served chunk is that of the policy in this process; in 60 s no step is late."""
    pi0_torch = pytest.importorskip("pi0_torch")
    folder = write_tiny(tmp_path / "policy", action_horizon=24)
    policy = pi0_torch.Policy.from_pretrained(folder, rtc="guided", use_sampler=True, compile=False)

    class Distant:
        """The server, 200 ms away."""

        def __init__(self, client: Client):
            self.client, self.reset, self.asked = client, client.reset, []

        def infer(self, item: dict[str, Any]) -> dict[str, Any]:
            time.sleep(0.2)
            answer = self.client.infer(item, seed=len(self.asked))
            self.asked.append((item, np.array(answer["actions"])))
            return answer

    arm = Arm()
    with serve(policy) as found, Client(port=found.port) as client:
        distant = Distant(client)
        player = ChunkPlayer(distant, lambda: observation(len(arm.sent)), arm.act, rate=20, mode="rtc", execute=12)
        played = player.run(20 * seconds)
    assert played.steps == len(arm.sent) == 20 * seconds
    assert seconds < 60 or played.held == 0  # run alone: other processes make it late
    later = [item["delay"] for item, _ in distant.asked if "prev_chunk" in item]
    assert len(later) >= len(distant.asked) - 1 and min(later[COLD:]) >= 4
    for seed, (item, actions) in enumerate(distant.asked):
        local = policy.infer(item, policy.noise(1, seed=seed)[0])["actions"]
        assert np.array_equal(local, actions)
