from __future__ import annotations

import dataclasses
import importlib.util
import json
import sys

import numpy as np
import pytest

from pi0.assets import Assets
from pi0.datasets.lerobot import LeRobotDataset
from pi0.policy.policy import Policy
from pi0.robots.normalize import NormStats
from pi0.robots.registry import make_robot
from pi0.sample import METAWORLD
from pi0.tokenizers.text import BUNDLED, TextTokenizer
from pi0.variants import get_variant
from pi0_eval.replay import Replayed, action_names, compare_actions, main, recorded_actions, replay, table
from pi0_eval.viewer import write_rerun
from tests.pi0_eval.parity.test_compare import random_checkpoint, write

DATASET = LeRobotDataset(METAWORLD, action_horizon=5, episodes=[11, 3])
GENERIC = {
    "name": "generic",
    "cameras": {"corner": "base_0_rgb", "wrist": "left_wrist_0_rgb"},
    "state": [[0, 4]],
    "actions": [[1, 4]],
    "delta_dims": [2, -1],
    "delta": True,
}


def assets(robot: object = "metaworld") -> Assets:
    return Assets(
        get_variant("tiny", max_token_len=24),
        norm_stats={
            "state": NormStats.from_data(DATASET.table("observation.state")),
            "actions": NormStats.from_data(DATASET.table("action")[:, -make_robot(robot).action_dim :]),
        },
        asset_id="metaworld",
        normalization="zscore",
        tokenizer=TextTokenizer(BUNDLED).reference(),
        robot=robot,
    )


class Rote(Policy):
    """Knows the recording by heart, except that draw n adds n / 10 to normalized actions."""

    def __init__(self, robot: object = "metaworld"):
        super().__init__(None, assets(robot))
        self.calls: list[int] = []
        self.draws: dict[bytes, int] = {}
        frames = [DATASET[i] for i in range(len(DATASET))]
        self.known = {row["state"].tobytes(): row["actions"] for row in map(self.pipeline, frames)}

    def sample(self, observation, noise):
        self.calls.append(len(noise))
        draw = self.draws.get(observation.state.tobytes(), 0)
        self.draws[observation.state.tobytes()] = draw + 1
        return np.stack([self.known[state.tobytes()] + np.float32(draw / 10) for state in observation.state])

    def sample_with_subtask(self, observation, noise, subtask):
        raise NotImplementedError


@pytest.mark.parametrize("every", [None, 2])
def test_a_policy_that_knows_the_recording(every: int | None):
    """Each chunk stands where it was predicted for; the second draw is off by a tenth of a standard deviation."""
    policy = Rote()
    episodes = replay(policy, DATASET, every=every, draws=2, batch_size=8)
    assert [(e.episode, len(e.recorded)) for e in episodes] == [(11, 90), (3, 44)]
    assert set(policy.calls) == {8} and sum(e.chunks for e in episodes) == 2 * (27 if every is None else 67)
    std = assets().norm_stats["actions"].std
    for e, start in zip(episodes, (0, 90), strict=True):
        np.testing.assert_array_equal(e.recorded, DATASET.table("action")[start : start + len(e.recorded)])
        assert e.predicted.shape == (2, *e.recorded.shape) and e.task == DATASET[start]["task"]
        # float32's last places of normalized actions up to 4 (2.4e-7 each) and of std + 1e-6 for std
        np.testing.assert_allclose(e.predicted[0], e.recorded, atol=2e-6)
        np.testing.assert_allclose(e.predicted[1], e.recorded + std / 10, atol=2e-6)


def test_a_robot_that_takes_part_of_the_recording():
    """Columns 1 to 3, relative to the state: recorded and predicted are both what it would command."""
    robot = make_robot(GENERIC)
    np.testing.assert_allclose(recorded_actions(DATASET, robot), DATASET.table("action")[:, 1:], atol=1e-6)
    for e in replay(Rote(GENERIC), DATASET, batch_size=50):
        np.testing.assert_allclose(e.predicted[0], e.recorded, atol=2e-6)
    assert action_names(DATASET, robot) == ["action[0]", "action[1]", "action[2]"]


def test_figures_by_hand():
    """Two dimensions of range 4 and 0, two draws of two episodes."""
    episodes = [
        Replayed(0, "a", np.array([[0, 1], [4, 1]], np.float32), np.array([[[1, 1], [4, 1]], [[0, 1], [6, 1]]]), 2, 0),
        Replayed(7, "b", np.array([[2, 1]], np.float32), np.array([[[2, 1]], [[2, 3]]]), 2, 1),
    ]
    figures = compare_actions(episodes, ["x", "grip"], threshold=0.25)
    x, grip = figures["dimensions"]
    assert x == {"name": "x", "mae": 0.5, "mse": 5 / 6, "within": 5 / 6, "mse_to_variance": pytest.approx(5 / 16)}
    assert grip["mse_to_variance"] is None and grip["within"] == 5 / 6 and grip["mse"] == pytest.approx(4 / 6)
    assert figures["episodes"][1] == {"episode": 7, "task": "b", "frames": 1, "mae": [0, 1], "mse": [0, 2]}
    assert (figures["frames"], figures["chunks"], figures["failed_chunks"]) == (3, 4, 1)
    text = table(figures)
    assert "within 25%" in text and "constant" in text and "1 of 4 chunks did not decode to actions" in text


@pytest.mark.parametrize("options", [{"every": 6}, {"every": 0}, {"draws": 0}, {"batch_size": 0}])
def test_refusals(options: dict):
    with pytest.raises(ValueError, match=str(next(iter(options)))):
        replay(Rote(), DATASET, **options)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    whole = dataclasses.replace(random_checkpoint(assets().model), assets=assets())
    return write(whole, tmp_path_factory.mktemp("replay") / "checkpoint", "pi0_torch")


def test_the_command_line(checkpoint, tmp_path, capsys):
    """Both frameworks give the same figures, and what is left is what is printed."""
    figures = {}
    for framework in ("torch", "jax"):
        out = tmp_path / framework
        main([str(checkpoint), str(METAWORLD), "--episodes", "3", "--framework", framework, "--out", str(out)])
        assert sorted(f.name for f in out.iterdir()) == ["episode_000003.png", "replay.json"]
        figures[framework] = json.loads((out / "replay.json").read_text())
    assert "1 episodes, 44 frames, 9 chunks" in capsys.readouterr().out
    assert [row["name"] for row in figures["jax"]["dimensions"]] == ["dx", "dy", "dz", "gripper"]
    for a, b in zip(figures["torch"]["dimensions"], figures["jax"]["dimensions"], strict=True):
        assert a["mse"] == pytest.approx(b["mse"], rel=1e-5)  # of actions that are equal to 3e-6


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["nowhere", str(METAWORLD)], "nowhere"),
        (["CHECKPOINT", "nowhere"], "nowhere"),
        (["CHECKPOINT", str(METAWORLD), "--robot", "toaster"], "toaster"),
        (["CHECKPOINT", str(METAWORLD), "--robot", "libero"], "Libero"),
        (["CHECKPOINT", str(METAWORLD), "--out", "OUT"], "exists already"),
        (["CHECKPOINT", str(METAWORLD), "--framework", "jax", "--device", "cuda"], "--device"),
    ],
)
def test_errors_are_one_line(arguments: list[str], said: str, checkpoint, tmp_path, capsys):
    places = {"CHECKPOINT": str(checkpoint), "OUT": str(tmp_path)}
    with pytest.raises(SystemExit) as stop:
        main([places.get(a, a) for a in arguments])
    error = capsys.readouterr().err
    assert stop.value.code == 1 and said in error and error.startswith("pi0-replay: ") and error.count("\n") == 1


def test_a_file_for_the_rerun_viewer(tmp_path):
    """All frames of two episodes, with images and actions; without the package, the extra is named."""
    pytest.importorskip("rerun")
    episodes = replay(Rote(), DATASET, batch_size=50)
    robot = make_robot("metaworld")
    write_rerun(tmp_path / "episodes.rrd", DATASET, robot, episodes, action_names(DATASET, robot))
    content = (tmp_path / "episodes.rrd").read_bytes()
    assert content[:3] == b"RRF" and len(content) > 100_000


def test_rerun_is_an_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "rerun", None)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"pi0\[rerun\]"):
        write_rerun(tmp_path / "a.rrd", DATASET, make_robot("metaworld"), [], [])
    assert not list(tmp_path.iterdir())
