from __future__ import annotations

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from pi0.robots.normalize import MODES, NormStats
from pi0.robots.transforms import (
    CameraMasks,
    DefaultPrompt,
    DeltaActions,
    Normalize,
    PadDims,
    ResizeImages,
    TokenizeFASTPrompt,
    TokenizePrompt,
    Transforms,
    augment_images,
    bool_mask,
    resize_with_pad,
)
from pi0.tokenizers.fast import FASTError, FASTTokenizer
from pi0.tokenizers.prompts import FASTPromptTokenizer
from pi0.tokenizers.text import BUNDLED, TextTokenizer

RNG = np.random.default_rng(0)
STATS = {
    "state": NormStats.from_data(RNG.normal(size=(50, 4))),
    "actions": NormStats.from_data(RNG.normal(size=(50, 4))),
}
FAST = FASTTokenizer.fit(list(np.random.default_rng(1).normal(size=(50, 5, 4))), vocab_size=300)


class Recorder:
    """A tokenizer that notes what it was given."""

    def encode_prompt(self, text, max_len, state=None):
        self.text, self.state = text, state
        return np.arange(max_len, dtype=np.int32), np.ones(max_len, bool)


def sample() -> dict:
    return {
        "image/base_0_rgb": RNG.integers(0, 256, (20, 30, 3), np.uint8),
        "state": RNG.normal(size=4),
        "actions": RNG.normal(size=(5, 4)),
        "prompt": "open the drawer",
    }


@pytest.mark.parametrize("mode", MODES)
def test_there_and_back(mode: str):
    tokenizer, data = Recorder(), sample()
    before = {k: np.copy(v) for k, v in data.items()}
    steps = Transforms(
        (
            Normalize(STATS, mode),
            CameraMasks(("base_0_rgb", "left_wrist_0_rgb")),
            ResizeImages(28, 28),
            TokenizePrompt(tokenizer, 8, state_in_prompt=True),
            PadDims(7, 4),
        )
    )
    out = steps(data)
    assert out["image/base_0_rgb"].shape == (28, 28, 3)
    assert out["state"].shape == (7,) and out["state"].dtype == np.float32 and not out["state"][4:].any()
    assert out["actions"].shape == (5, 7) and not out["image_mask/left_wrist_0_rgb"]
    assert "prompt" not in out and tokenizer.text == "open the drawer"
    # The state in the prompt is normalized and not padded.
    np.testing.assert_array_equal(tokenizer.state, STATS["state"].apply(before["state"], mode))
    # Actions went through float32, so half a unit of its last place, scaled by the largest std.
    np.testing.assert_allclose(steps.inverse({"actions": out["actions"]})["actions"], before["actions"], atol=1e-6)
    for key, value in before.items():
        np.testing.assert_array_equal(data[key], value)  # the input was left alone


def test_resize_keeps_proportions_and_pads_with_black():
    white = np.full((30, 60, 3), 255, np.uint8)
    out = resize_with_pad(white, 40, 40)
    assert out.shape == (40, 40, 3)
    np.testing.assert_array_equal(out[10:30], 255)
    assert not out[:10].any() and not out[30:].any()
    assert resize_with_pad(white, 30, 60) is white


def test_resize_numbers():
    """Four pixels to two: PIL's bilinear filter is a triangle of twice the width, [3, 3, 1] / 7 at the border."""
    image = np.zeros((4, 4, 3), np.uint8)
    image[:, 0] = 210
    np.testing.assert_array_equal(resize_with_pad(image, 2, 2)[:, :, 0], [[90, 0], [90, 0]])


@pytest.mark.parametrize("size", [(2, 3000), (3000, 2), (1, 1)])
def test_very_narrow_images_keep_a_pixel(size: tuple[int, int]):
    out = resize_with_pad(np.full((*size, 3), 200, np.uint8), 28, 42)
    assert out.shape == (28, 42, 3) and (out == 200).any() and set(np.unique(out)) <= {0, 200}


def test_bool_mask():
    assert bool_mask(2, -1, 1) == (True, True, False, True) and bool_mask() == ()


def test_delta_numbers():
    data = {"state": np.array([1.0, 2.0, 3.0, 4.0]), "actions": np.full((2, 3), 10.0)}
    out = DeltaActions(bool_mask(1, -1))(data)
    np.testing.assert_array_equal(out["actions"], [[9, 10, 10], [9, 10, 10]])
    np.testing.assert_array_equal(data["actions"], 10)  # the input was left alone
    assert DeltaActions((True,))({"state": data["state"]}).keys() == {"state"}  # nothing to do when sampling


@hypothesis.given(
    state=hnp.arrays(np.float32, (2, 5), elements=st.floats(-100, 100, width=32)),
    actions=hnp.arrays(np.float32, (2, 3, 4), elements=st.floats(-100, 100, width=32)),
    mask=st.lists(st.booleans(), max_size=4),
)
def test_delta_and_normalization_there_and_back(state: np.ndarray, actions: np.ndarray, mask: list[bool]):
    """Many frames at once; float64 throughout, whose last place at 100 is 1e-14, so far inside 1e-6."""
    steps = Transforms((DeltaActions(tuple(mask)), Normalize(STATS, "quantile")))
    out = steps({"state": state, "actions": actions})
    np.testing.assert_allclose(steps.inverse(out)["actions"], actions, atol=1e-6)
    np.testing.assert_allclose(steps.inverse(out)["state"], state, atol=1e-6)


def test_default_prompt():
    assert DefaultPrompt("uncap the pen")({})["prompt"] == "uncap the pen"
    assert DefaultPrompt("uncap the pen")({"prompt": "wave"})["prompt"] == "wave"


def test_pi0_fast_sees_black_where_a_camera_is_missing():
    out = CameraMasks(("base_0_rgb", "wrist_0_rgb"), dummy=True)(sample())
    assert out["image_mask/wrist_0_rgb"] and not out["image/wrist_0_rgb"].any()
    assert out["image/wrist_0_rgb"].shape == out["image/base_0_rgb"].shape


def picture(height: int = 60, width: int = 80) -> np.ndarray:
    """A smooth picture, its red rising to the right and its green downwards, in the middle of the range."""
    image = np.full((height, width, 3), 120, np.uint8)
    image[..., 0] = np.linspace(90, 150, width)
    image[..., 1] = np.linspace(90, 150, height)[:, None]
    return image


def test_augmentation_depends_on_the_seed_alone():
    data = {"image/base_0_rgb": picture(), "image/left_wrist_0_rgb": picture(), "state": np.ones(3)}
    once, again, other = (augment_images(data, np.random.default_rng(seed)) for seed in (1, 1, 2))
    for key, image in data.items():
        np.testing.assert_array_equal(once[key], again[key])
        np.testing.assert_array_equal(image, data[key])
        assert once[key].dtype == image.dtype and once[key].shape == image.shape
        assert (once[key] != other[key]).any() == key.startswith("image/")
    np.testing.assert_array_equal(data["image/base_0_rgb"], picture())  # the input was left alone


def test_wrist_cameras_keep_their_geometry():
    """Colours change in each pixel alone there: pixels of one colour stay so, elsewhere the picture moves."""
    stripes = np.repeat(np.arange(8, dtype=np.uint8) * 20 + 40, 10)[None, :, None].repeat(60, 0).repeat(3, 2)
    for seed in range(20):
        out = augment_images(
            {"image/right_wrist_0_rgb": stripes, "image/base_0_rgb": stripes}, np.random.default_rng(seed)
        )
        wrist, base = out["image/right_wrist_0_rgb"], out["image/base_0_rgb"]
        assert all(len(np.unique(wrist[:, i : i + 10])) == 1 for i in range(0, 80, 10))
        assert any(len(np.unique(base[:, i : i + 10])) > 1 for i in range(0, 80, 10))


def test_augmentation_stays_within_its_ranges():
    """Of grey pictures only brightness changes, by up to 30 %; a turn by 5 degrees leaves most of the middle."""
    grey = np.full((60, 80, 3), 100, np.uint8)
    values = [
        augment_images({"image/base_0_rgb": grey}, np.random.default_rng(seed))["image/base_0_rgb"]
        for seed in range(200)
    ]
    centres = np.array([v[30, 40, 0] for v in values], float)
    assert 70 - 3 <= centres.min() < 78 and 122 < centres.max() <= 130 + 7  # contrast acts on the black corners' mean
    for v in values:
        assert len(np.unique(v[10:50, 10:70])) == 1  # a corner is moved by at most 50 * sin(5 degrees) < 5 pixels
    black = np.zeros((20, 20, 3), np.uint8)
    assert not augment_images({"image/base_0_rgb": black}, np.random.default_rng(0))["image/base_0_rgb"].any()


def test_state_stays_out_of_a_pi0_prompt():
    tokenizer = Recorder()
    TokenizePrompt(tokenizer, 8, state_in_prompt=False)(sample())
    assert tokenizer.state is None


def test_relative_actions_come_back_from_fast_tokens():
    tokenizer = FASTPromptTokenizer(TextTokenizer(BUNDLED), FAST, 512 + 128 + FAST.vocab_size)
    delta, data = DeltaActions((True, True, True, False)), sample()
    steps = Transforms((delta, Normalize(STATS, "zscore"), TokenizeFASTPrompt(tokenizer, 120, 5, 4), PadDims(7, 4)))
    row = steps(data)
    answer = row["tokenized_prompt"][row["token_loss_mask"]]
    back = steps.inverse({"tokens": answer, "state": row["state"]})["actions"]
    # Off by 0.05 at most in each of the 5 coefficients, in units of std; the state went through float32.
    assert (np.abs(back - data["actions"]) <= 0.05 * np.sqrt(5) * STATS["actions"].std + 1e-5).all()


def test_missing_cameras_of_pi0_fast_are_black_pictures():
    steps = Transforms((CameraMasks(("base_0_rgb", "wrist_0_rgb"), dummy=True), ResizeImages(28, 42)))
    row = steps(sample())
    assert row["image/wrist_0_rgb"].shape == (28, 42, 3) and not row["image/wrist_0_rgb"].any()
    assert row["image_mask/wrist_0_rgb"] and row["image/base_0_rgb"].any() and "image_mask/base_0_rgb" not in row


def test_fast_text_holds_the_robots_actions_and_gives_them_back():
    """The actions of the text are normalized, and in the robot's own dims however wide the model is."""
    tokenizer = FASTPromptTokenizer(TextTokenizer(BUNDLED), FAST, 512 + 128 + FAST.vocab_size)
    steps = Transforms((Normalize(STATS, "quantile"), TokenizeFASTPrompt(tokenizer, 120, 5, 4), PadDims(7, 4)))
    data = sample()
    row = steps(data)
    assert "prompt" not in row and row["actions"].shape == (5, 7) and row["state"].shape == (7,)
    answer = row["tokenized_prompt"][row["token_loss_mask"]]
    normalized = Normalize(STATS, "quantile")(data)["actions"]
    np.testing.assert_array_equal(tokenizer.extract_actions(answer, 5, 4)[0], FAST.decode(FAST.encode(normalized))[0])
    back = steps.inverse({"tokens": answer})
    assert set(back) == {"actions"}
    # Off by 0.05 at most in each of the 5 coefficients, in units of half the quantiles' range.
    limit = 0.05 * np.sqrt(5) * (STATS["actions"].q99 - STATS["actions"].q01) / 2
    assert (np.abs(back["actions"] - data["actions"]) <= limit * (1 + 1e-5)).all()
    np.testing.assert_allclose(steps.inverse(row)["actions"], data["actions"], atol=1e-6)  # no tokens: the row's own
    with pytest.raises(FASTError, match="no 'Action: '"):
        steps.inverse({"tokens": answer[1:]})


def test_a_state_that_was_read_as_text_may_be_wider_than_the_actions():
    """LIBERO's: 8 and 7 dims, in a π0-FAST of openpi."""
    wide = {"state": np.arange(8.0), "actions": np.ones((5, 7))}
    np.testing.assert_array_equal(PadDims(7, 7, cut_state=True)(wide)["state"], np.arange(7))


@pytest.mark.parametrize(
    ("step", "named"),
    [
        (lambda: Normalize(STATS, "minmax"), "minmax"),
        (lambda: Normalize({"state": STATS["state"]}, "zscore"), "actions"),
        (lambda: PadDims(4, 5), "5"),
        (lambda: PadDims(3, 3)(sample()), "state"),
        (lambda: PadDims(3, 3, cut_state=True)(sample()), "actions"),
        (lambda: ResizeImages(28, 28)({"image/a": np.zeros((3, 20, 20))}), "image/a"),
        (lambda: TokenizePrompt(Recorder(), 8, state_in_prompt=False)({}), "prompt"),
        (lambda: TokenizeFASTPrompt(Recorder(), 8, 5, 4)({}), "prompt"),
        (lambda: CameraMasks(("left_wrist_0_rgb",))(sample()), "base_0_rgb"),
        (lambda: CameraMasks(("left_wrist_0_rgb",))({}), "left_wrist_0_rgb"),
        (lambda: DeltaActions((True,))({"actions": np.zeros((2, 3))}), "state"),
        (lambda: DeltaActions((True,) * 5)(sample()), "mask of 5"),
        (lambda: augment_images({"image/a": np.zeros((3, 20, 20))}, np.random.default_rng(0)), "image/a"),
    ],
)
def test_refusals(step, named: str):
    with pytest.raises(ValueError, match=named):
        step()
