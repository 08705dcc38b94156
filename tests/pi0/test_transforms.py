from __future__ import annotations

import numpy as np
import pytest

from pi0.normalize import MODES, NormStats
from pi0.tokenizers import BUNDLED, FASTError, FASTPromptTokenizer, FASTTokenizer, TextTokenizer
from pi0.transforms import (
    CameraMasks,
    Normalize,
    PadDims,
    ResizeImages,
    TokenizeFASTPrompt,
    TokenizePrompt,
    Transforms,
    resize_with_pad,
)

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


def test_state_stays_out_of_a_pi0_prompt():
    tokenizer = Recorder()
    TokenizePrompt(tokenizer, 8, state_in_prompt=False)(sample())
    assert tokenizer.state is None


def test_missing_cameras_of_pi0_fast_are_black_pictures():
    steps = Transforms((CameraMasks(("base_0_rgb", "wrist_0_rgb"), black=True), ResizeImages(28, 42)))
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


@pytest.mark.parametrize(
    ("step", "named"),
    [
        (lambda: Normalize(STATS, "minmax"), "minmax"),
        (lambda: Normalize({"state": STATS["state"]}, "zscore"), "actions"),
        (lambda: PadDims(4, 5), "5"),
        (lambda: PadDims(3, 3)(sample()), "state"),
        (lambda: ResizeImages(28, 28)({"image/a": np.zeros((3, 20, 20))}), "image/a"),
        (lambda: TokenizePrompt(Recorder(), 8, state_in_prompt=False)({}), "prompt"),
        (lambda: TokenizeFASTPrompt(Recorder(), 8, 5, 4)({}), "prompt"),
        (lambda: CameraMasks(("left_wrist_0_rgb",))(sample()), "base_0_rgb"),
    ],
)
def test_refusals(step, named: str):
    with pytest.raises(ValueError, match=named):
        step()
