"""The real LeRobot 0.6.1 reads what `DatasetWriter` writes. Needs the environment of make_env.sh."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import numpy as np
import pytest

from pi0.datasets.writer import DatasetWriter
from tests.pi0.datasets.test_writer import FEATURES, frame, write

pytestmark = pytest.mark.peers

SCRIPT = """
import sys
import numpy as np
from lerobot.datasets.lerobot_dataset import LeRobotDataset
dataset = LeRobotDataset("local/written", root=sys.argv[1], video_backend="pyav")
items = [dataset[i] for i in range(len(dataset))]
columns = {key: np.stack([np.asarray(item[key]) for item in items]) for key in items[0] if key != "task"}
np.savez(sys.argv[2], **columns, task=[item["task"] for item in items])
"""


def test_lerobot_reads_it(tmp_path: Path):
    python = Path(os.environ.get("PI0_PEERS", ".cache/peers")).absolute() / "bin" / "python"
    if not python.exists():
        pytest.skip(f"no {python}: tests/peers/make_env.sh makes it")
    with DatasetWriter(tmp_path / "data", fps=10, features=FEATURES, codec="lossless") as writer:
        write(writer, 0, 4, "stack the cups")
        write(writer, 4, 3, "räum auf")
    clean = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | {"HF_HUB_OFFLINE": "1"}
    command = [str(python), "-W", "ignore", "-c", SCRIPT, str(tmp_path / "data"), str(tmp_path / "read.npz")]
    done = subprocess.run(command, capture_output=True, text=True, env=clean)
    assert done.returncode == 0, done.stderr
    read = dict(np.load(tmp_path / "read.npz"))
    assert read["task"].tolist() == ["stack the cups"] * 4 + ["räum auf"] * 3
    assert read["index"].tolist() == list(range(7)) and read["episode_index"].tolist() == [0] * 4 + [1] * 3
    for i in range(7):
        expected = frame(i)
        np.testing.assert_array_equal(read["observation.state"][i], expected["observation.state"].astype(np.float32))
        np.testing.assert_array_equal(read["action"][i], expected["action"])
        image = np.round(read["observation.images.top"][i].transpose(1, 2, 0) * 255)  # of theirs, [0, 1]
        np.testing.assert_array_equal(image, expected["observation.images.top"])
