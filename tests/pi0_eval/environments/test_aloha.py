"""gym-aloha's tasks, against its own environment."""

from __future__ import annotations

import importlib.util

import numpy as np
import pytest

from pi0_eval.environments.registry import find_tasks, make_environment

pytestmark = [
    pytest.mark.sim,
    pytest.mark.skipif(importlib.util.find_spec("gym_aloha") is None, reason="no gym_aloha"),
]


@pytest.mark.parametrize(("task", "theirs"), [("transfer_cube", "TransferCube"), ("insertion", "Insertion")])
def test_gym_alohas_own_environment(task: str, theirs: str):
    """Initial observation and those after random actions: images and states equal, bit for bit."""
    (reference,) = find_tasks(f"aloha/{task}")
    import gym_aloha  # noqa: F401  registers them
    import gymnasium

    ours, environment = (
        make_environment(reference),
        gymnasium.make(f"gym_aloha/Aloha{theirs}-v0", obs_type="pixels_agent_pos"),
    )
    ours.reset(3, 4)
    ours.step(ours.idle_action)
    ours.reset(3, 2)  # nothing of the last episode is left
    seen, _ = environment.reset(seed=5)
    rng = np.random.default_rng(0)
    for _ in range(3):
        found = ours.observe()
        assert np.array_equal(found["cam_high"], seen["pixels"]["top"])
        assert np.array_equal(found["state"], seen["agent_pos"].astype(np.float32))
        action = (found["state"] + rng.normal(scale=0.05, size=14)).astype(np.float32)
        ours.step(action)
        seen, reward, *_ = environment.step(action.astype(np.float64))
        assert ours.success == (reward == 4)
    physics = environment.unwrapped._env.physics
    assert np.array_equal(ours.simulator_state(), np.concatenate([physics.data.qpos, physics.data.qvel]))
