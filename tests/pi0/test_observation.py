from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

from pi0.observation import Observation, ObservationError, check_actions
from pi0.variants import get_variant

CONFIG = get_variant("tiny")


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


# ---- π0-FAST

FAST = get_variant("tiny_pi0_fast")


def fast_data() -> dict[str, np.ndarray]:
    """A training example of 9 tokens, the last 4 to be predicted, and one of 14, the last 3."""
    data = {"state": np.zeros((2, FAST.action_dim)), "tokenized_prompt": np.ones((2, FAST.max_token_len), int)}
    place, end, start = np.arange(FAST.max_token_len), np.array([[9], [14]]), np.array([[5], [11]])
    data["tokenized_prompt_mask"] = place < end
    data["token_loss_mask"] = (start <= place) & (place < end)
    data["token_ar_mask"] = data["token_loss_mask"].astype(int)
    return data | {f"image/{key}": np.zeros((2, *FAST.image_resolution, 3), np.uint8) for key in FAST.image_keys}


def test_masks_of_training():
    given = fast_data()
    observation = Observation.from_dict(given, FAST)
    assert observation.token_ar_mask.dtype == np.int32 and observation.token_loss_mask.dtype == bool
    again = Observation.from_dict(observation.to_dict(), FAST)
    for name in ("token_ar_mask", "token_loss_mask"):
        np.testing.assert_array_equal(getattr(again, name), given[name])
    asked = observation.prompt_only()
    np.testing.assert_array_equal(asked.tokenized_prompt_mask.sum(axis=1), [5, 11])
    del given["token_ar_mask"], given["token_loss_mask"]
    plain = Observation.from_dict(given, FAST)
    assert (
        plain.token_ar_mask is None
        and plain.prompt_only() is plain
        and asked.to_dict().keys() == plain.to_dict().keys()
    )


@pytest.mark.parametrize(
    ("key", "change", "said"),
    [
        ("token_ar_mask", lambda x: x[:, 1:], r"token_ar_mask: shape \[2, 13\]; expected \[2, 14\] int"),
        ("token_ar_mask", lambda x: 2 * x, "token_ar_mask: values from 0 to 2; expected 0 and 1"),
        ("token_ar_mask", lambda x: x - 1, "token_ar_mask: values from -1 to 0"),
        ("token_loss_mask", lambda x: x.astype(float), "token_loss_mask: dtype float64; expected.*bool"),
        ("tokenized_prompt_mask", lambda x: np.roll(x, 1, axis=1), r"tokenized_prompt_mask: False at index \[0, 0\]"),
        ("tokenized_prompt_mask", lambda x: x & (np.arange(14) != 3), r"False at index \[0, 3\] and True after it"),
    ],
)
def test_refusals_of_masks(key: str, change, said: str):
    given = fast_data()
    with pytest.raises(ObservationError, match=said):
        Observation.from_dict(given | {key: change(given[key])}, FAST)


def test_one_mask_of_training_asks_for_the_other():
    for one, other in (("token_ar_mask", "token_loss_mask"), ("token_loss_mask", "token_ar_mask")):
        with pytest.raises(ObservationError, match=f"{other}: missing"):
            Observation.from_dict({k: v for k, v in fast_data().items() if k != other}, FAST)
        with pytest.raises(ObservationError, match=f"unknown keys .*{one}"):
            Observation.from_dict(data() | {one: fast_data()[one]}, CONFIG)


def test_a_masked_camera_is_refused():
    given = fast_data() | {"image_mask/wrist_0_rgb": np.array([True, False])}
    with pytest.raises(ObservationError, match=r"image_mask/wrist_0_rgb: False in row 1; .*zero images"):
        Observation.from_dict(given, FAST)
