"""The Sawyer arm of Meta-World, as in the bundled sample."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

ACTION_DIM = 4


@dataclasses.dataclass(frozen=True)
class MetaWorld:
    """A Sawyer arm with two cameras: `cameras` maps its recordings' names to the model's.

    state [4]: hand x, y, z in metres, gripper opening; actions [T,4]: dx, dy, dz, gripper, each in [-1, 1].
    """

    cameras: Mapping[str, str] = dataclasses.field(
        default_factory=lambda: {
            "observation.images.corner": "base_0_rgb",
            "observation.images.wrist": "left_wrist_0_rgb",
        }
    )

    def to_model(self, item: Mapping[str, Any]) -> dict[str, Any]:
        """One recorded or live frame in the model's flat keys; actions [T,4] only where `item` has them.

        Raises ValueError if `item` lacks a camera, the state or the task.
        """
        missing = [key for key in (*self.cameras, "observation.state", "task") if key not in item]
        if missing:
            raise ValueError(f"Meta-World item: {missing} missing; it has {sorted(item)}")
        data: dict[str, Any] = {f"image/{name}": np.asarray(item[key]) for key, name in self.cameras.items()}
        data |= {f"image_mask/{name}": np.bool_(True) for name in self.cameras.values()}
        data |= {"state": np.asarray(item["observation.state"], np.float32), "prompt": item["task"]}
        if "action" in item:
            data["actions"] = np.asarray(item["action"], np.float32)
        return data

    def from_model(self, data: Mapping[str, Any]) -> dict[str, np.ndarray]:
        """Un-normalized actions of the model as the robot's own: `action` float32 [T,4]. Raises ValueError."""
        actions = np.asarray(data["actions"], np.float32)
        if actions.ndim != 2 or actions.shape[1] != ACTION_DIM:
            raise ValueError(f"Meta-World actions: shape {list(actions.shape)}; expected [T, {ACTION_DIM}]")
        return {"action": actions}
