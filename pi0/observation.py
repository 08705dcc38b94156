"""The contract between robots and models: which keys, shapes, dtypes and ranges an observation has.

`Observation.from_dict` is the one door: what passes it fits the model, what does not is refused with an error that
names the key, what came and what was expected.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from pi0.config import ModelConfig


class ObservationError(ValueError):
    """An input that does not fit the model; the message names the key, what came and what was expected."""


@dataclasses.dataclass(frozen=True)
class Observation:
    """A batch of model inputs, as arrays of any one framework.

    `images[key]` [B, height, width, 3], uint8 or float32 in [−1, 1]; `image_masks[key]` [B] bool, False where the
    camera is missing; `state` [B, A] float32, normalized and padded; `tokenized_prompt` [B, L] int32 and
    `tokenized_prompt_mask` [B, L] bool.
    """

    images: dict[str, Any]
    image_masks: dict[str, Any]
    state: Any
    tokenized_prompt: Any
    tokenized_prompt_mask: Any

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], config: ModelConfig) -> Observation:
        """The observation in flat keys: `image/<key>`, `image_mask/<key>`, `state`, `tokenized_prompt(_mask)`.

        A camera's mask may be left out (all True), and its image if the mask is all False. Raises ObservationError.
        """
        known = {"state", "tokenized_prompt", "tokenized_prompt_mask"}
        known |= {f"{part}/{key}" for part in ("image", "image_mask") for key in config.image_keys}
        unknown = sorted(set(data) - known)
        if unknown:
            raise ObservationError(f"unknown keys {unknown}; this model takes {sorted(known)}")
        state = _array(data, "state", (None, config.action_dim), "float")
        batch = state.shape[0]
        prompt = _array(data, "tokenized_prompt", (batch, config.max_token_len), "int")
        if prompt.size and not (prompt.min() >= 0 and prompt.max() < config.vocab_size):
            raise ObservationError(
                f"tokenized_prompt: ids from {prompt.min()} to {prompt.max()}; expected 0 to {config.vocab_size - 1}. "
                f"Was it made by another tokenizer?"
            )
        images, masks = {}, {}
        for key in config.image_keys:
            images[key], masks[key] = _camera(data, key, batch, config)
        return cls(
            images=images,
            image_masks=masks,
            state=state,
            tokenized_prompt=prompt.astype(np.int32, copy=False),
            tokenized_prompt_mask=_array(data, "tokenized_prompt_mask", (batch, config.max_token_len), "bool"),
        )

    def to_dict(self) -> dict[str, Any]:
        """The flat keys that `from_dict` reads."""
        return {
            **{f"image/{k}": v for k, v in self.images.items()},
            **{f"image_mask/{k}": v for k, v in self.image_masks.items()},
            "state": self.state,
            "tokenized_prompt": self.tokenized_prompt,
            "tokenized_prompt_mask": self.tokenized_prompt_mask,
        }


def check_actions(actions: Any, config: ModelConfig, batch: int | None = None) -> np.ndarray:
    """Actions (or noise) as float32 [B, T, A]. Raises ObservationError for another shape, dtype or NaN."""
    shape = (batch, config.action_horizon, config.action_dim)
    return _array({"actions": actions}, "actions", shape, "float")


def _camera(data: Mapping[str, Any], key: str, batch: int, config: ModelConfig) -> tuple[np.ndarray, np.ndarray]:
    name, mask_name = f"image/{key}", f"image_mask/{key}"
    shape = (batch, *config.image_resolution, 3)
    mask = np.ones(batch, bool) if mask_name not in data else _array(data, mask_name, (batch,), "bool")
    if name not in data:
        if mask.any():
            raise ObservationError(
                f"{name}: missing; expected {list(shape)} uint8 or float. For a robot without this camera pass "
                f"{mask_name} as all False"
            )
        return np.zeros(shape, np.uint8), mask
    image = _array(data, name, shape, "uint8 or float")
    if image.dtype != np.uint8 and image.size and (image.min() < -1.001 or image.max() > 1.001):
        raise ObservationError(
            f"{name}: float values from {image.min():.4g} to {image.max():.4g}; expected [-1, 1]. "
            f"Pass 0..255 as uint8, or scale by x / 255 * 2 - 1"
        )
    return image, mask


_KINDS = {"float": "f", "int": "iu", "bool": "b", "uint8 or float": "f"}


def _array(data: Mapping[str, Any], name: str, shape: tuple[int | None, ...], kind: str) -> np.ndarray:
    wanted = f"{['B' if s is None else s for s in shape]} {kind}"
    if name not in data:
        raise ObservationError(f"{name}: missing; expected {wanted}; the keys that came are {sorted(data)}")
    try:
        array = np.asarray(data[name])
    except ValueError as error:  # nested lists of different lengths
        raise ObservationError(f"{name}: {error}; expected {wanted}") from error
    if array.dtype.name == "bfloat16":  # of ml_dtypes: NumPy does not count it as a float
        array = array.astype(np.float32)
    fits = array.ndim == len(shape) and all(s is None or s == a for s, a in zip(shape, array.shape, strict=True))
    if not fits:
        raise ObservationError(f"{name}: shape {list(array.shape)}; expected {wanted}")
    if kind == "uint8 or float" and array.dtype == np.uint8:
        return array
    if array.dtype.kind not in _KINDS[kind]:
        raise ObservationError(f"{name}: dtype {array.dtype}; expected {wanted}")
    if array.dtype.kind != "f":
        return array
    array = array.astype(np.float32, copy=False)
    if not np.isfinite(array).all():
        where = tuple(int(i) for i in np.argwhere(~np.isfinite(array))[0])
        raise ObservationError(f"{name}: {array[where]} at index {list(where)}; expected finite values")
    return array
