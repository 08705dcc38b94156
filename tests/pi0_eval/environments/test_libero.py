"""LIBERO by openpi's conventions (`examples/libero/main.py`), against the benchmark's own environment."""

from __future__ import annotations

import importlib.util
import math
from pathlib import Path

import numpy as np
import pytest

from pi0_eval.environments.libero import CAMERAS, IDLE, axis_angle
from pi0_eval.environments.protocols import PROTOCOLS
from pi0_eval.environments.registry import find_tasks, make_environment

SUITES = ("libero_spatial", "libero_object", "libero_goal", "libero_10")


def test_axis_angle():
    """Turns about known axes; angles above π stay what they are, as openpi has them."""
    for axis, angle in (((1, 0, 0), 0.5), ((0, 0, 1), 3.0), ((0.6, 0.8, 0), 4.0)):
        quaternion = np.array([*(np.array(axis) * math.sin(angle / 2)), math.cos(angle / 2)])
        np.testing.assert_allclose(axis_angle(quaternion), np.array(axis) * angle, atol=1e-12)
    assert not axis_angle(np.array([0.0, 0.0, 0.0, 1.0])).any()
    assert np.isfinite(axis_angle(np.array([0.0, 0.0, 0.0, -1.0000001]))).all()


@pytest.fixture(scope="module")
def benchmark():
    """The benchmark's module of suites."""
    if importlib.util.find_spec("libero") is None:  # importing it first would have MuJoCo render to a display
        pytest.skip("no libero")
    find_tasks("libero/libero_10/0")  # chooses how MuJoCo renders
    from libero.libero import benchmark

    return benchmark


def direct(benchmark, suite_name: str, number: int, size: int):
    """The benchmark's own environment as openpi makes it, and the initial states."""
    from libero.libero import get_libero_path
    from libero.libero.envs import OffScreenRenderEnv

    suite = benchmark.get_benchmark_dict()[suite_name]()
    task = suite.get_task(number)
    file = Path(get_libero_path("bddl_files")) / task.problem_folder / task.bddl_file
    environment = OffScreenRenderEnv(bddl_file_name=file, camera_heights=size, camera_widths=size)
    return environment, suite.get_task_init_states(number), task


@pytest.mark.sim
@pytest.mark.parametrize("suite", SUITES)
def test_the_benchmarks_own_environment(suite: str, benchmark):
    """A protocol's initial observation, idle steps, and random actions: images and states equal, bit for bit."""
    size, rng = 64, np.random.default_rng(0)
    theirs, states, task = direct(benchmark, suite, 1, size)
    theirs.seed(7)
    theirs.reset()
    seen = theirs.set_init_state(states[0])
    (reference,) = find_tasks({"name": f"libero/{suite}/1", "size": size})
    ours = make_environment(reference)
    ours.reset(7, 0)
    assert ours.instruction == task.language and len(states) == PROTOCOLS["libero"].episodes
    assert ours.limit == PROTOCOLS["libero"].limit(reference)
    actions = [np.array(IDLE, np.float32)] * 3 + list(rng.uniform(-1, 1, (5, 7)).astype(np.float32))
    for step in range(len(actions) + 1):
        found = ours.observe()
        for name, camera in CAMERAS.items():
            assert np.array_equal(found[name], seen[f"{camera}_image"][::-1, ::-1]), (step, name)
        expected = np.concatenate(
            (seen["robot0_eef_pos"], axis_angle(seen["robot0_eef_quat"]), seen["robot0_gripper_qpos"])
        )
        np.testing.assert_array_equal(found["state"], expected.astype(np.float32))
        assert np.array_equal(ours.simulator_state(), theirs.get_sim_state())
        if step < len(actions):
            ours.step(actions[step])
            seen, _, done, _ = theirs.step(actions[step].tolist())
            assert done == ours.success
    theirs.close()
    ours.close()


@pytest.mark.sim
def test_an_episode_does_not_depend_on_what_was_before(benchmark):
    (reference,) = find_tasks({"name": "libero/libero_goal/0", "size": 64})
    environment = make_environment(reference)
    action, found = np.full(7, 0.3, np.float32), []
    for episode in (0, 5, 0):
        environment.reset(7, episode)
        environment.step(action)
        found.append((environment.simulator_state(), environment.observe()["image"]))
    assert np.array_equal(found[0][0], found[2][0]) and np.array_equal(found[0][1], found[2][1])
    assert not np.array_equal(found[0][0], found[1][0])
    with pytest.raises(ValueError, match="50 initial states of a task, and no 50"):
        environment.reset(7, 50)


@pytest.mark.sim
def test_suites(benchmark):
    assert len(find_tasks("libero/libero_spatial")) == 10 and len(find_tasks("libero/libero_90")) == 90
    with pytest.raises(ValueError, match="no suite 'libero_11'"):
        find_tasks("libero/libero_11")
    with pytest.raises(ValueError, match="0 to 9"):
        find_tasks("libero/libero_10/10")
