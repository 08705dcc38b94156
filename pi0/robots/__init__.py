"""One adapter per robot: its recordings in, the model's keys out, and its actions back. `ROBOTS` has them by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

import numpy as np

from pi0.robots.metaworld import MetaWorld


class Robot(Protocol):
    """What every adapter does; see `pi0.transforms` for the model's keys."""

    def to_model(self, item: Mapping[str, Any]) -> dict[str, Any]:
        """One recorded or live frame in the model's flat keys."""
        ...

    def from_model(self, data: Mapping[str, Any]) -> dict[str, np.ndarray]:
        """Un-normalized actions of the model as the robot's own: `action` [T, robot dims]."""
        ...


ROBOTS: dict[str, Callable[[], Robot]] = {"metaworld": MetaWorld}

__all__ = ["ROBOTS", "MetaWorld", "Robot"]
