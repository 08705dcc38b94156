from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from pi0.assets import Assets
from pi0.observation import Observation
from pi0.robots.aloha import gripper_to_angle
from pi0.robots.normalize import MODES, NormStats
from pi0.robots.pipeline import Pipeline
from pi0.robots.registry import ROBOTS, make_robot
from pi0.tokenizers.text import BUNDLED, TextTokenizer
from pi0.variants import get_variant

GENERIC = {
    "name": "generic",
    "cameras": {"front": "base_0_rgb"},
    "state": [[0, 3], [4, 6]],
    "actions": [[1, 6]],
    "degrees": [4],
    "delta_dims": [4, -1],
    "delta": True,
}
ALOHA = {"cam_high": "base_0_rgb", "cam_left_wrist": "left_wrist_0_rgb", "cam_right_wrist": "right_wrist_0_rgb"}
DROID = {"exterior_image_1_left": "base_0_rgb", "wrist_image_left": "left_wrist_0_rgb"}
DROID_FAST = {"exterior_image_1_left": "base_0_rgb", "wrist_image_left": "wrist_0_rgb"}
LIBERO = {"image": "base_0_rgb", "wrist_image": "left_wrist_0_rgb"}
METAWORLD = {"corner": "base_0_rgb", "wrist": "left_wrist_0_rgb"}
ROBOFACTORY = {"head_camera": "base_0_rgb", "global_camera": "left_wrist_0_rgb", "wrist_camera": "right_wrist_0_rgb"}
SIM = {"name": "aloha", "cameras": {"top": "base_0_rgb"}, "delta": False, "adapt_to_pi": False}


class Case(NamedTuple):
    """What a checkpoint says, the sizes of recorded states, recorded actions and commands, cameras, delta mask."""

    reference: Any
    dims: tuple[int, int, int]
    cameras: dict[str, str]
    mask: str = ""


CASES = {
    "aloha": Case("aloha", (14, 14, 14), ALOHA, "11111101111110"),
    "aloha_sim": Case(SIM, (14, 14, 14), {"top": "base_0_rgb"}),
    "droid": Case("droid", (8, 8, 8), DROID),
    "droid_positions": Case({"name": "droid", "delta": True}, (8, 8, 8), DROID, "11111110"),
    "droid_fast": Case({"name": "droid", "cameras": DROID_FAST}, (8, 8, 8), DROID_FAST),
    "libero": Case("libero", (8, 7, 7), LIBERO),
    "libero_pi0": Case({"name": "libero", "delta": True}, (8, 7, 7), LIBERO, "1111110"),
    "robofactory": Case("robofactory", (8, 8, 8), ROBOFACTORY),
    "metaworld": Case("metaworld", (4, 4, 4), METAWORLD),
    "generic": Case(GENERIC, (7, 8, 5), {"front": "base_0_rgb"}, "11110"),
}


def frame(name: str, seed: int = 0) -> dict[str, Any]:
    """A recorded frame as LeRobot's columns, with another brightness for each camera."""
    (state, action, _), cameras = CASES[name].dims, CASES[name].cameras
    rng = np.random.default_rng(seed)
    images = {f"observation.images.{c}": np.full((6, 8, 3), 10 * i, np.uint8) for i, c in enumerate(cameras)}
    return images | {
        "observation.state": rng.uniform(0, 1, state).astype(np.float32),
        "action": rng.uniform(0, 1, (5, action)).astype(np.float32),
        "task": "fold the towel",
    }


def test_every_robot_has_a_case():
    assert {type(make_robot(case.reference)) for case in CASES.values()} == set(ROBOTS.values())


@pytest.mark.parametrize("name", CASES)
def test_keys_masks_and_dims(name: str):
    reference, (_, _, dims), cameras, mask = CASES[name]
    robot = make_robot(reference)
    data = robot.to_model(frame(name))
    pictures = {f"{part}/{name}" for part in ("image", "image_mask") for name in cameras.values()}
    assert set(data) == pictures | {"state", "actions", "prompt"}
    for i, camera in enumerate(cameras.values()):
        assert data[f"image/{camera}"][0, 0, 0] == 10 * i and data[f"image_mask/{camera}"]
    assert data["prompt"] == "fold the towel" and data["actions"].shape == (5, dims) and robot.action_dim == dims
    assert robot.delta_mask == (tuple(bit == "1" for bit in mask) or None)


@pytest.mark.parametrize("name", CASES)
@hypothesis.given(seed=st.integers(0, 2**32 - 1), scale=st.floats(0.01, 100))
@hypothesis.settings(max_examples=20, deadline=None)
def test_actions_come_back(name: str, seed: int, scale: float):
    """Through float64 and back to float32: to its last place, or the one beside it where angles are converted."""
    robot, item = make_robot(CASES[name].reference), frame(name)
    item["action"] = (scale * np.random.default_rng(seed).normal(size=item["action"].shape)).astype(np.float32)
    back = robot.from_model(robot.to_model(item))["action"]
    expected = item["action"][:, 1:6] if name == "generic" else item["action"]
    assert back.dtype == np.float32
    np.testing.assert_allclose(back, expected, rtol=1.2e-7, atol=1e-6)
    wider = np.pad(robot.to_model(item)["actions"], [(0, 0), (0, 3)])
    np.testing.assert_array_equal(robot.from_model({"actions": wider})["action"], back)  # the model's spare dims


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", CASES)
def test_the_whole_pipeline_there_and_back(name: str, mode: str, tmp_path):
    """Adapter, delta and normalization with what a checkpoint says, and the state that the model saw."""
    robot = make_robot(CASES[name].reference)
    frames = [robot.numbers(frame(name, seed)) for seed in range(40)]
    stats = {
        "state": NormStats.from_data(np.stack([f["state"] for f in frames])),
        "actions": NormStats.from_data(np.concatenate([f["actions"] for f in frames])),
    }
    model = dataclasses.replace(
        get_variant("tiny"),
        image_keys=("base_0_rgb", "left_wrist_0_rgb", "right_wrist_0_rgb", "wrist_0_rgb"),
        action_dim=16,
    )
    tokenizer = TextTokenizer(BUNDLED).reference()
    Assets(model, stats, "lab", mode, tokenizer, CASES[name].reference).save(tmp_path / "assets")
    pipeline = Pipeline.from_assets(Assets.load(tmp_path))
    item = frame(name, seed=99)
    row = pipeline(item)
    actions = row.pop("actions")
    observation = Observation.from_dict({k: np.asarray(v)[None] for k, v in row.items()}, model)
    absent = set(model.image_keys) - set(CASES[name].cameras.values())
    assert {key for key, mask in observation.image_masks.items() if not mask.all()} == absent
    expected = item["action"][:, 1:6] if name == "generic" else item["action"]
    # The model's float32 has a last place of 2.4e-7 at 2 to 4, where these normalized values lie; times ranges of
    # about 1 rad (57 in degrees).
    atol = 5e-5 if name == "generic" else 1e-6
    np.testing.assert_allclose(pipeline.actions(actions, row["state"]), expected, atol=atol)
    if robot.delta_mask:
        with pytest.raises(ValueError, match="state"):
            pipeline.actions(actions)


def test_aloha_numbers():
    """Signs, the gripper's geometry at its ends, and commands, computed by hand from openpi's constants."""
    robot = make_robot("aloha")
    data = robot.numbers({"state": np.ones(14), "action": np.ones((1, 14))})
    np.testing.assert_array_equal(data["state"][[0, 1, 2, 3, 8, 9]], [1, -1, -1, 1, -1, -1])
    # open: horn and arm in line, 90 degrees; (pi/2 - 0.5476) / (1.6296 - 0.5476)
    np.testing.assert_allclose(data["state"][[6, 13]], 0.9456527, atol=2e-5)
    np.testing.assert_allclose(gripper_to_angle(np.zeros(1)), (np.arcsin(-0.581698) - 0.5476) / 1.082, atol=1e-5)
    np.testing.assert_allclose(data["actions"][0, [6, 13]], 1.4910 - 0.5476)
    closed = robot.numbers({"state": np.zeros(14), "action": np.zeros((1, 14))})
    np.testing.assert_allclose(closed["actions"][0, [6, 13]], -0.6213 - 0.5476)
    plain = make_robot({"name": "aloha", "adapt_to_pi": False})
    np.testing.assert_array_equal(plain.numbers({"state": np.ones(14)})["state"], 1)


def test_generic_chooses_and_converts():
    item = frame("generic") | {"observation.state": np.arange(7.0), "action": np.arange(8.0)[None]}
    data = make_robot(GENERIC).to_model(item)
    np.testing.assert_allclose(data["state"], [*np.deg2rad([0, 1, 2, 4]), 5])
    np.testing.assert_allclose(data["actions"], [[*np.deg2rad([1, 2, 3, 4]), 5]])


LIVE = {
    "aloha": {"images": {c: np.zeros((3, 6, 8), np.uint8) for c in ALOHA}, "state": np.zeros(14)},
    "droid": {
        "observation/exterior_image_1_left": np.zeros((6, 8, 3), np.uint8),
        "observation/wrist_image_left": np.zeros((6, 8, 3), np.uint8),
        "observation/joint_position": np.zeros(7),
        "observation/gripper_position": 0.5,
    },
    "libero": {
        "observation/image": np.zeros((3, 6, 8), np.float32),
        "observation/wrist_image": np.zeros((6, 8, 3), np.uint8),
        "observation/state": np.zeros(8),
    },
}


@pytest.mark.parametrize("name", LIVE)
def test_frames_of_openpi_s_clients(name: str):
    data = make_robot(name).to_model(LIVE[name] | {"prompt": "go"})
    assert data["image/base_0_rgb"].shape == (6, 8, 3) and data["image/base_0_rgb"].dtype == np.uint8
    assert data["state"].shape == (make_robot(name).state_dim,) and data["prompt"] == "go" and "actions" not in data


@hypothesis.given(hnp.arrays(np.uint8, (5, 4, 3)))
def test_lerobot_s_float_pictures_are_exact(image: np.ndarray):
    item = frame("metaworld") | {"observation.images.wrist": image.transpose(2, 0, 1).astype(np.float32) / 255}
    np.testing.assert_array_equal(make_robot("metaworld").to_model(item)["image/left_wrist_0_rgb"], image)


def without(name: str, key: str) -> dict[str, Any]:
    return {k: v for k, v in frame(name).items() if k != key}


@pytest.mark.parametrize(
    ("reference", "item", "named"),
    [
        ("toaster", {}, "toaster"),
        ({"delta": True}, {}, "None"),
        ({"name": "libero", "wings": 2}, {}, "wings"),
        ({"name": "generic", "cameras": {"front": "base_0_rgb"}}, {}, r"actions.*state"),
        (GENERIC | {"state": [[3, 3]]}, {}, "state"),
        (GENERIC | {"delta_dims": [6]}, {}, "delta_dims"),
        (GENERIC, frame("generic") | {"observation.state": np.zeros(5)}, r"state is \[5\]; expected \[6\]"),
        ({"name": "metaworld", "delta": True}, {}, "delta"),
        ({"name": "libero", "delta": "yes"}, {}, "delta"),
        ({"name": "libero", "cameras": {}}, {}, "cameras"),
        ("aloha", without("aloha", "observation.images.cam_high"), "cam_high"),
        ("aloha", without("aloha", "observation.state"), "state"),
        ("aloha", frame("aloha") | {"observation.state": np.zeros(13)}, r"\[13\]; expected \[14\]"),
        ("aloha", frame("aloha") | {"action": np.zeros(14)}, r"\[14\]; expected \[T, 14\]"),
        (
            "droid",
            without("droid", "observation.state"),
            r"joint_position \+ .*gripper_position or .*state",
        ),
        ("libero", frame("libero") | {"observation.images.image": np.full((6, 8, 3), 2.0)}, "2.0"),
        ("libero", frame("libero") | {"observation.images.image": np.zeros((6, 8), np.uint8)}, r"\[6, 8\]"),
        (
            {"name": "aloha", "cameras": {"top": "base_0_rgb", "cam_high": "base_0_rgb"}},
            frame("aloha") | frame("aloha_sim"),
            "top.*cam_high",
        ),
    ],
)
def test_refusals(reference: Any, item: dict[str, Any], named: str):
    with pytest.raises(ValueError, match=named):
        make_robot(reference).to_model(item)


def test_too_few_actions_are_refused():
    with pytest.raises(ValueError, match=r"\[2, 6\]"):
        make_robot("libero").from_model({"actions": np.zeros((2, 6))})


BFLOAT16 = np.float32([[[0.5, 0.25, 1.0]] * 4] * 6)  # numbers that bfloat16 has exactly


@pytest.mark.parametrize("framework", ["torch", "ml_dtypes"])
def test_tensors_with_gradients_and_bfloat16(framework: str):
    """Accepted as what they are: the same numbers as in NumPy."""
    module = pytest.importorskip(framework)
    item = frame("metaworld") | {"observation.images.wrist": BFLOAT16, "observation.state": np.float32([1, 2, 0.5, 4])}
    expected = make_robot("metaworld").to_model(item)

    def convert(x: np.ndarray) -> Any:
        if framework == "ml_dtypes":
            return x.astype(module.bfloat16)
        return module.tensor(x, dtype=module.bfloat16, requires_grad=True)

    given = {k: convert(v) if k in ("observation.images.wrist", "observation.state") else v for k, v in item.items()}
    found = make_robot("metaworld").to_model(given)
    for key in expected:
        np.testing.assert_array_equal(found[key], expected[key])
    listed = item | {"observation.state": [convert(x[None])[0] for x in item["observation.state"]]}
    if framework == "torch":
        with pytest.raises(ValueError, match=r"observation\.state is not an array of numbers"):
            make_robot("metaworld").to_model(listed)


def test_a_prompt_beside_a_recorded_task():
    robot, item = make_robot("metaworld"), frame("metaworld")
    assert robot.to_model(item | {"prompt": "fold the towel"})["prompt"] == "fold the towel"  # the same as `task`
    assert robot.to_model({k: v for k, v in item.items() if k != "task"} | {"prompt": "wave"})["prompt"] == "wave"
    assert robot.to_model(item | {"prompt": None})["prompt"] == "fold the towel"
    with pytest.raises(ValueError, match="prompt and task are two different values of one thing"):
        robot.to_model(item | {"prompt": "wave"})


IMAGE, OTHER = np.zeros((6, 8, 3), np.uint8), np.ones((6, 8, 3), np.uint8)


@pytest.mark.parametrize(
    ("reference", "more", "named"),
    [
        ("metaworld", {"corner": OTHER}, r"observation\.images\.corner and corner"),
        ("metaworld", {"images": {"corner": OTHER}}, "observation.images.corner and images/corner"),
        ("metaworld", {"state": np.zeros(4)}, r"observation\.state and state"),
        ("metaworld", {"images": {"a": 1}, "images/a": 2}, r"\['images/a'\] are in the frame twice"),
        (
            "droid",
            {"joint_position": np.zeros(7), "gripper_position": 0.0},
            r"\['joint_position', 'gripper_position'\] and \['observation\.state'\] are two different states",
        ),
    ],
)
def test_two_values_of_one_thing(reference: str, more: dict[str, Any], named: str):
    with pytest.raises(ValueError, match=named):
        make_robot(reference).to_model(frame(reference) | more)


def test_the_same_value_twice_is_fine():
    item = frame("metaworld")
    twice = {"corner": item["observation.images.corner"].copy(), "state": item["observation.state"].tolist()}
    found, expected = (make_robot("metaworld").to_model(i) for i in (item | twice, item))
    np.testing.assert_array_equal(found["image/base_0_rgb"], expected["image/base_0_rgb"])
    item = frame("droid")
    parts = {"joint_position": item["observation.state"][:7], "gripper_position": item["observation.state"][7]}
    make_robot("droid").to_model(item | parts)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"task": "open \ud800"}, "task is no valid Unicode"),
        ({"task": b"\xff"}, r"task is b.\\xff.; expected text"),  # no UTF-8
        ({"prompt": "open \udfff"}, "prompt is no valid Unicode"),
        (
            {"observation.state": ["1", "2", "3", "4"]},
            "state is not an array of numbers: its dtype is <U1",
        ),
        ({"observation.state": np.zeros(4, complex)}, "its dtype is complex128"),
        ({"observation.state": [0, 0, 0, 1e39]}, r"observation\.state is 1e\+39 at \[3\]; expected finite numbers"),
        ({"observation.state": np.zeros((2, 4))}, r"observation\.state is \[2, 4\]; expected one vector"),
        ({"action": np.zeros((5, 2, 2))}, r"action is \[5, 2, 2\]; expected \[T, 4\]"),
        ({"action": np.zeros((2, 2))}, r"action is \[2, 2\]; expected \[T, 4\]"),
        ({"observation.images.wrist": object()}, r"observation\.images\.wrist"),
    ],
)
def test_foreign_values(change: dict[str, Any], named: str):
    with pytest.raises(ValueError, match=named):
        make_robot("metaworld").to_model(frame("metaworld") | change)
