"""A robot, a layout, a dataset format and an experiment from outside of the packages, together, from data to parity."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import pi0_torch
import pi0_torch.policy
from convert.checkpoints import open_checkpoint
from convert.conversion import convert
from convert.tensors import same_bytes
from pi0.experiments import read_config
from pi0_eval.parity.compare import assert_parity
from pi0_jax.training.train import train

MIRROR = "tests.my_lab.layouts:MIRROR"


def write_episodes(root: Path) -> Path:
    """Three episodes of 9 frames in npz files."""
    rng = np.random.default_rng(0)
    root.mkdir()
    for episode in range(3):
        arrays = {
            f"{kind}.{part}": rng.normal(size=(9, dims)).astype(np.float32)
            for kind in ("observation", "action")
            for part, dims in (("arm", 3), ("gripper", 1))
        }
        images = {
            f"observation.images.{name}": rng.integers(0, 256, (9, 40, 48, 3), np.uint8)
            for name in ("left", "right", "wrist")
        }
        np.savez(root / f"episode_{episode}.npz", task="fold the towel", **arrays, **images)
    return root


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two steps."""
    folder = tmp_path_factory.mktemp("my_lab")
    root = write_episodes(folder / "towels")
    train(read_config("tests.my_lab.experiments:towels", [f"--config.data.root={root}"]), folder / "run")
    return folder / "run"


def test_from_data_to_parity(run: Path, tmp_path: Path, highest_precision: None):
    convert(run, tmp_path / "mirror", to=MIRROR)
    convert(tmp_path / "mirror", tmp_path / "export", to="pi0_torch", layout=MIRROR)
    for name, tensor in open_checkpoint(run).ours.items():
        assert same_bytes(tensor.read(()), open_checkpoint(tmp_path / "export").ours[name].read(()))
    assert_parity(run, tmp_path / "export", num_steps=3)


def test_the_policy_takes_the_robots_own_observations(run: Path):
    rng = np.random.default_rng(1)
    images = {name: rng.integers(0, 256, (40, 48, 3), np.uint8) for name in ("left", "right", "wrist")}
    observation = {**images, "arm": np.zeros(3), "gripper": 0.0, "prompt": "fold the towel"}
    actions = pi0_torch.Policy.from_pretrained(run, num_steps=2).infer(observation)["actions"]
    assert actions.shape == (5, 4) and np.isfinite(actions).all()
