"""A robot of another package: with images of its own, and state and actions in several columns."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pi0.assets import Assets, AssetsError
from pi0.datasets.base import Dataset
from pi0.datasets.cache import build_cache
from pi0.datasets.lerobot import LeRobotDataset
from pi0.datasets.registry import open_dataset
from pi0.datasets.statistics import dataset_statistics
from pi0.policy.policy import fill_assets
from pi0.robots.pipeline import Pipeline
from pi0.robots.registry import make_robot
from pi0.robots.robot import Robot
from pi0.robots.transforms import resize_with_pad
from pi0.tokenizers.text import BUNDLED, TextTokenizer
from pi0.variants import get_variant
from tests.my_lab.robots import TwoCameras
from tests.recording import TASKS, write_recording

NAME = "tests.my_lab.robots:TwoCameras"
SPLIT = {"observation.state": {"arm": 3, "gripper": 1}, "action": {"action.arm": 3, "action.gripper": 1}}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_recording(tmp_path_factory.mktemp("own") / "dataset", TwoCameras(), split=SPLIT)


def pipeline_of(dataset: Dataset, robot: Robot, reference: Any) -> Pipeline:
    stats = {key: running.norm_stats() for key, running in dataset_statistics(dataset, robot).items()}
    tokenizer = TextTokenizer(BUNDLED).reference()
    cameras = tuple(dict.fromkeys(robot.cameras.values()))
    model = get_variant("tiny", image_keys=cameras, image_resolution=(28, 42), action_dim=16)
    return Pipeline.from_assets(Assets(model, stats, "own", "zscore", tokenizer, reference))


@pytest.mark.parametrize("cache", [None, "memory"])
@pytest.mark.parametrize("name", [NAME, "aloha"])
def test_recorded_and_live_frames_are_the_same_to_the_bit(name: str, cache: str | None, root: Path, tmp_path: Path):
    """Through the dataset as training opens it, against the frame as the robot sends it."""
    robot = make_robot(name)
    folder = root if name == NAME else write_recording(tmp_path / "dataset", robot)
    dataset = open_dataset(folder, robot, action_horizon=5, image_size=(28, 42), cache=cache)
    pipeline, raw = pipeline_of(dataset, robot, name), LeRobotDataset(folder, states=(), actions=())
    for i in (0, 7, len(dataset) - 1, 7):
        recorded, frame = pipeline(dataset[i]), raw[i]
        live: dict[str, Any] = {f"observation/{c}": frame[f"observation.images.{c}"] for c in robot.cameras}
        columns = {key: dataset.table(key)[i] for key in robot.state_keys(dataset.features)}
        live |= {"observation/" + key.removeprefix("observation."): value for key, value in columns.items()}
        row = pipeline(live | {"prompt": frame["task"]})
        assert recorded.keys() - row.keys() == {"actions"}
        for key, value in row.items():
            np.testing.assert_array_equal(value, recorded[key], err_msg=key)
            assert np.asarray(value).dtype == np.asarray(recorded[key]).dtype


def test_what_the_model_gets(root: Path):
    robot = make_robot(NAME)
    dataset = open_dataset(root, robot, action_horizon=5, image_size=(28, 42))
    item, raw = dataset[3], LeRobotDataset(root, states=(), actions=())[3]
    row = pipeline_of(dataset, robot, NAME)(item)
    left, right, wrist = (raw[f"observation.images.{name}"] for name in ("left", "right", "wrist"))
    stacked = np.concatenate([left[2:-3, 5:31], right[2:-3, 5:31]])
    np.testing.assert_array_equal(row["image/base_0_rgb"], resize_with_pad(stacked, 28, 42))
    np.testing.assert_array_equal(row["image/left_wrist_0_rgb"], resize_with_pad(wrist[::-1, ::-1], 28, 42))
    numbers = robot.numbers(item)
    np.testing.assert_array_equal(numbers["state"], np.concatenate([item["arm"], item["gripper"]]))
    actions = np.concatenate([item["action.arm"], item["action.gripper"]], axis=1)
    np.testing.assert_array_equal(numbers["actions"], actions)
    assert actions.shape == (5, 4) and item["task"] == TASKS[0]
    without = pipeline_of(dataset, robot, NAME)(item, actions=False)
    assert "actions" not in without and without.keys() == row.keys() - {"actions"}


def test_a_cache_of_resized_images_is_refused(root: Path, tmp_path: Path):
    build_cache(LeRobotDataset(root, states=(), actions=(), image_size=(28, 42)), tmp_path)
    with pytest.raises(ValueError, match=r"TwoCameras adapts images at their recorded size.*'memory'"):
        open_dataset(root, TwoCameras(), image_size=(28, 42), cache=tmp_path)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"observation.images.right": None}, "takes all of .*left.*right"),
        ({"action.arm": np.zeros((5, 2))}, r"action\.arm \+ action\.gripper is \[5, 3\]; expected \[T, 4\]"),
    ],
)
def test_frames_that_are_refused(change: dict[str, Any], problem: str, root: Path):
    item = open_dataset(root, TwoCameras(), action_horizon=5)[0] | change
    with pytest.raises(ValueError, match=problem):
        TwoCameras().to_model({key: value for key, value in item.items() if value is not None})


def test_all_cameras_must_come_back(root: Path):
    class Forgetful(TwoCameras):
        def adapt_images(self, images: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
            return {"base_0_rgb": images["left"]}

    with pytest.raises(ValueError, match=r"Forgetful\.adapt_images returned \['base_0_rgb'\]"):
        Forgetful().to_model(open_dataset(root, TwoCameras())[0])


def test_a_checkpoint_imports_no_module(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "own_package.py").write_text("from tests.my_lab.robots import TwoCameras\nother = print\n")
    monkeypatch.syspath_prepend(tmp_path)
    dataset = open_dataset(root, TwoCameras())
    with pytest.raises(AssetsError, match="code of the package 'own_package': import it first"):
        pipeline_of(dataset, TwoCameras(), "own_package:TwoCameras")
    assert "own_package" not in sys.modules
    fill_assets(Assets(get_variant("tiny"), {}, "own", "zscore", {}), robot="own_package:TwoCameras")  # the caller's
    assert isinstance(make_robot("own_package:TwoCameras", imports=False), TwoCameras)
    pipeline_of(dataset, TwoCameras(), {"name": "own_package:TwoCameras", "default_prompt": "go"})
    monkeypatch.setitem(vars(sys.modules["own_package"]), "__getattr__", lambda _: pytest.fail("code was run"))
    with pytest.raises(AssetsError, match="cannot be imported"):
        pipeline_of(dataset, TwoCameras(), "own_package:Another")
    del sys.modules["own_package"]


@pytest.mark.parametrize("name", ["subprocess:Popen", "tests.my_lab.robots:dataclasses", "pi0.robots.robot:PREFIXES"])
def test_what_is_no_robot_is_not_called(name: str):
    with pytest.raises(ValueError, match="must be a subclass of"):
        make_robot(name)
