"""How episodes are run, as the reference evaluations do it: `PROTOCOLS`."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from pi0_eval.environments.registry import task_name


@dataclasses.dataclass(frozen=True)
class Protocol:
    """An evaluation that others have published figures of.

    Attributes:
        env: the environments, where none are named.
        episodes: of each task.
        seed: of the initial states.
        idle: first steps with the idle action, while objects settle.
        replan: actions of a chunk that are applied; None: all.
        limits: steps of an episode by the beginning of a task's name; others have the environment's own.
        source: where the numbers are from.
    """

    env: tuple[str, ...] = ()
    episodes: int = 25
    seed: int = 0
    idle: int = 0
    replan: int | None = None
    limits: Mapping[str, int] = dataclasses.field(default_factory=dict)
    source: str = ""

    def limit(self, reference: Mapping[str, Any]) -> int | None:
        """The steps of an episode of a task, None for the environment's own."""
        task = task_name(reference)
        return next((steps for prefix, steps in self.limits.items() if task.startswith(prefix)), None)


PROTOCOLS = {
    "default": Protocol(),
    "libero": Protocol(
        env=("libero/libero_spatial", "libero/libero_object", "libero/libero_goal", "libero/libero_10"),
        episodes=50,
        seed=7,
        idle=10,
        replan=5,
        limits={
            "libero/libero_spatial/": 220,
            "libero/libero_object/": 280,
            "libero/libero_goal/": 300,
            "libero/libero_10/": 520,
            "libero/libero_90/": 400,
        },
        source="openpi examples/libero/main.py",
    ),
    "aloha": Protocol(
        env=("aloha/transfer_cube",),
        episodes=50,
        replan=10,
        limits={"aloha/": 300},
        source="openpi examples/aloha_sim/main.py, and gym-aloha's limit",
    ),
}
