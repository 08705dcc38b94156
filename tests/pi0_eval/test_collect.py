from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

import pi0_eval.collect
from pi0.datasets.registry import open_dataset
from pi0.robots.registry import make_robot
from pi0_eval.closed_loop import Plan
from pi0_eval.collect import ATTEMPTS, collect_policy, main
from pi0_eval.environments.workers import Pool

TOY = "tests.pi0_eval.toy_environment:Reach"


@pytest.fixture(scope="module", autouse=True)
def pools():
    """The processes are those of all tests."""
    made: dict[int, Pool] = {}

    class Kept:
        def __init__(self, workers: int):
            self.pool = made.setdefault(workers, Pool(workers))

        def __enter__(self) -> Pool:
            return self.pool

        def __exit__(self, *_: object) -> None:
            return None

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pi0_eval.collect, "Pool", Kept)
        yield
    for pool in made.values():
        pool.close()


def collect(out: Path, *options: str, workers: int = 1, env: str = TOY) -> None:
    main([str(out), "--env", env, "--episodes", "3", "--workers", str(workers), "--codec", "lossless", *options])


def recorded(out: Path) -> list[dict]:
    dataset = open_dataset(out, make_robot("metaworld"))
    return [dataset[i] for i in range(len(dataset))]


def assert_same(a: Path, b: Path) -> None:
    for one, other in zip(recorded(a), recorded(b), strict=True):
        assert one.keys() == other.keys()
        for key, value in one.items():
            np.testing.assert_array_equal(value, other[key], err_msg=key)


def test_what_is_recorded(tmp_path: Path, capsys):
    collect(tmp_path / "a", "--after", "2")
    assert capsys.readouterr().out.count("3 of 3 succeeded, 3 episodes kept") == 2
    dataset = open_dataset(tmp_path / "a", make_robot("metaworld"))
    assert len(dataset.episodes) == 6 and dataset.task(0) == "reach to the left"
    rows = recorded(tmp_path / "a")
    first = rows[: dataset.starts[1]]
    states = np.stack([row["observation.state"] for row in first])[:, :3]
    actions = np.stack([np.reshape(row["action"], (-1, 4))[0] for row in first])[:, :3]
    np.testing.assert_allclose(np.diff(states, axis=0), 0.1 * actions[:-1], atol=1e-6)  # float32
    goal = states[-1] + actions[-1] / 5  # of the expert, whose last actions are not clipped
    assert np.abs(states[-3] - goal).max() > 0.1 > np.abs(states[-2] - goal).max()  # 2 steps after the success
    image = first[0]["observation.images.corner"]
    assert image.dtype == np.uint8 and (image == 255).any()
    attempts = json.loads((tmp_path / "a" / ATTEMPTS).read_text())["attempts"]
    assert [row["dataset_episode"] for row in attempts] == list(range(6))


def test_the_same_with_more_workers_and_after_a_kill(tmp_path: Path, monkeypatch):
    collect(tmp_path / "one", "--noise", "0.3")
    collect(tmp_path / "two", "--noise", "0.3", workers=2)
    assert_same(tmp_path / "one", tmp_path / "two")

    saved, save = [], pi0_eval.collect._save

    def killed(*arguments) -> None:
        saved.append(arguments)
        if len(saved) == 5:
            raise KeyboardInterrupt  # entered as an attempt, and not in the dataset
        save(*arguments)

    monkeypatch.setattr(pi0_eval.collect, "_save", killed)
    with pytest.raises(SystemExit):
        collect(tmp_path / "cut", "--noise", "0.3")
    monkeypatch.undo()
    assert len(open_dataset(tmp_path / "cut", make_robot("metaworld")).episodes) == 4
    collect(tmp_path / "cut", "--noise", "0.3", workers=2)
    assert_same(tmp_path / "cut", tmp_path / "one")


def test_noise_is_applied_and_not_recorded(tmp_path: Path):
    collect(tmp_path / "a", "--noise", "0.5", env=f"{TOY}/left")
    rows = recorded(tmp_path / "a")[:4]
    states = np.stack([row["observation.state"] for row in rows])[:, :3]
    actions = np.stack([np.reshape(row["action"], (-1, 4))[0] for row in rows])[:, :3]
    assert np.abs(np.diff(states, axis=0) - 0.1 * actions[:-1]).max() > 0.005
    assert np.abs(actions[0, 0]) == 1  # clipped, and without noise


def test_failed_attempts_are_left_out_and_listed(tmp_path: Path, capsys):
    with pytest.raises(SystemExit):
        collect(tmp_path / "a", "--limit", "1", env=f"{TOY}/left")
    assert "the expert failed in 15 of 15 attempts" in capsys.readouterr().err
    attempts = json.loads((tmp_path / "a" / ATTEMPTS).read_text())["attempts"]
    assert [row["success"] for row in attempts] == [False] * 15


def test_an_error_of_the_simulator(tmp_path: Path, capsys):
    with pytest.raises(SystemExit):
        collect(tmp_path / "a", env=f'{{"name": "{TOY}/left", "raises": 1}}')
    assert "seed 0, episode 1" in (error := capsys.readouterr().err) and "unstable" in error
    assert len(open_dataset(tmp_path / "a", make_robot("metaworld")).episodes) == 1


def test_other_settings_do_not_go_on(tmp_path: Path, capsys):
    collect(tmp_path / "a", env=f"{TOY}/left")
    with pytest.raises(SystemExit):
        collect(tmp_path / "a", "--noise", "0.1", env=f"{TOY}/left")
    assert "begun with other settings: noise 0.0, not 0.1" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        collect(tmp_path / "a", "--noise", "-1")
    assert "noise" in capsys.readouterr().err
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "thesis.txt").touch()
    with pytest.raises(SystemExit):
        collect(tmp_path / "b")
    assert "was not begun by pi0-collect" in capsys.readouterr().err


def test_what_a_policy_does(tmp_path: Path):
    """All episodes, failed ones too, with the actions that were applied."""

    class Half:
        cameras, horizon, rtc = ("corner", "wrist"), 2, None

        def act(self, observations, seeds):
            return {row: np.full((2, 4), 0.5, np.float32) for row in observations}

        def describe(self):
            return {"checkpoint": "half"}

    plan = Plan(({"name": TOY, "task": "left"},), 3, 0, 2, batch_size=2, limits={f"{TOY}/left": 5})
    with pi0_eval.collect.Pool(1) as pool:
        attempts = collect_policy(tmp_path / "a", pool, plan, Half(), "lossless")
        with pytest.raises(FileExistsError):
            collect_policy(tmp_path / "a", pool, plan, Half())
    assert [row["success"] for row in attempts] == [False] * 3 and {row["steps"] for row in attempts} == {5}
    rows = recorded(tmp_path / "a")
    assert len(rows) == 15
    states = np.stack([row["observation.state"] for row in rows[:5]])
    np.testing.assert_allclose(np.diff(states[:, :3], axis=0), 0.05, atol=1e-6)  # float32
    assert all(np.all(row["action"] == 0.5) for row in rows)


def test_recorded_actions_are_replayed(tmp_path: Path, capsys):
    """Those of an expert give its states again; those that do not succeed are left out."""
    collect(tmp_path / "a", "--after", "0", env=f"{TOY}/left")
    dataset = open_dataset(tmp_path / "a", make_robot("metaworld"))
    rows, files = recorded(tmp_path / "a"), []
    for i, (start, end) in enumerate(zip(dataset.starts[:-1], dataset.starts[1:], strict=True)):
        actions = np.stack([np.reshape(row["action"], (-1, 4))[0] for row in rows[start:end]])
        files.append(tmp_path / f"{i}.npz")
        np.savez(files[-1], actions=actions if i != 1 else -actions)
    out = str(tmp_path / "b")
    main([out, "--env", f"{TOY}/left", "--actions", *map(str, files), "--after", "0", "--codec", "lossless"])
    assert "2 of 3 succeeded, 2 episodes kept" in capsys.readouterr().out
    again = recorded(tmp_path / "b")
    expected = [*rows[: dataset.starts[1]], *rows[dataset.starts[2] :]]
    for one, other in zip(again, expected, strict=True):
        np.testing.assert_array_equal(one["observation.state"], other["observation.state"])
    np.savez(tmp_path / "bad.npz", states=np.zeros((2, 4)))
    with pytest.raises(SystemExit):
        main([str(tmp_path / "c"), "--env", f"{TOY}/left", "--actions", str(tmp_path / "bad.npz")])
    assert "has no `actions`" in capsys.readouterr().err


def test_numbers_of_episodes_by_task(tmp_path: Path, capsys):
    main([str(tmp_path / "a"), "--env", TOY, "--episodes", "1", "2", "--codec", "lossless"])
    rows = json.loads((tmp_path / "a" / ATTEMPTS).read_text())["attempts"]
    assert list(Counter(row["task"] for row in rows if row["success"]).values()) == [1, 2]
    with pytest.raises(SystemExit):
        main([str(tmp_path / "b"), "--env", TOY, "--episodes", "1", "2", "3", "--codec", "lossless"])
    assert "3 numbers for 2 tasks; give one, or one for each" in capsys.readouterr().err
    assert not (tmp_path / "b").exists()
