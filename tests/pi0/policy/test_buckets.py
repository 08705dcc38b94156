from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from pi0.policy.buckets import compact, placeholder, text_lengths
from pi0.variants import get_variant
from pi0_eval.parity.inputs import Inputs

CONFIG = get_variant("tiny")  # 8 text tokens


@pytest.mark.parametrize(("valid", "length"), [(0, 3), (1, 3), (3, 3), (4, 5), (5, 5), (6, 8), (8, 8)])
def test_text_is_cut_to_the_shortest_bucket_that_holds_it(valid: int, length: int):
    observation = Inputs.random(CONFIG).observation
    mask = np.zeros((2, 8), bool)
    mask[1, :valid] = True
    cut = compact(dataclasses.replace(observation, tokenized_prompt_mask=mask), CONFIG, (5, 3))
    assert cut.tokenized_prompt.shape == cut.tokenized_prompt_mask.shape == (2, length)
    np.testing.assert_array_equal(cut.tokenized_prompt, observation.tokenized_prompt[:, :length])
    assert cut.token_ar_mask is None


def test_a_valid_token_behind_a_hole_is_kept():
    mask = np.zeros((2, 8), bool)
    mask[0, [0, 4]] = True
    observation = dataclasses.replace(Inputs.random(CONFIG).observation, tokenized_prompt_mask=mask)
    assert compact(observation, CONFIG, (3, 5)).tokenized_prompt.shape == (2, 5)


def test_only_cameras_masked_in_every_row_are_left_out():
    observation = Inputs.random(CONFIG).observation
    first, second = CONFIG.image_keys
    masks = {first: np.zeros(2, bool), second: np.array([False, True])}
    left = compact(dataclasses.replace(observation, image_masks=masks), CONFIG)
    assert list(left.images) == list(left.image_masks) == [second]
    assert left.images[second] is observation.images[second]


def test_lengths():
    assert text_lengths(get_variant("pi0")) == (16, 32, 48)
    assert text_lengths(get_variant("pi05")) == (16, 32, 64, 128, 200)
    assert text_lengths(CONFIG, ()) == (8,)
    with pytest.raises(ValueError, match="positive whole numbers"):
        text_lengths(CONFIG, (0, 3))


def test_a_placeholder_is_compact():
    observation = placeholder(CONFIG, 2, 1, 5)
    again = compact(observation, dataclasses.replace(CONFIG, image_keys=CONFIG.image_keys[:1]), (5,))
    assert again.tokenized_prompt.shape == (2, 5)
    assert list(again.images) == [CONFIG.image_keys[0]]
