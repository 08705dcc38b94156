"""The closed loop of policy and environments: `Plan`, `Rollout`.

Axes: T action horizon, A action dim.
"""

from __future__ import annotations

import collections
import dataclasses
import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pi0 import __version__
from pi0.reading import read_json
from pi0.storage import write_text
from pi0_eval.actors import Actor, check_chunks, noise_seed
from pi0_eval.environments.environment import EnvironmentFailed
from pi0_eval.environments.registry import task_name
from pi0_eval.environments.workers import Begin, Play, Pool, Reply
from pi0_eval.outcomes import (
    EPISODES,
    TRAJECTORY,
    Episode,
    Trajectory,
    append_episode,
    cut_off_last_line,
    read_episodes,
)

Recorder = Callable[[Mapping[str, Any], int, Reply], None]
SETTINGS = "rollout.json"
VIDEO = "videos/{index:06d}.mp4"


@dataclasses.dataclass(frozen=True)
class Plan:
    """Which episodes are run, and how: what must be the same for two rollouts to be compared, or one to go on.

    Attributes:
        references: entries of `find_tasks`.
        episodes: of each task.
        seed: of initial states and noise.
        first: the number of the first episode of each task.
        batch_size: episodes in progress, each a row of the policy's batches.
        replan: actions of a chunk that are applied before the next.
        idle: first steps with the environment's idle action.
        limits: steps of an episode by task; None for the environment's.
        latency: steps that an answer takes: a chunk's actions before that are never applied, the last chunk's are.
    """

    references: tuple[Mapping[str, Any], ...]
    episodes: int
    seed: int
    replan: int
    first: int = 0
    batch_size: int = 4
    idle: int = 0
    limits: Mapping[str, int | None] = dataclasses.field(default_factory=dict)
    latency: int = 0

    def __post_init__(self) -> None:
        for name, least in (
            ("episodes", 1),
            ("replan", 1),
            ("batch_size", 1),
            ("idle", 0),
            ("latency", 0),
            ("first", 0),
        ):
            if getattr(self, name) < least:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least {least}")
        if self.latency > self.replan:
            raise ValueError(f"latency is {self.latency} steps; a chunk is to come within the {self.replan} of replan")

    def check_horizon(self, horizon: int) -> None:
        """Raise ValueError for chunks that are too short."""
        if self.replan + self.latency > horizon:
            raise ValueError(
                f"replan {self.replan} and latency {self.latency} are more than the {horizon} actions of a chunk"
            )

    def all(self) -> list[tuple[int, Mapping[str, Any], int]]:
        """Every episode: index, reference, number within its task."""
        pairs = [(r, self.first + n) for r in self.references for n in range(self.episodes)]
        return [(i, reference, number) for i, (reference, number) in enumerate(pairs)]


@dataclasses.dataclass(eq=False)
class _Running:
    """An episode in progress."""

    index: int
    reference: Mapping[str, Any]
    number: int
    chunks: list[np.ndarray] = dataclasses.field(default_factory=list)
    starts: list[int] = dataclasses.field(default_factory=list)
    actions: list[np.ndarray] = dataclasses.field(default_factory=list)
    states: list[np.ndarray] = dataclasses.field(default_factory=list)
    frames: list[tuple[dict[str, Any], np.ndarray]] = dataclasses.field(default_factory=list)
    observation: Mapping[str, Any] | None = None
    pending: np.ndarray | None = None
    instruction: str = ""
    fps: float = 0.0


class Rollout:
    """Runs the episodes of a plan that its folder does not have yet; see `run`.

    Episode i is row i modulo the batch size, of every batch that it is in, so that neither the number of workers nor
    what else is in progress changes a bit of it. Those of `videos` are drawn; a `recorder` gets every episode's
    reference and number, and a reply with how it ended and the frames of all its steps.
    """

    def __init__(
        self,
        plan: Plan,
        actor: Actor,
        pool: Pool,
        folder: Path,
        *,
        videos: Sequence[int] = (),
        recorder: Recorder | None = None,
    ):
        if actor.horizon is not None:
            plan.check_horizon(actor.horizon)
        self.plan, self.actor, self.pool, self.folder, self.videos = plan, actor, pool, folder, set(videos)
        self.recorder = recorder
        self.seconds: dict[str, float] = collections.defaultdict(float)
        self.steps = 0
        self._errors: list[str] = []
        self._open()

    def _open(self) -> None:
        """Make the folder, or check that the one that is there is of the same plan. Raises ValueError."""
        file = self.folder / SETTINGS
        settings = json.loads(json.dumps({"plan": dataclasses.asdict(self.plan), "policy": self.actor.describe()}))
        if file.exists():
            found = read_json(file)
            changed = [key for key in settings["plan"] if found["plan"].get(key) != settings["plan"][key]]
            changed += ["policy"] if found.get("policy") != settings["policy"] else []
            if changed:
                raise ValueError(
                    f"{self.folder} is of another rollout: its {', '.join(changed)} differ; choose another folder"
                )
        elif self.folder.exists() and any(self.folder.iterdir()):
            raise FileExistsError(f"{self.folder} exists already and is no rollout's folder; choose another")
        else:
            write_text(file, json.dumps(settings | {"version": __version__}, indent=2) + "\n")
        cut_off_last_line(self.folder / EPISODES)
        found = read_episodes(self.folder / EPISODES)
        self._ended = {index: e.outcome for index, e in found.items() if e.outcome != "error"}

    def run(self) -> list[Episode]:
        """Run what is missing, and return all episodes. Every one is written as it ends.

        An exception of a simulator ends its episode as an error, which the next run tries again. Raises
        EnvironmentFailed where there are nothing but errors.
        """
        queues = [collections.deque[_Running]() for _ in range(self.plan.batch_size)]
        for index, reference, number in self.plan.all():
            if index not in self._ended:
                queues[index % self.plan.batch_size].append(_Running(index, reference, number))
        running: dict[int, _Running] = {}
        while running or any(queues):
            commands: dict[int, Begin | Play] = {}
            for slot, queue in enumerate(queues):
                if slot in running:
                    pending = running[slot].pending
                    assert pending is not None
                    commands[slot] = Play(pending)
                elif queue:
                    running[slot] = queue.popleft()
                    commands[slot] = self._begin(running[slot])
            start = time.perf_counter()
            replies = self.pool.run(commands)
            self.seconds["environments"] += time.perf_counter() - start
            for slot, reply in sorted(replies.items()):
                self._take(running[slot], reply)
                if reply.done:
                    self._end(running.pop(slot), reply)
            if running:
                self._ask(running)
        return list(read_episodes(self.folder / EPISODES).values())

    def _begin(self, episode: _Running) -> Begin:
        plan, task = self.plan, task_name(episode.reference)
        return Begin(
            episode.reference,
            plan.seed,
            episode.number,
            self.actor.cameras,
            plan.limits.get(task),
            plan.idle,
            episode.index in self.videos or self.recorder is not None,
        )

    def _take(self, episode: _Running, reply: Reply) -> None:
        """Add what a slot did to its episode."""
        for part, seconds in reply.seconds.items():
            self.seconds[part] += seconds
        if reply.error:
            return
        if episode.pending is not None:
            episode.actions.extend(episode.pending[: reply.steps])
        assert reply.states is not None
        episode.states.extend(reply.states)
        episode.frames += reply.frames
        episode.observation, episode.pending = reply.observation, None
        episode.instruction, episode.fps = reply.instruction, reply.fps
        self.steps += reply.steps

    def _ask(self, running: Mapping[int, _Running]) -> None:
        """Get the next chunk of every episode, and what is applied of it."""
        start, plan = time.perf_counter(), self.plan
        observations = {slot: self._question(e) for slot, e in running.items()}
        seeds = {
            slot: noise_seed(plan.seed, task_name(e.reference), e.number, len(e.chunks)) for slot, e in running.items()
        }
        chunks = self.actor.act(observations, seeds)
        check_chunks(chunks, list(running))
        for slot, episode in running.items():
            chunk = chunks[slot]
            plan.check_horizon(len(chunk))
            late = plan.latency if episode.chunks else 0  # the robot waits for the first
            before = episode.chunks[-1][plan.replan : plan.replan + late] if late else chunk[:0]
            episode.pending = np.concatenate([before, chunk[late : plan.replan]]).astype(np.float32)
            episode.chunks.append(chunk)
            episode.starts.append(len(episode.actions))
        self.seconds["policy"] += time.perf_counter() - start

    def _question(self, episode: _Running) -> Mapping[str, Any]:
        """The observation of an episode; for real-time chunking with the rest of its last chunk, and the latency."""
        assert episode.observation is not None
        rest = episode.chunks[-1][self.plan.replan :] if self.actor.rtc and episode.chunks else ()
        more = {"prev_chunk": rest, "delay": self.plan.latency} if len(rest) else {}
        return {**episode.observation, **more}

    def _end(self, episode: _Running, reply: Reply) -> None:
        """Write how an episode ended."""
        task = task_name(episode.reference)
        outcome = "error" if reply.error else "success" if reply.success else "failure"
        row = Episode(
            episode.index, task, episode.number, self.plan.seed, outcome, len(episode.actions), error=reply.error
        )
        if reply.error:
            self._errors.append(reply.error)
            print(f"{task}, episode {episode.number}: error: {reply.error.strip().splitlines()[-1]}", file=sys.stderr)
        else:
            trajectory = Trajectory(
                np.stack(episode.actions),
                np.stack(episode.states),
                np.stack(episode.chunks).astype(np.float32),
                np.array(episode.starts),
            )
            trajectory.write(self.folder / TRAJECTORY.format(index=episode.index))
            row = dataclasses.replace(
                row, instruction=episode.instruction, initial=trajectory.initial(), digest=trajectory.digest()
            )
            if episode.index in self.videos:
                from pi0_eval.videos import write_video  # PyAV is an extra

                write_video(self.folder / VIDEO.format(index=episode.index), episode.frames, trajectory, episode.fps)
        if self.recorder is not None:
            whole = dataclasses.replace(reply, frames=episode.frames, fps=episode.fps)
            self.recorder(episode.reference, episode.number, whole)
        append_episode(self.folder / EPISODES, row)
        if not reply.error:
            self._ended[row.index] = outcome
        if not self._ended and len(self._errors) >= max(3, self.plan.batch_size):
            raise EnvironmentFailed(
                f"all of {len(self._errors)} episodes ended in an error, the last one:\n{reply.error}"
            )
        if not reply.error:
            ended, won = len(self._ended), sum(o == "success" for o in self._ended.values())
            print(
                f"{ended:>4} of {len(self.plan.all())}  {task}, episode {episode.number}: {outcome} after "
                f"{row.steps} steps ({won} of {ended})",
                flush=True,
            )
