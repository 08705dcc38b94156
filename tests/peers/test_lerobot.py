"""The real LeRobot 0.6.1 loads what we export and gives our actions. Needs the environment of make_env.sh."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import pi0_torch
from convert.checkpoints import open_checkpoint, write_checkpoint
from convert.conversion import convert
from convert.tensors import Tensor
from pi0.assets import Assets
from pi0.config import ModelConfig
from pi0.parameters import parameters
from pi0.robots.normalize import NormStats
from tests.convert.test_lerobot import GOLDEN, HEAD_DIMS, POLICIES, frames, relative

pytestmark = pytest.mark.peers

TOLERANCE = 3e-5  # relative L2
RUNNER = Path(__file__).parent / "run_lerobot.py"
SIZES = {
    kind: json.loads((GOLDEN / f"{kind}_{name}" / "sizes.json").read_text())
    for kind, name in (("pi0", "base"), ("pi05", "base"))
}
TOKENIZER = {"kind": "sentencepiece", "source": str(GOLDEN / "tokenizer.model")}


@pytest.fixture
def lerobot(tmp_path: Path):
    """Run a folder with LeRobot: its actions or tokens. All keys must have been loaded."""
    environment = Path(os.environ.get("PI0_PEERS", ".cache/peers")).resolve()
    if not (environment / "bin" / "python").exists():
        pytest.skip(f"no environment in {environment}: tests/peers/make_env.sh makes it")

    def run(folder: Path, sizes: dict[str, Any], observations: dict[str, np.ndarray], *dtype: str) -> np.ndarray:
        (tmp_path / "sizes.json").write_text(json.dumps(sizes))
        np.savez(tmp_path / "frames.npz", **observations)
        files = ("sizes.json", "frames.npz", GOLDEN / "tokenizer.model", "out.npz")
        command = [
            environment / "bin" / "python",
            "-W",
            "ignore",
            RUNNER,
            folder,
            *(tmp_path / f for f in files),
            *dtype,
        ]
        clean = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | {"HF_HUB_OFFLINE": "1"}
        done = subprocess.run(list(map(str, command)), capture_output=True, text=True, env=clean)
        assert done.returncode == 0, done.stderr
        found = np.load(tmp_path / "out.npz")
        printed = str(found["printed"])
        assert "All keys loaded successfully!" in printed and "Warning" not in printed, printed
        return found["result"]

    return run


@pytest.mark.parametrize("name", POLICIES)
def test_a_policy_of_lerobots_own_comes_back_to_it(name: str, lerobot, tmp_path: Path):
    """Through our JAX layout, and written anew."""
    shutil.copytree(GOLDEN / name, tmp_path / "source")
    convert(tmp_path / "source", tmp_path / "ours", to="pi0_jax", head_dims=HEAD_DIMS)
    convert(tmp_path / "ours", tmp_path / "exported", to="lerobot")
    expected = dict(np.load(GOLDEN / name / "expected.npz"))
    actions = expected.pop("actions", None)
    if actions is None:  # tokens of one frame for two prompts
        rows = len(expected["prompt"])
        tokens = expected["written_tokens"]
        names = ("base_0_rgb", "base_1_rgb", "wrist_0_rgb", "state")
        expected = {key: np.stack([expected[key]] * rows) for key in names} | {"prompt": expected["prompt"]}
    sizes = json.loads((GOLDEN / name / "sizes.json").read_text())
    found = lerobot(tmp_path / "exported", sizes, expected)
    if actions is None:
        np.testing.assert_array_equal(found, tokens)
    else:
        assert relative(found, actions) < TOLERANCE


def our_checkpoint(folder: Path, kind: str, dtype: np.dtype, **assets: Any) -> ModelConfig:
    """A random model of ours that LeRobot never saw, exported."""
    sizes = SIZES[kind]
    values = {name: sizes[name] for name in ("kind", "vision", "paligemma", "action_expert", "vocab_size")}
    values |= {"image_resolution": [56, 56], "image_keys": ["base_0_rgb", "left_wrist_0_rgb"], "action_dim": 12}
    values |= {"action_horizon": 6, "max_token_len": 60, "runtime": {"dtype": "float32"}}
    model, rng = ModelConfig.from_dict(values), np.random.default_rng(0)
    ours = {n: Tensor.of((rng.normal(size=p.shape) * 0.1).astype(dtype)) for n, p in parameters(model).items()}
    stats = {}
    for key, size in (("state", 8), ("actions", 8)):
        stats[key] = NormStats.from_data(
            rng.normal(size=(50, size)) * rng.uniform(0.5, 2, size) + rng.normal(size=size)
        )
    robot = {"name": "droid", "cameras": {"outside": "base_0_rgb", "wrist": "left_wrist_0_rgb"}}
    fields = {"norm_stats": stats, "asset_id": "robot", "robot": robot, "tokenizer": TOKENIZER} | assets
    template = open_checkpoint(shutil.copytree(GOLDEN / "pi0_base", folder.parent / "template"), head_dims=HEAD_DIMS)
    folder.mkdir()
    checkpoint = dataclasses.replace(template, assets=Assets(model, **fields), ours=ours, norm_stats={})
    write_checkpoint(checkpoint, folder, "lerobot")
    return model


@pytest.mark.parametrize(
    ("kind", "dtype", "assets"),
    [
        ("pi0", "float32", {"normalization": "zscore"}),
        ("pi0", "bfloat16", {"normalization": "zscore"}),
        ("pi05", "float32", {"normalization": "quantile"}),
        ("pi0", "float32", {"normalization": {"state": "mean_std", "actions": "min_max", "eps": 1e-8}}),
        (
            "pi0",
            "float32",
            {
                "normalization": "min_max",
                "robot": {
                    "name": "droid",
                    "delta": True,
                    "cameras": {"outside": "base_0_rgb", "wrist": "left_wrist_0_rgb"},
                },
            },
        ),
    ],
)
def test_what_we_export_runs_there_as_here(kind: str, dtype: str, assets: dict, lerobot, tmp_path: Path):
    """Our models: openpi's normalization, other modes, relative actions, renamed cameras, bfloat16 weights."""
    import ml_dtypes

    width = np.dtype(ml_dtypes.bfloat16 if dtype == "bfloat16" else np.float32)
    our_checkpoint(tmp_path / "exported", kind, width, **assets)
    rng = np.random.default_rng(1)
    observations = {
        "observation.images.outside": rng.integers(0, 256, (2, 56, 56, 3), np.uint8),
        "observation.images.wrist": rng.integers(0, 256, (2, 56, 56, 3), np.uint8),
        "observation.state": rng.normal(size=(2, 8)).astype(np.float32),
        "prompt": np.array(["open the drawer", "push the puck"]),
        "noise": rng.normal(size=(2, 6, 12)).astype(np.float32),
    }
    found = lerobot(tmp_path / "exported", SIZES[kind], observations, "float32")
    policy = pi0_torch.Policy.from_pretrained(tmp_path / "exported", dtype="float32")
    ours = policy.infer_batch(frames(observations), observations["noise"])["actions"]
    print(f"{kind} {dtype} {assets['normalization']}: {relative(ours, found):.1e}")  # shown by -rP
    assert relative(ours, found) < TOLERANCE
