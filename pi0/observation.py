"""The contract between robots and models: which keys, shapes, dtypes and ranges an observation has.

`Observation.from_dict` validates all inputs: what does not fit the model is refused with an error that names the key,
what was given and what was expected.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from pi0.config import ModelConfig
from pi0.masks import FAST, PREFIX, SUBTASK

_CAMERA = ("image", "image_mask")  # the first part of a camera's flat keys


class ObservationError(ValueError):
    """An input that does not fit the model; the message names the key, what was given and what was expected."""


@dataclasses.dataclass(frozen=True)
class Observation:
    """A batch of model inputs, as arrays of any one framework.

    `images[key]` [B, height, width, 3], uint8 or float32 in [−1, 1]; `image_masks[key]` [B] bool, False where the
    camera is missing; `state` [B, S] float32, normalized and padded; `tokenized_prompt` [B, L] int32 and
    `tokenized_prompt_mask` [B, L] bool. π0-FAST trains on two more: `token_ar_mask` [B, L] int32, 1 where a token
    is attended to only from itself on (0: together with the token before it), and `token_loss_mask` [B, L] bool, True
    where a token is to be predicted. π0.5's recipe trains on two others: `token_group` [B, L] int32, the group of
    `pi0.masks` that each token belongs to (prompt, subtask or FAST), and `has_actions` [B] bool, False where an example
    has no actions.
    """

    images: dict[str, Any]
    image_masks: dict[str, Any]
    state: Any
    tokenized_prompt: Any
    tokenized_prompt_mask: Any
    token_ar_mask: Any = None
    token_loss_mask: Any = None
    token_group: Any = None
    has_actions: Any = None

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], config: ModelConfig) -> Observation:
        """The observation of flat keys: `image/<key>`, `image_mask/<key>`, `state`, `tokenized_prompt(_mask)`.

        A camera's mask may be left out (all True), and its image if the mask is all False. What a family
        trains on beside that (`training_inputs`) is all there, or all left out. Raises ObservationError.
        """
        known = {"state", "tokenized_prompt", "tokenized_prompt_mask", *config.family.training_inputs}
        known |= {f"{part}/{key}" for part in ("image", "image_mask") for key in config.image_keys}
        unknown = sorted(set(data) - known)
        if unknown:
            raise ObservationError(f"unknown keys {unknown}; this model takes {sorted(known)}")
        state = _array(data, "state", (None, config.state_size), "float")
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
        prompt_mask = _array(data, "tokenized_prompt_mask", (batch, config.max_token_len), "bool")
        if not config.family.masked_cameras:
            _refuse_holes(masks, prompt_mask)
        inputs = config.family.training_inputs
        training = {name: _TRAINING[name](data, name, prompt.shape) for name in inputs if set(inputs) & set(data)}
        return cls(
            images=images,
            image_masks=masks,
            state=state,
            tokenized_prompt=prompt.astype(np.int32, copy=False),
            tokenized_prompt_mask=prompt_mask,
            **training,
        )

    def to_dict(self) -> dict[str, Any]:
        """The flat keys that `from_dict` reads."""
        return {
            **{f"image/{k}": v for k, v in self.images.items()},
            **{f"image_mask/{k}": v for k, v in self.image_masks.items()},
            "state": self.state,
            "tokenized_prompt": self.tokenized_prompt,
            "tokenized_prompt_mask": self.tokenized_prompt_mask,
            **{name: getattr(self, name) for name in _TRAINING if getattr(self, name) is not None},
        }

    @classmethod
    def join(cls, observations: Sequence[Observation]) -> Observation:
        """Batches of NumPy arrays as one batch, in this order."""
        parts = [observation.to_dict() for observation in observations]
        data = {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}
        images, masks = ({key: data.pop(f"{part}/{key}") for key in observations[0].images} for part in _CAMERA)
        return cls(images, masks, **data)

    def prompt_only(self) -> Observation:
        """The prompt of a training example, without the tokens that are to be predicted."""
        training = [name for name in _TRAINING if getattr(self, name) is not None]
        mask = self.tokenized_prompt_mask
        if self.token_loss_mask is not None:
            mask = mask & ~self.token_loss_mask
        if self.token_group is not None:
            mask = mask & (self.token_group == PREFIX)
        without: dict[str, Any] = dict.fromkeys(training)
        return dataclasses.replace(self, tokenized_prompt_mask=mask, **without) if training else self


def check_actions(actions: Any, config: ModelConfig, batch: int | None = None, name: str = "actions") -> np.ndarray:
    """Actions (or noise, by `name`) as float32 [B, T, A]. Raises ObservationError for another shape, dtype or NaN."""
    shape = (batch, config.action_horizon, config.action_dim)
    return _array({name: actions}, name, shape, "float")


def to_numpy(value: Any) -> np.ndarray:
    """An array of any framework and any shape, or numbers, as a NumPy array of the same shape and dtype.

    bfloat16, which NumPy does not have, becomes float32. Tensors of PyTorch are detached, and copied from their device.
    Raises ValueError for what is no array.
    """
    try:
        if hasattr(value, "detach"):
            value = value.detach().cpu()
            value = value.float() if str(value.dtype) == "torch.bfloat16" else value
        array = np.asarray(value)
    except (TypeError, RuntimeError) as error:
        raise ValueError(f"not an array: {error}") from error
    return array.astype(np.float32) if array.dtype.name == "bfloat16" else array


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


def _refuse_holes(image_masks: Mapping[str, np.ndarray], prompt_mask: np.ndarray) -> None:
    """Raise ObservationError unless the valid tokens are contiguous, as π0-FAST's released decoder assumes."""
    for key, mask in image_masks.items():
        if not mask.all():
            raise ObservationError(
                f"image_mask/{key}: False in row {int(np.argmin(mask))}; pi0_fast has no masked cameras. For a robot "
                f"without this camera pass zero images, as the released models were trained, and leave the mask out"
            )
    holes = np.argwhere(prompt_mask[:, 1:] & ~prompt_mask[:, :-1])
    if len(holes):
        row, token = holes[0]
        raise ObservationError(
            f"tokenized_prompt_mask: False at index {[int(row), int(token)]} and True after it; expected padding only "
            f"at the end"
        )


def _flags(data: Mapping[str, Any], name: str, shape: tuple[int, ...]) -> np.ndarray:
    """An array of 0 and 1."""
    array = _array(data, name, shape, "int")
    if not np.isin(array, (0, 1)).all():
        raise ObservationError(f"{name}: values from {array.min()} to {array.max()}; expected 0 and 1")
    return array


def _groups(data: Mapping[str, Any], name: str, shape: tuple[int, ...]) -> np.ndarray:
    """The group of each text token, in ascending order."""
    array = _array(data, name, shape, "int")
    valid = _array(data, "tokenized_prompt_mask", shape, "bool")
    ordered = np.maximum.accumulate(np.where(valid, array, PREFIX), axis=1)
    if not np.isin(array, (PREFIX, SUBTASK, FAST)).all() or (valid & (array < ordered)).any():
        raise ObservationError(f"{name}: expected {PREFIX} (prompt), {SUBTASK} (subtask) and {FAST} (FAST), in order")
    return array.astype(np.int32)


# The fields that models train on beside their inputs, and the check of each.
_TRAINING: dict[str, Callable[..., np.ndarray]] = {
    "token_group": _groups,
    "has_actions": lambda data, name, shape: _array(data, name, shape[:1], "bool"),
    "token_ar_mask": lambda data, name, shape: _flags(data, name, shape).astype(np.int32),
    "token_loss_mask": lambda data, name, shape: _array(data, name, shape, "bool"),
}

_KINDS = {"float": "f", "int": "iu", "bool": "b", "uint8 or float": "f"}


def _array(data: Mapping[str, Any], name: str, shape: tuple[int | None, ...], kind: str) -> np.ndarray:
    wanted = f"{['B' if s is None else s for s in shape]} {kind}"
    if name not in data:
        raise ObservationError(f"{name}: missing; expected {wanted}; the keys given are {sorted(data)}")
    try:
        array = to_numpy(data[name])
    except ValueError as error:  # nested lists of different lengths
        raise ObservationError(f"{name}: {error}; expected {wanted}") from error
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
