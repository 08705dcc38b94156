"""Write metaworld_subtasks.jsonl, the subtasks of the bundled recordings, from the phases of each episode.

    python -m pi0.sample.make_subtasks

Phases are detected from the actions: the motion of the hand and the closing of the gripper.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np

from pi0.datasets.registry import open_dataset
from pi0.robots.metaworld import MetaWorld
from pi0.sample import METAWORLD
from pi0.storage import write_text

FILE = Path(__file__).parent / "metaworld_subtasks.jsonl"

# The phases of each task in order, and a test of the action (dx, dy, dz, gripper) at which the phase begins.
Begins = Callable[[np.ndarray], bool]
PHASES: dict[str, list[tuple[str, Begins]]] = {
    "reach the red target": [("go to the red target", lambda a: True)],
    "push the puck to the goal": [
        ("go over the puck", lambda a: True),
        ("go down to the puck", lambda a: a[2] < -0.5),
        ("grasp the puck", lambda a: a[3] > 0.5),
        ("push the puck", lambda a: a[1] > 0.5),
    ],
    "open the drawer": [
        ("go over the handle", lambda a: True),
        ("go down to the handle", lambda a: a[2] < -0.1),
        ("pull the drawer", lambda a: a[1] < -0.5),
    ],
    "press the button from the top": [
        ("go over the button", lambda a: True),
        ("press the button", lambda a: a[2] < -0.9),
    ],
}


def spans(actions: np.ndarray, task: str) -> list[tuple[int, int, str]]:
    """The phases of an episode with actions [F, 4]: first frame, last frame + 1, subtask."""
    starts: list[int] = []
    texts: list[str] = []
    for text, begins in PHASES[task]:
        first = starts[-1] + 1 if starts else 0
        starts.append(next(f for f in range(first, len(actions)) if begins(actions[f])))
        texts.append(text)
    return list(zip(starts, [*starts[1:], len(actions)], texts, strict=True))


def subtasks() -> str:
    """The lines of the file."""
    dataset = open_dataset(METAWORLD, MetaWorld(), cameras=[])
    actions = dataset.table("action")
    lines = []
    for position, episode in enumerate(dataset.episodes):
        first, end = dataset.starts[position : position + 2]
        for start, stop, subtask in spans(actions[first:end], dataset.task(first)):
            row = {"episode": episode.index, "start_frame": start, "end_frame": stop, "subtask": subtask}
            lines.append(json.dumps(row) + "\n")
    return "".join(lines)


if __name__ == "__main__":
    write_text(FILE, subtasks())
