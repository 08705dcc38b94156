"""What the release before wrote still loads: `tests/written_before`, by commit a3f1ffb, with the actions it gave."""

from __future__ import annotations

from pathlib import Path

import numpy as np

import pi0_torch
from convert.checkpoints import open_checkpoint
from convert.tensors import same_bytes
from pi0.datasets.frames import FrameCache
from pi0.datasets.lerobot import LeRobotDataset
from pi0.robots.normalize import load_norm_stats
from pi0.tokenizers.fast import FASTTokenizer

FOLDER = Path(__file__).parent / "written_before"
EXPECTED = np.load(FOLDER / "expected.npz")


def test_policies():
    """Their float32 actions to 1e-5 of the robot's units of about 1, as another machine's rounding gives them."""
    frame = LeRobotDataset("bundled://metaworld_v30")[10]
    for name, expected in (("export", EXPECTED["actions"]), ("run", EXPECTED["actions_run"])):
        policy = pi0_torch.Policy.from_pretrained(FOLDER / name)
        np.testing.assert_allclose(policy.infer(frame)["actions"], expected, atol=1e-5)
    policy = pi0_torch.Policy.from_pretrained(FOLDER / "export_fast", fallback=True)
    np.testing.assert_array_equal(policy.sample(policy.inputs([frame]), None), EXPECTED["tokens"])


def test_a_run_has_both_sets_of_weights():
    run, exported = (open_checkpoint(FOLDER / name) for name in ("run", "export"))
    trained = open_checkpoint(FOLDER / "run", ema=False)
    assert run.assets.step == 2
    for name, tensor in run.ours.items():
        assert same_bytes(tensor.read(()), exported.ours[name].read(()))
        assert trained.ours[name].shape == tensor.shape
    assert any(not same_bytes(tensor.read(()), trained.ours[name].read(())) for name, tensor in run.ours.items())


def test_frames_stats_and_tokenizer():
    for folder in (FOLDER / "frames").iterdir():
        assert FrameCache(folder).read(15, 0).shape == (4, 4, 3)
    stats = load_norm_stats(FOLDER / "stats/metaworld/norm_stats.json")
    assert len(stats["state"].mean) == len(stats["actions"].mean) == 4
    tokenizer = FASTTokenizer(FOLDER / "export_fast/assets/fast_tokenizer")
    chunk = np.linspace(-1, 1, 20).reshape(5, 4)
    assert np.abs(tokenizer.decode(tokenizer.encode(chunk), 5, 4)[0] - chunk).max() < 0.3
