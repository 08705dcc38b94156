"""ManiSkill's tasks, against its own environment."""

from __future__ import annotations

import importlib.util

import numpy as np
import pytest

from pi0_eval.environments.maniskill import ROBOT
from pi0_eval.environments.registry import find_tasks, make_environment

pytestmark = [
    pytest.mark.sim,
    pytest.mark.skipif(importlib.util.find_spec("mani_skill") is None, reason="no mani_skill"),
]


@pytest.mark.parametrize("task", ["PickCube-v1", "StackCube-v1"])
def test_maniskills_own_environment(task: str):
    """Initial observation and those after random actions: images and states equal, bit for bit."""
    (reference,) = find_tasks(f"maniskill/{task}")
    import gymnasium

    ours = make_environment(reference)
    own = gymnasium.make(task, obs_mode="rgb", control_mode="pd_joint_pos", robot_uids=ROBOT, sim_backend="physx_cpu")
    ours.reset(3, 4)
    ours.step(ours.idle_action)
    ours.reset(3, 2)  # nothing of the last episode is left
    seen, _ = own.reset(seed=5, options={"reconfigure": True})
    rng = np.random.default_rng(0)
    for _ in range(3):
        found = ours.observe()
        for camera in ours.cameras:
            assert np.array_equal(found[camera], seen["sensor_data"][camera]["rgb"][0].numpy())
        qpos = seen["agent"]["qpos"][0].numpy()
        assert np.array_equal(found["state"], qpos[:8])
        action = np.append(qpos[:7] + rng.normal(scale=0.05, size=7), rng.uniform(-1, 1)).astype(np.float32)
        ours.step(action)
        seen, _, _, _, info = own.step(action)
        assert ours.success == bool(info["success"])
    assert np.array_equal(ours.simulator_state(), own.unwrapped.get_state()[0].numpy())


def test_a_camera_that_is_none():
    (reference,) = find_tasks("maniskill/PickCube-v1")
    with pytest.raises(ValueError, match=r"has no cameras .'side'.; it has base_camera, hand_camera"):
        make_environment(reference, ("side",))
    with pytest.raises(ValueError, match="ManiSkill has no task 'PickCup'; it has"):
        find_tasks("maniskill/PickCup")
