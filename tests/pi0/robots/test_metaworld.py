from __future__ import annotations

import numpy as np
import pytest

from pi0.datasets.lerobot import LeRobotDataset
from pi0.robots.registry import ROBOTS
from pi0.sample import METAWORLD

ROBOT = ROBOTS["metaworld"]()


def test_there_and_back():
    item = LeRobotDataset(METAWORLD, action_horizon=5, episodes=[0])[3]
    data = ROBOT.to_model(item)
    np.testing.assert_array_equal(data["image/base_0_rgb"], item["observation.images.corner"])
    np.testing.assert_array_equal(data["image/left_wrist_0_rgb"], item["observation.images.wrist"])
    np.testing.assert_array_equal(data["state"], item["observation.state"])
    assert data["prompt"] == "reach the red target" and data["image_mask/base_0_rgb"]
    np.testing.assert_array_equal(ROBOT.from_model(data)["action"], item["action"])


def test_refusals():
    with pytest.raises(ValueError, match=r"observation\.state"):
        ROBOT.to_model({"task": "reach"})
    with pytest.raises(ValueError, match=r"\[5, 3\]"):
        ROBOT.from_model({"actions": np.zeros((5, 3))})
