"""`pi0.Policy.from_export`, and exports to ONNX as sides of pi0-parity and pi0-rollout."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import pi0
import pi0_torch
from pi0.assets import AssetsError
from pi0.observation import ObservationError
from pi0.policy.manifest import MANIFEST, ExportError
from pi0_eval.actors import LocalActor
from pi0_eval.parity.command import main as parity
from pi0_eval.parity.sides import Side
from tests.export_case import VELOCITIES, export_velocities, frame

pytest.importorskip("onnxruntime", reason="the extra export is not installed")
pytest.importorskip("onnxscript", reason="the extra export is not installed")


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("exported") / "onnx"
    return export_velocities(folder, "--data", "bundled://metaworld_v30", "--frames", "1")


ALONE = """
import sys
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("torch", "jax", "jaxlib", "flax", "onnx", "onnxscript", "convert"):
            raise ImportError(name + " is blocked")
sys.meta_path.insert(0, Blocker())
import numpy as np, pi0
policy = pi0.Policy.from_export(sys.argv[1])
frame = dict(np.load(sys.argv[2]))
frame["prompt"] = str(frame["prompt"])
np.save(sys.argv[3], policy.infer(frame, noise=frame.pop("noise"))["actions"])
"""


def test_a_robot_with_neither_pytorch_nor_jax(exported: Path, tmp_path: Path):
    """The folder alone, elsewhere, gives the checkpoint's actions in the robot's units."""
    moved = shutil.copytree(exported, tmp_path / "moved")
    policy = pi0_torch.Policy.from_pretrained(VELOCITIES, num_steps=1)
    noise = np.random.default_rng(1).normal(size=(policy.config.action_horizon, policy.config.action_dim))
    np.savez(tmp_path / "frame.npz", **frame(), noise=noise.astype(np.float32))
    files = [str(tmp_path / "frame.npz"), str(tmp_path / "actions.npy")]
    root = Path(__file__).parents[3]
    subprocess.run([sys.executable, "-c", ALONE, str(moved), *files], cwd=root, check=True)
    expected, actions = policy.infer(frame(), noise)["actions"], np.load(tmp_path / "actions.npy")
    assert np.linalg.norm(actions - expected) <= 1e-5 * np.linalg.norm(expected)


def test_any_number_of_observations(exported: Path):
    """A batch of 3 through programs of one row."""
    policy, torch_policy = pi0.Policy.from_export(exported), pi0_torch.Policy.from_pretrained(VELOCITIES, num_steps=1)
    rows = [frame(seed) for seed in range(3)]
    actions, expected = (p.infer_batch(rows)["actions"] for p in (policy, torch_policy))
    np.testing.assert_allclose(actions, expected, rtol=1e-4, atol=1e-5)


def test_what_it_does_not_take_is_refused_by_name(exported: Path):
    policy = pi0.Policy.from_export(exported)
    with pytest.raises(ObservationError, match="no real-time chunking"):
        policy.infer(frame() | {"prev_chunk": np.zeros((2, 4))})
    with pytest.raises(ObservationError, match="wrist"):
        policy.infer({name: value for name, value in frame().items() if name != "wrist"})


def changed(exported: Path, folder: Path, **values: object) -> Path:
    copy = shutil.copytree(exported, folder)
    manifest = json.loads((copy / MANIFEST).read_text()) | values
    (copy / MANIFEST).write_text(json.dumps(manifest))
    return copy


def test_a_damaged_export_is_refused(exported: Path, tmp_path: Path):
    copy = shutil.copytree(exported, tmp_path / "copy")
    weights = copy / "sample.onnx.data"
    weights.write_bytes(weights.read_bytes()[:-4] + b"\0\0\0\1")
    with pytest.raises(ExportError, match=r"sample.onnx.data is not the file that was exported"):
        pi0.Policy.from_export(copy)
    weights.unlink()
    with pytest.raises(ExportError, match=r"lacks \['sample.onnx.data'\]"):
        pi0.Policy.from_export(copy)
    with pytest.raises(ExportError, match="to is 'jar'"):
        pi0.Policy.from_export(changed(exported, tmp_path / "format", to="jar"))
    with pytest.raises(ExportError, match="it must be a whole number"):
        pi0.Policy.from_export(changed(exported, tmp_path / "number", room="many"))
    with pytest.raises(FileNotFoundError):
        pi0.Policy.from_export(tmp_path / "nowhere")


def test_weights_outside_of_the_folder_are_not_read(exported: Path, tmp_path: Path):
    """A model that names a file above its folder."""
    onnx = pytest.importorskip("onnx")
    copy = shutil.copytree(exported, tmp_path / "export")
    shutil.move(copy / "sample.onnx.data", tmp_path / "outside.data")
    model = onnx.load(str(copy / "sample.onnx"), load_external_data=False)
    for tensor in model.graph.initializer:
        for entry in tensor.external_data:
            entry.value = "../outside.data" if entry.key == "location" else entry.value
    (copy / "sample.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(Exception, match=r"(?i)external|outside|escape"):
        pi0.Policy.from_export(copy, verify=False)


def test_parity_takes_it_as_a_side(exported: Path, capsys: pytest.CaptureFixture, tmp_path: Path):
    with pytest.raises(SystemExit) as ended:
        parity([str(VELOCITIES), str(exported), "--framework-b", "onnx", "--json", str(tmp_path / "parity.json")])
    table = capsys.readouterr().out
    assert ended.value.code == 0 and "PASSED: the export gives A's numbers" in table
    assert "step 1 suffix layer 0" in table and "unnormalized actions" in table
    for options, message in {
        ("--framework-b", "pt2"): "is an export to onnx, not to pt2",
        ("--steps", "2"): "the export has 1 in its programs",
        ("--matrix",): "leave out --matrix",
        ("--side-b", "onnx:bfloat16"): "an export has its path, attention and dtype",
    }.items():
        with pytest.raises(SystemExit) as ended:
            parity([str(VELOCITIES), str(exported), *options])
        assert ended.value.code == 2 and message in capsys.readouterr().err
    with pytest.raises(SystemExit):
        parity([str(VELOCITIES), str(VELOCITIES), "--framework-b", "onnx"])
    assert "is no export of pi0-export" in capsys.readouterr().err


def test_a_rollout_does_too(exported: Path):
    actor, torch_actor = LocalActor(str(exported), Side(), 2), LocalActor(str(VELOCITIES), Side(), 2, num_steps=1)
    observations, seeds = {0: frame(), 1: frame(1)}, {0: 5, 1: 6}
    actions, expected = (a.act(observations, seeds) for a in (actor, torch_actor))
    assert actor.describe()["side"] == "onnx:plain" and actor.cameras == torch_actor.cameras
    for row in observations:
        np.testing.assert_allclose(actions[row], expected[row], rtol=1e-4, atol=1e-5)
    with pytest.raises(ExportError, match="not to aoti"):
        LocalActor(str(exported), Side.parse("aoti"), 2)
    with pytest.raises(ValueError, match="has its own num_steps"):
        LocalActor(str(exported), Side(), 2, num_steps=3)


def test_an_export_without_a_robot_is_no_policy(exported: Path, tmp_path: Path):
    copy = shutil.copytree(exported, tmp_path / "export")
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"robot": None}))
    with pytest.raises(AssetsError, match="no robot"):
        pi0.Policy.from_export(copy, verify=False)
