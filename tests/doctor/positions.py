"""The bundled recordings as those of a robot that is commanded by positions."""

from __future__ import annotations

from typing import Any

import numpy as np

from pi0.datasets.lerobot import LeRobotDataset


class Positions(LeRobotDataset):
    """Actions are the next state: x, y, z in metres, and the opening of the gripper."""

    def read_columns(self, episode: Any) -> dict[str, Any]:
        columns = dict(super().read_columns(episode))
        state = columns["observation.state"]
        return columns | {"action": np.concatenate([state[1:], state[-1:]])}

    def read_many(self, episodes: Any) -> None:
        return None
