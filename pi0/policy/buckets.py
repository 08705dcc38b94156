"""Leave masked cameras and padding out of an observation.

Masked tokens influence nothing, so the actions stay the same. What is left has one of a few shapes, so that a compiled
model is seldom compiled anew: `text_lengths` × the number of cameras × the batch size.
"""

from __future__ import annotations

import bisect
import dataclasses
from collections.abc import Sequence

import numpy as np

from pi0.config import ModelConfig
from pi0.observation import Observation

TEXT_BUCKETS = (16, 32, 64, 128, 256)  # lengths in tokens that a prompt is cut to, where the config's is not shorter


def text_lengths(config: ModelConfig, buckets: Sequence[int] = TEXT_BUCKETS) -> tuple[int, ...]:
    """The lengths a prompt of this model can be cut to, ascending; the last is the config's own.

    Raises ValueError for buckets that are not positive whole numbers.
    """
    if any(type(length) is not int or length < 1 for length in buckets):
        raise ValueError(f"text buckets are {tuple(buckets)}; they must be positive whole numbers")
    return (*sorted({length for length in buckets if length < config.max_token_len}), config.max_token_len)


def compact(observation: Observation, config: ModelConfig, buckets: Sequence[int] = TEXT_BUCKETS) -> Observation:
    """The observation without cameras that are masked in every row, its text cut to the shortest bucket that holds it.

    Arrays of any framework. On an accelerator this waits for the masks: an observation in NumPy is faster.
    """
    keys = [key for key in config.image_keys if bool(observation.image_masks[key].any())]
    used = observation.tokenized_prompt_mask.any(0).tolist()
    needed = max((i + 1 for i, valid in enumerate(used) if valid), default=0)
    lengths = text_lengths(config, buckets)
    cut = slice(lengths[bisect.bisect_left(lengths, needed)])
    text = {
        field: None if getattr(observation, field) is None else getattr(observation, field)[:, cut]
        for field in ("tokenized_prompt", "tokenized_prompt_mask", "token_ar_mask", "token_loss_mask")
    }
    return dataclasses.replace(
        observation,
        images={key: observation.images[key] for key in keys},
        image_masks={key: observation.image_masks[key] for key in keys},
        **text,
    )


def placeholder(config: ModelConfig, batch: int, cameras: int, length: int) -> Observation:
    """A dummy observation of this shape (zero images, padding tokens), to warm up with."""
    keys = config.image_keys[:cameras]
    return Observation(
        images={key: np.zeros((batch, *config.image_resolution, 3), np.uint8) for key in keys},
        image_masks={key: np.ones(batch, bool) for key in keys},
        state=np.zeros((batch, config.state_size), np.float32),
        tokenized_prompt=np.zeros((batch, length), np.int32),
        tokenized_prompt_mask=np.ones((batch, length), bool),
    )
