"""Runs that openpi saved: opened by the preset of their config alone, they give openpi's actions."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

import pi0_jax
import pi0_torch
from convert.checkpoints import open_checkpoint
from convert.conversion import convert
from convert.formats.orbax import write_orbax
from convert.inspection import inspect
from convert.tensors import CheckpointError, Tensor
from pi0.assets import AssetsError
from pi0.config import ConfigError
from pi0.observation import ObservationError
from pi0.parameters import LayoutError
from pi0.presets import PRESETS, UNSUPPORTED, get_preset
from pi0.robots.registry import make_robot

FOLDER = Path(__file__).parent / "openpi_runs"
TOKENIZER = str(FOLDER / "tokenizer.model")
NAMES = ("pi0_aloha_sim", "pi05_droid", "pi05_libero", "pi0_libero_low_mem_finetune")
LORA = "pi0_libero_low_mem_finetune"
FRAMEWORKS = {"jax": pi0_jax.Policy, "torch": pi0_torch.Policy}

pytestmark = pytest.mark.usefixtures("highest_precision")


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> dict[str, Path]:
    """The folder of each run: steps beside each other, each with `params` and `assets`."""
    root = tmp_path_factory.mktemp("runs")
    shutil.copytree(FOLDER, root, dirs_exist_ok=True)
    shutil.copytree(root / "pi05_libero" / "run" / "2" / "params", root / "pi05_droid" / "run" / "2" / "params")
    return {name: root / name / "run" for name in NAMES}


def expected(name: str) -> tuple[dict[str, Any], np.ndarray, np.ndarray]:
    """An observation, noise and openpi's actions."""
    data = dict(np.load(FOLDER / name / "expected.npz"))
    noise, actions = data.pop("noise"), data.pop("actions")
    return data, noise, actions


def load(framework: str, source: Path, **options: Any) -> Any:
    return FRAMEWORKS[framework].from_pretrained(source, dtype="float32", tokenizer=TOKENIZER, **options)


def error(policy: Any, name: str) -> float:
    """The relative L2 distance of a policy's actions to openpi's."""
    observation, noise, actions = expected(name)
    found = policy.infer(observation, noise)["actions"]
    assert found.shape == actions.shape
    return float(np.linalg.norm(found - actions) / np.linalg.norm(actions))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_a_run_opens_by_its_preset_alone(framework: str, name: str, runs):
    assert error(load(framework, runs[name], preset=name), name) <= 1e-6


@pytest.mark.parametrize("name", NAMES)
def test_a_converted_run_needs_no_preset(name: str, runs, tmp_path):
    convert(runs[name], tmp_path / "torch", to="pi0_torch", preset=name)
    assert error(load("torch", tmp_path / "torch"), name) <= 1e-6


def test_what_is_assumed_stays_so_through_a_conversion(runs, tmp_path):
    """A config of ours that says 50 actions, because nobody said otherwise, is no better than none."""
    said: list[str] = []
    written = convert(runs["pi05_droid"], tmp_path / "torch", to="pi0_torch", log=said.append)
    assert written.assets.assumed == ("action_horizon", "max_token_len", "image_keys")
    assert "action_horizon 50" in said[-1] and "--preset" in said[-1]
    with pytest.raises(AssetsError, match="preset="):
        load("torch", tmp_path / "torch", robot="droid")
    assert error(load("torch", tmp_path / "torch", preset="pi05_droid"), "pi05_droid") <= 1e-6
    convert(runs["pi05_droid"], tmp_path / "other", to="pi0_torch", action_horizon=15)
    assert error(load("torch", tmp_path / "other", robot="droid"), "pi05_droid") <= 1e-6


def test_a_horizon_is_not_guessed(runs, caplog):
    options = {"robot": "droid"}
    with pytest.raises(AssetsError, match=r"pi05_droid, pi05_.*action_horizon="):
        load("torch", runs["pi05_droid"], **options)
    policy = load("torch", runs["pi05_droid"], **options, action_horizon=15)
    assert error(policy, "pi05_droid") <= 1e-6
    assert "assumed, as in released models: max_token_len 200" in caplog.text
    with pytest.raises(AssetsError, match="the checkpoint says 15"):
        load("torch", runs["pi05_droid"], preset="pi05_droid", action_horizon=50)


def test_presets_that_do_not_fit(runs, tmp_path):
    with pytest.raises(ConfigError, match=r"unknown preset 'pi05_droit'; known presets are pi0_aloha, "):
        open_checkpoint(runs["pi05_droid"], preset="pi05_droit")
    with pytest.raises(LayoutError, match="kind is 'pi05', not 'pi0'"):
        open_checkpoint(runs["pi05_droid"], preset="pi0_droid")
    with pytest.raises(LayoutError, match=r"no norm stats 'droid'; it has physical-intelligence/libero"):
        open_checkpoint(runs["pi05_libero"], preset="pi05_droid")
    for name in UNSUPPORTED:
        with pytest.raises(ConfigError, match="has no preset"):
            get_preset(name)
    convert(runs["pi05_droid"], tmp_path / "droid", to="pi0_jax", preset="pi05_droid")
    with pytest.raises(LayoutError, match="action_horizon is 15, not 16"):  # a file of the checkpoint says it
        open_checkpoint(tmp_path / "droid", preset="pi05_droid_finetune")


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset(name: str):
    preset = PRESETS[name]
    robot = make_robot(preset.robot)
    assert set(robot.cameras.values()) <= set(preset.image_keys)
    assert robot.action_dim <= preset.action_dim
    assert json.loads(json.dumps(preset.robot)) == preset.robot


@pytest.mark.parametrize("name", NAMES)
def test_inspection_names_the_preset(name: str, runs):
    found = inspect(runs[name])
    assert name in found.presets and found.step == 2 and found.robot is None and not found.problems
    assert found.assumed == ("action_horizon", "max_token_len", "image_keys")
    text = found.text()
    assert f"{name} (horizon {PRESETS[name].action_horizon})" in text
    assert "action_horizon    50   (assumed" in text and "action_dim        32\n" in text
    assert "robot        unknown" in text
    known = inspect(runs[name], preset=name)
    assert known.assumed == () and known.config.action_horizon == PRESETS[name].action_horizon


def test_merged_lora(runs, tmp_path):
    """openpi's frozen base is bfloat16; rounding to it would lose most of a small update."""
    said: list[str] = []
    for dtype in ("float32", "keep", "bfloat16"):
        convert(runs[LORA], tmp_path / dtype, to="pi0_torch", preset=LORA, lora="merge", dtype=dtype, log=said.append)
    for framework in FRAMEWORKS:
        assert error(load(framework, tmp_path / "float32"), LORA) <= 1e-6
    assert error(load("torch", tmp_path / "keep"), LORA) <= 1e-6
    assert any("14 merged kernels are float32: bfloat16" in line for line in said)
    exact, rounded = (open_checkpoint(tmp_path / name).ours for name in ("float32", "bfloat16"))
    for name, tensor in rounded.items():  # once
        np.testing.assert_array_equal(tensor.read(()), exact[name].read(()).astype(ml_dtypes.bfloat16))


def test_parameters_without_their_moving_average(runs, tmp_path):
    """Leaves of openpi's `train_state` end in `value`; without a moving average it has no parameters."""
    folder = tmp_path / "run" / "2"
    shutil.copytree(runs["pi0_aloha_sim"] / "2", folder)
    before = {name: tensor.read(()) for name, tensor in open_checkpoint(folder).ours.items()}
    stored = open_checkpoint(folder).in_layout("openpi_jax")
    state = {f"params/{name}/value": Tensor.of(2 * tensor.read(())) for name, tensor in stored.items()}
    write_orbax(folder / "train_state", state | {"opt_state/count": Tensor.of(np.array([2]))})
    trained = open_checkpoint(tmp_path / "run", ema=False)
    assert trained.assets.step == 2 and trained.assets.asset_id == "lerobot/aloha_sim_transfer_cube_human"
    for name, value in before.items():
        np.testing.assert_array_equal(trained.ours[name].read(()), 2 * value)
    shutil.rmtree(folder / "train_state")
    write_orbax(folder / "train_state", {"opt_state/count": Tensor.of(np.array([2]))})
    for name, tensor in open_checkpoint(tmp_path / "run", ema=False).ours.items():
        np.testing.assert_array_equal(tensor.read(()), before[name])
    shutil.rmtree(folder / "train_state")
    write_orbax(folder / "train_state", {"params/x/value": Tensor.of(np.zeros(2)), "step": Tensor.of(np.ones(1))})
    with pytest.raises(CheckpointError, match="train_state has parameters that params has not: x"):
        open_checkpoint(tmp_path / "run", ema=False)


def test_steps_of_a_run(runs, tmp_path):
    for step in ("2", "10"):
        shutil.copytree(runs[LORA] / "2", tmp_path / step)
    (tmp_path / "12").mkdir()  # no checkpoint
    assert inspect(tmp_path).step == 10 and inspect(tmp_path, step=2).step == 2
    with pytest.raises(CheckpointError, match=r"no checkpoint of step 12; it has \[2, 10\]"):
        inspect(tmp_path, step=12)


def test_aloha_without_wrist_cameras(runs):
    """openpi masks them. In a batch, too, where another row has them."""
    policy = load("torch", runs["pi0_aloha_sim"], preset="pi0_aloha_sim")
    whole, noise, _ = expected("pi0_aloha_sim")
    lone = {key: value for key, value in whole.items() if "wrist" not in key}
    inputs = policy.inputs([lone])
    masks = {key: bool(mask[0]) for key, mask in inputs.image_masks.items()}
    assert masks == {"base_0_rgb": True, "left_wrist_0_rgb": False, "right_wrist_0_rgb": False}
    actions = [policy.infer(frame, noise)["actions"] for frame in (whole, lone)]
    assert np.abs(actions[0] - actions[1]).max() > 1e-4
    both = policy.infer_batch([lone, whole], np.stack([noise, noise]))["actions"]
    np.testing.assert_allclose(both, actions[::-1], atol=1e-5)
    jax = load("jax", runs["pi0_aloha_sim"], preset="pi0_aloha_sim").infer(lone, noise)["actions"]
    np.testing.assert_allclose(jax, actions[1], rtol=1e-5, atol=1e-6)
    top = {key.replace("images/cam_high", "observation.images.top"): value for key, value in lone.items()}
    np.testing.assert_array_equal(policy.infer(top, noise)["actions"], actions[1])
    with pytest.raises(ObservationError, match="base_0_rgb"):
        policy.infer({key: value for key, value in whole.items() if "cam_high" not in key}, noise)


@pytest.mark.parametrize("form", [str, str.encode, np.asarray, lambda text: np.asarray(text.encode())])
def test_prompts_as_clients_send_them(form: Any, runs):
    policy = load("torch", runs["pi05_libero"], preset="pi05_libero")
    observation, _, _ = expected("pi05_libero")
    expect = policy.inputs([observation]).tokenized_prompt
    given = observation | {"prompt": form(str(observation["prompt"]))}
    np.testing.assert_array_equal(policy.inputs([given]).tokenized_prompt, expect)
