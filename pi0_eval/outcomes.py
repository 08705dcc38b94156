"""Outcomes of episodes: records, success rates with intervals, and paired comparisons.

Axes: N steps, R chunks of an episode, T action horizon, A action dim, S numbers of a simulator's state.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pi0.reading import parse_json, read_npz, read_text
from pi0.storage import new_file

OUTCOMES = ("success", "failure", "error")
EPISODES = "episodes.jsonl"  # of a rollout's folder
TRAJECTORY = "trajectories/{index:06d}.npz"
Z95 = 1.959963984540054  # of the normal distribution


@dataclasses.dataclass(frozen=True)
class Episode:
    """How an episode ended.

    `index` counts the episodes of a rollout, `episode` those of its task; `initial` and `digest` are checksums of the
    initial state, and of all actions and states; `error` is the simulator's exception.
    """

    index: int
    task: str
    episode: int
    seed: int
    outcome: str
    steps: int
    instruction: str = ""
    initial: str = ""
    digest: str = ""
    error: str = ""

    def __post_init__(self) -> None:
        if self.outcome not in OUTCOMES:
            raise ValueError(f"outcome is {self.outcome!r}; expected one of {', '.join(OUTCOMES)}")


@dataclasses.dataclass(frozen=True, eq=False)
class Trajectory:
    """What was done: actions [N, A], the simulator's states [N + 1, S], and the policy's chunks [R, T, A], of which
    chunk r was predicted before step `starts[r]`."""

    actions: np.ndarray
    states: np.ndarray
    chunks: np.ndarray
    starts: np.ndarray

    def digest(self) -> str:
        """A checksum of actions and states."""
        checksum = hashlib.sha256()
        for array in (self.actions, self.states):
            checksum.update(np.ascontiguousarray(array).tobytes())
        return checksum.hexdigest()[:16]

    def initial(self) -> str:
        """A checksum of the initial state."""
        return hashlib.sha256(np.ascontiguousarray(self.states[0]).tobytes()).hexdigest()[:16]

    def write(self, file: Path) -> None:
        """Write it whole."""
        with new_file(file) as temporary:
            np.savez_compressed(temporary, **dataclasses.asdict(self))

    @classmethod
    def read(cls, file: Path) -> Trajectory:
        """Raises ValueError for a damaged file."""
        arrays = read_npz(file)
        names = [field.name for field in dataclasses.fields(cls)]
        if missing := sorted(set(names) - arrays.keys()):
            raise ValueError(f"{file} has no {missing}; it is no trajectory")
        return cls(**{name: arrays[name] for name in names})


def append_episode(file: Path, episode: Episode) -> None:
    """Add an episode to the file of a rollout."""
    with file.open("a", encoding="utf-8") as stream:
        stream.write(json.dumps(dataclasses.asdict(episode)) + "\n")
        stream.flush()


def read_episodes(file: Path) -> dict[int, Episode]:
    """The newest record of each episode by its index; a last line that was cut off is left out. Raises ValueError."""
    if not file.exists():
        return {}
    found: dict[int, Episode] = {}
    lines = read_text(file, limit=1 << 30).split("\n")
    for number, line in enumerate(lines[:-1], 1):  # what follows the last newline was cut off
        values = parse_json(line, f"{file}, line {number}")
        try:
            episode = Episode(**values)
        except TypeError as error:
            raise ValueError(f"{file}, line {number}: {error}") from error
        found[episode.index] = episode
    return dict(sorted(found.items()))


def cut_off_last_line(file: Path) -> None:
    """Remove what a killed run left after the last newline."""
    if file.exists():
        content = file.read_bytes()
        whole = content[: content.rfind(b"\n") + 1]
        if whole != content:
            with new_file(file) as temporary:
                temporary.write_bytes(whole)


def wilson(successes: int, count: int, z: float = Z95) -> tuple[float, float]:
    """Wilson's score interval of a rate (Wilson 1927), (0, 1) without episodes."""
    if not count:
        return 0.0, 1.0
    rate, square = successes / count, z * z
    middle = (rate + square / (2 * count)) / (1 + square / count)
    half = z / (1 + square / count) * math.sqrt(rate * (1 - rate) / count + square / (4 * count * count))
    return 0.0 if successes == 0 else middle - half, 1.0 if successes == count else middle + half


def mcnemar(only_a: int, only_b: int) -> float:
    """The exact two-sided p-value of McNemar's test for the pairs in which only one of two succeeded."""
    count = only_a + only_b
    tail = sum(math.comb(count, k) for k in range(min(only_a, only_b) + 1)) / 2**count
    return min(1.0, 2 * tail)


def paired_interval(only_a: int, only_b: int, pairs: int, z: float = Z95) -> tuple[float, float]:
    """The 95 % interval of the difference of two paired rates, A less B (Agresti and Min 2005: half added to each)."""
    if not pairs:
        return -1.0, 1.0
    count, a, b = pairs + 2, only_a + 0.5, only_b + 0.5
    difference = (a - b) / count
    half = z * math.sqrt(a + b - (a - b) ** 2 / count) / count
    return max(-1.0, difference - half), min(1.0, difference + half)


def summarize(episodes: Sequence[Episode]) -> list[dict[str, Any]]:
    """Figures of each task, and of all: episodes that ended, successes, rate with interval, mean steps, errors.

    An error of a simulator counts as neither success nor failure.
    """
    tasks = list(dict.fromkeys(episode.task for episode in episodes))
    groups = {task: [e for e in episodes if e.task == task] for task in tasks}
    if len(tasks) > 1:
        groups["all"] = list(episodes)
    rows = []
    for task, own in groups.items():
        ended = [e for e in own if e.outcome != "error"]
        done = [e for e in ended if e.outcome == "success"]
        low, high = wilson(len(done), len(ended))
        rows.append(
            {
                "task": task,
                "episodes": len(ended),
                "successes": len(done),
                "rate": len(done) / len(ended) if ended else None,
                "interval": [low, high],
                "steps": float(np.mean([e.steps for e in ended])) if ended else None,
                "steps_of_successes": float(np.mean([e.steps for e in done])) if done else None,
                "errors": len(own) - len(ended),
            }
        )
    return rows


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """`summarize` as text."""
    width = max(len(row["task"]) for row in rows)
    head = f"{'task':<{width}}{'episodes':>10}{'success':>9}{'95 % interval':>17}{'steps':>8}{'errors':>8}"
    lines = [head]
    for row in rows:
        low, high = row["interval"]
        rate = "-" if row["rate"] is None else f"{row['rate']:.1%}"
        interval = f"{low:.1%} – {high:.1%}"
        steps = "-" if row["steps"] is None else f"{row['steps']:.0f}"
        lines.append(f"{row['task']:<{width}}{row['episodes']:>10}{rate:>9}{interval:>17}{steps:>8}{row['errors']:>8}")
    return "\n".join(lines)


def compare_outcomes(a: Path, b: Path, apart: float = 1e-3) -> dict[str, Any]:
    """Two rollouts on the same episodes, paired: outcomes with McNemar's test, first chunks, and where they part.

    `first_chunk` is the largest relative L2 difference of an episode's first chunk. Two trajectories part at the first
    step whose actions are more than `apart` apart, in the robot's units. Raises ValueError for rollouts that are not of
    the same episodes.
    """
    both = [read_episodes(folder / EPISODES) for folder in (a, b)]
    if not both[0] or both[0].keys() != both[1].keys():
        raise ValueError(f"{a} and {b} are not of the same episodes, or not complete")
    rows, chunks = [], []
    for index, one in both[0].items():
        other = both[1][index]
        if (one.task, one.episode, one.seed) != (other.task, other.episode, other.seed):
            raise ValueError(
                f"{a} and {b}: episode {index} is {one.task} {one.episode}, and {other.task} {other.episode}"
            )
        if "error" in (one.outcome, other.outcome):
            continue
        if one.initial != other.initial:
            raise ValueError(f"{a} and {b}: episode {index} has another initial state")
        ours, theirs = (Trajectory.read(folder / TRAJECTORY.format(index=index)) for folder in (a, b))
        if ours.chunks.shape[1:] == theirs.chunks.shape[1:]:
            scale = float(np.linalg.norm(ours.chunks[0].astype(np.float64)))
            difference = np.linalg.norm(ours.chunks[0].astype(np.float64) - theirs.chunks[0])
            chunks.append(float(difference) / max(scale, 1e-30))
        steps = min(len(ours.actions), len(theirs.actions))
        parted = np.flatnonzero(np.abs(ours.actions[:steps] - theirs.actions[:steps]).max(1) > apart)
        where = int(parted[0]) if len(parted) else None if len(ours.actions) == len(theirs.actions) else steps
        rows.append({"index": index, "task": one.task, "a": one.outcome, "b": other.outcome, "parts_at": where})
    only_a = sum(row["a"] == "success" != row["b"] for row in rows)
    only_b = sum(row["b"] == "success" != row["a"] for row in rows)
    wins = [sum(row[side] == "success" for row in rows) for side in "ab"]
    return {
        "pairs": len(rows),
        "errors": len(both[0]) - len(rows),
        "success_a": wins[0],
        "success_b": wins[1],
        "only_a": only_a,
        "only_b": only_b,
        "difference": (only_a - only_b) / len(rows) if rows else None,
        "interval": list(paired_interval(only_a, only_b, len(rows))),
        "p": mcnemar(only_a, only_b),
        "first_chunk": max(chunks) if chunks else None,
        "same_actions": sum(row["parts_at"] is None for row in rows),
        "apart": apart,
        "episodes": rows,
    }


def comparison_table(figures: Mapping[str, Any], names: Sequence[str] = ("A", "B")) -> str:
    """`compare_outcomes` as text."""
    pairs, (low, high) = figures["pairs"], figures["interval"]
    lines = [f"{name}: {figures[key]} of {pairs}" for name, key in zip(names, ("success_a", "success_b"), strict=True)]
    lines.append(f"only {names[0]}: {figures['only_a']}, only {names[1]}: {figures['only_b']}")
    if figures["difference"] is not None:
        lines.append(
            f"difference {figures['difference']:+.1%} ({low:+.1%} to {high:+.1%}), McNemar p = {figures['p']:.3f}"
        )
    if figures["first_chunk"] is not None:
        lines.append(f"first chunks: relative difference of at most {figures['first_chunk']:.1e}")
    lines.append(f"actions within {figures['apart']:g} all along: {figures['same_actions']} of {pairs} episodes")
    for row in figures["episodes"]:
        if row["a"] != row["b"]:
            lines.append(
                f"  episode {row['index']}, {row['task']}: {row['a']}, {row['b']}; part at step {row['parts_at']}"
            )
    if figures["errors"]:
        lines.append(f"{figures['errors']} episodes ended in an error in one of them, and are left out")
    return "\n".join(lines)
