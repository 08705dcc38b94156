from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

from pi0.config import ModelConfig
from pi0.observation import Observation, ObservationError, check_actions

CONFIG = ModelConfig.variant("tiny")


def data(batch: int = 2) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    result = {
        "state": rng.normal(size=(batch, CONFIG.action_dim)),
        "tokenized_prompt": rng.integers(0, CONFIG.vocab_size, (batch, CONFIG.max_token_len)),
        "tokenized_prompt_mask": np.ones((batch, CONFIG.max_token_len), bool),
    }
    for key in CONFIG.image_keys:
        result[f"image/{key}"] = rng.integers(0, 256, (batch, *CONFIG.image_resolution, 3), np.uint8)
        result[f"image_mask/{key}"] = np.ones(batch, bool)
    return result


def test_there_and_back():
    given = data()
    observation = Observation.from_dict(given, CONFIG)
    assert observation.state.dtype == np.float32 and observation.tokenized_prompt.dtype == np.int32
    for key, value in observation.to_dict().items():
        np.testing.assert_array_equal(value, given[key].astype(value.dtype))


@pytest.mark.parametrize("dtype", [np.float64, np.float16, ml_dtypes.bfloat16])
def test_float_images(dtype):
    given = data() | {"image/base_0_rgb": np.full((2, *CONFIG.image_resolution, 3), -0.5, dtype)}
    image = Observation.from_dict(given, CONFIG).images["base_0_rgb"]
    assert image.dtype == np.float32 and (image == -0.5).all()


def test_missing_cameras():
    given = data()
    del given["image_mask/base_0_rgb"]  # all there, unless said otherwise
    assert Observation.from_dict(given, CONFIG).image_masks["base_0_rgb"].all()
    del given["image/left_wrist_0_rgb"]
    given["image_mask/left_wrist_0_rgb"] = np.zeros(2, bool)
    observation = Observation.from_dict(given, CONFIG)
    assert not observation.images["left_wrist_0_rgb"].any()
    given["image_mask/left_wrist_0_rgb"] = np.array([True, False])
    with pytest.raises(ObservationError, match="image/left_wrist_0_rgb: missing"):
        Observation.from_dict(given, CONFIG)


def _nan(array: np.ndarray) -> np.ndarray:
    array = np.array(array, np.float32)
    array[1, 2] = np.nan
    return array


@pytest.mark.parametrize(
    ("key", "change", "said"),
    [
        ("state", lambda x: x[:, :5], r"state: shape \[2, 5\]; expected \['B', 7\] float"),
        ("state", lambda x: x[0], r"state: shape \[7\]"),
        ("state", lambda x: x.astype(int), "state: dtype int64; expected"),
        ("state", _nan, r"state: nan at index \[1, 2\]"),
        ("state", lambda x: np.where(x == x, np.inf, x), "state: inf"),
        ("state", lambda x: [[0.0] * 7, [0.0] * 6], r"state: .*inhomogeneous.*expected \['B', 7\] float"),
        ("state", lambda x: np.concatenate([x, x]), r"tokenized_prompt: shape \[2, 8\]; expected \[4, 8\] int"),
        ("tokenized_prompt", lambda x: x[:, :-1], r"tokenized_prompt: shape \[2, 7\]; expected \[2, 8\] int"),
        ("tokenized_prompt", lambda x: x * 1.0, "tokenized_prompt: dtype float64"),
        ("tokenized_prompt", lambda x: x + CONFIG.vocab_size, "tokenized_prompt: ids.*511"),
        ("tokenized_prompt", lambda x: np.full_like(x, CONFIG.vocab_size), "tokenized_prompt: ids from 512 to 512"),
        ("tokenized_prompt", lambda x: np.full_like(x, -1), "tokenized_prompt: ids from -1 to -1"),
        ("tokenized_prompt", lambda x: x + 2**32, "tokenized_prompt: ids"),  # cut to 32 bits they would do
        ("tokenized_prompt_mask", lambda x: x.astype(int), "tokenized_prompt_mask: dtype int64; expected.*bool"),
        ("image/base_0_rgb", lambda x: x[:1], r"image/base_0_rgb: shape \[1, 28, 42, 3\]; expected \[2, 28, 42, 3\]"),
        ("image/base_0_rgb", lambda x: x.transpose(0, 3, 1, 2), r"image/base_0_rgb: shape \[2, 3, 28, 42\]"),
        ("image/base_0_rgb", lambda x: x.astype(np.int32), "image/base_0_rgb: dtype int32; expected.*uint8 or float"),
        ("image/base_0_rgb", lambda x: np.full(x.shape, 1.01), r"image/base_0_rgb: float values from 1.01 to 1.01"),
        ("image/base_0_rgb", lambda x: np.full(x.shape, -1.01), r"image/base_0_rgb: float values from -1.01 to -1.01"),
        ("image/base_0_rgb", lambda x: x.astype(float), "image/base_0_rgb: float values.*uint8"),
        ("image/base_0_rgb", lambda x: np.full(x.shape, np.nan), "image/base_0_rgb: nan"),
        ("image_mask/base_0_rgb", lambda x: x[:, None], r"image_mask/base_0_rgb: shape \[2, 1\]; expected \[2\] bool"),
        ("image_mask/base_0_rgb", lambda x: x * 1.0, "image_mask/base_0_rgb: dtype float64"),
    ],
)
def test_refusals_name_the_key_what_came_and_what_was_expected(key: str, change, said: str):
    given = data()
    with pytest.raises(ObservationError, match=said):
        Observation.from_dict(given | {key: change(given[key])}, CONFIG)


@pytest.mark.parametrize("key", ["state", "tokenized_prompt", "tokenized_prompt_mask", "image/base_0_rgb"])
def test_missing_keys(key: str):
    given = data()
    del given[key]
    with pytest.raises(ObservationError, match=f"{key}: missing; expected"):
        Observation.from_dict(given, CONFIG)


@pytest.mark.parametrize("key", ["image/front", "image_mask/front", "prompt", "image"])
def test_unknown_keys(key: str):
    with pytest.raises(ObservationError, match=rf"unknown keys \['{key}'\].*base_0_rgb"):
        Observation.from_dict(data() | {key: np.zeros(2)}, CONFIG)


def test_actions():
    actions = np.zeros((2, CONFIG.action_horizon, CONFIG.action_dim))
    assert check_actions(actions, CONFIG).dtype == np.float32
    with pytest.raises(ObservationError, match=r"actions: shape \[2, 5, 7\]; expected \[3, 5, 7\]"):
        check_actions(actions, CONFIG, batch=3)
    with pytest.raises(ObservationError, match="actions: nan"):
        check_actions(actions * np.nan, CONFIG)
