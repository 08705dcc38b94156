from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from pi0.datasets.check import main as check_data
from pi0.datasets.lerobot import LeRobotDataset
from pi0_eval.replay import main as replay
from pi0_serve import Client, Recorder
from tests.pi0_serve.serving import TASK, observation, serve, write_tiny


def test_a_session_is_a_dataset_that_replays(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """Recorded actions are replayed to rounding: batches of 16 against one at a time, in float32."""
    import pi0_torch

    policy = pi0_torch.Policy.from_pretrained(write_tiny(tmp_path / "checkpoint"), use_sampler=True)
    recorder, sent = Recorder(tmp_path / "served"), []
    with (
        serve(policy, recorder=recorder) as found,
        Client(port=found.port) as first,
        Client(port=found.port) as second,
    ):
        for i in range(7):
            sent.append((0, first.infer(observation(i))["actions"]))
            if i < 4:
                sent.append((1, second.infer(observation(100 + i))["actions"]))
            if i == 3:
                first.reset()
    dataset = LeRobotDataset(tmp_path / "served")
    assert sorted(e.length for e in dataset.episodes) == [3, 4, 4]
    check_data([str(tmp_path / "served")])
    assert "no damage found" in capsys.readouterr().out
    first = dataset[int(dataset.starts[[e.length for e in dataset.episodes].index(3)])]
    expected = observation(4)
    np.testing.assert_array_equal(first["observation.images.corner"], expected["corner"])  # bit for bit
    np.testing.assert_array_equal(first["observation.state"], expected["state"])
    np.testing.assert_array_equal(first["action"][0], sent[8][1][0])
    assert first["task"] == TASK
    arguments = [str(tmp_path / "checkpoint"), str(tmp_path / "served"), "--every", "1", "--out", str(tmp_path / "out")]
    replay(arguments)
    figures = json.loads((tmp_path / "out" / "replay.json").read_text())
    assert figures["frames"] == 11
    assert max(row["mae"] for row in figures["dimensions"]) < 3e-6


def test_a_folder_of_something_else_is_left_alone(tmp_path: Path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="something else"):
        Recorder(tmp_path)
