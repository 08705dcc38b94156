"""Meta-World by its own conventions: where episodes begin, what is seen of them, and what is not."""

from __future__ import annotations

import importlib.util

import numpy as np
import pytest

from pi0_eval.environments.registry import find_tasks, make_environment

pytestmark = [
    pytest.mark.sim,
    pytest.mark.skipif(importlib.util.find_spec("metaworld") is None, reason="no metaworld"),
]
TASKS = ("reach-v3", "button-press-topdown-v3", "drawer-open-v3", "door-open-v3")


def make(task: str, *cameras: str, **options):
    (reference,) = find_tasks({"name": f"metaworld/{task}", **options})
    return make_environment(reference, cameras or None)


def test_episodes_begin_in_different_states_of_their_seed():
    """Not in the one that Meta-World freezes: of every seed, and whatever was run before."""
    environment = make("reach-v3")
    initial = []
    for episode in range(4):
        environment.reset(7, episode)
        initial.append(environment.simulator_state())
        environment.step(np.ones(4, np.float32))
    assert len({state.tobytes() for state in initial}) == 4
    environment.reset(7, 1)
    assert np.array_equal(environment.simulator_state(), initial[1])
    other = make("reach-v3")
    other.reset(8, 0)
    assert np.array_equal(other.simulator_state(), initial[1])  # seed 8, episode 0 is seed 7, episode 1


def test_the_goal_is_in_the_images_and_not_in_the_state():
    environment = make("reach-v3", "topview", "behindGripper", "corner", "wrist")
    seen = []
    for episode in (0, 1):
        environment.reset(0, episode)
        seen.append(environment.observe())
    assert np.array_equal(seen[0]["state"], seen[1]["state"]) and seen[0]["state"].shape == (4,)
    for camera in ("topview", "behindGripper", "corner"):
        assert (seen[0][camera] != seen[1][camera]).any(-1).sum() > 10, camera
        assert seen[0][camera].shape == (128, 128, 3)


def test_images_are_those_of_mujocos_own_renderer():
    """With two environments in one process, and after one of them is closed."""
    import mujoco

    first, second = (make(task, "corner", size=64, full=True) for task in TASKS[:2])
    for environment in (first, second):
        environment.reset(0, 0)
    before = [environment.observe()["corner"] for environment in (first, second)]
    first.close()
    assert np.array_equal(second.observe()["corner"], before[1]) and not np.array_equal(*before)
    with mujoco.Renderer(second._env.model, 64, 64) as renderer:
        renderer.update_scene(second._env.data, "corner")
        np.testing.assert_allclose(renderer.render().astype(int), before[1], atol=2)  # antialiasing of edges


@pytest.mark.parametrize("task", TASKS)
def test_experts_succeed(task: str):
    environment = make(task)
    environment.reset(0, 3)
    act, steps = environment.expert(), 0
    while not environment.success and steps < 150:
        environment.step(act())
        steps += 1
    assert environment.success


def test_names_that_are_unknown():
    with pytest.raises(ValueError, match="no task 'reach-v9'"):
        find_tasks("metaworld/reach-v9")
    with pytest.raises(ValueError, match="no cameras"):
        make("reach-v3", "front")
    with pytest.raises(ValueError, match="no options"):
        find_tasks({"name": "metaworld/reach-v3", "fov": 3})
