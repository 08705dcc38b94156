"""Composable steps from a robot's data to the model's inputs, and from the model's actions back.

Between the robot's adapter and the model a sample is one dict with flat keys: `image/<camera>` uint8 [H, W, 3],
`image_mask/<camera>` bool, `state` [S], `actions` [T, A] (training only), `prompt` str. The order is openpi's:

    Transforms((DeltaActions(...), Normalize(...), DefaultPrompt(...), CameraMasks(...), ResizeImages(...),
                TokenizePrompt(...), PadDims(...)))

so the state in a π0.5 prompt is normalized and has the robot's dimensions, not the model's. Training may then
`augment_images`.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
from PIL import Image

from pi0.robots.normalize import KEYS, Normalization, NormStats, modes_of
from pi0.tokenizers.prompts import FASTPromptTokenizer, RecipeTokenizer
from pi0.tokenizers.text import TextTokenizer

Data = dict[str, Any]

FAR = 10.0  # a normalized state beyond it is warned of: in training most are within 1 (quantiles) or 3 (z-score)

logger = logging.getLogger(__name__)


class Step(Protocol):
    """A step: returns a new dict and does not modify its input. Invertible steps have `inverse` of the same form."""

    def __call__(self, data: Data) -> Data: ...


@dataclasses.dataclass(frozen=True)
class Transforms:
    """Steps applied in order; `inverse` applies the inverses of those that have one, last first."""

    steps: Sequence[Step]

    def __call__(self, data: Data) -> Data:
        for step in self.steps:
            data = step(data)
        return data

    def inverse(self, data: Data) -> Data:
        """Model outputs back to robot units: `actions` [T, model dims] -> [T, robot dims]."""
        for step in reversed(self.steps):
            if hasattr(step, "inverse"):
                data = step.inverse(data)
        return data


@dataclasses.dataclass(frozen=True)
class DeltaActions:
    """Make `actions` [..., T, A] relative to `state` [..., S] where `mask` is true; `inverse` makes them absolute.

    Dimensions beyond the mask are unchanged. In float64, so that the inverse is exact to rounding. Raises
    ValueError for actions without a state, and a mask longer than either. Source: openpi `transforms.DeltaActions`,
    `AbsoluteActions`.
    """

    mask: tuple[bool, ...]

    def __call__(self, data: Data) -> Data:
        return self._shift(data, -1) if "actions" in data else data

    def inverse(self, data: Data) -> Data:
        """Needs the `state` that the actions are relative to."""
        return self._shift(data, 1)

    def _shift(self, data: Data, sign: int) -> Data:
        if "state" not in data:
            raise ValueError(f"actions relative to the state need 'state'; got the keys {sorted(data)}")
        actions, state, dims = np.array(data["actions"], np.float64), np.asarray(data["state"]), len(self.mask)
        if dims > min(actions.shape[-1], state.shape[-1]):
            raise ValueError(f"a mask of {dims} dims; actions have {actions.shape[-1]}, the state {state.shape[-1]}")
        actions[..., :dims] += sign * np.where(self.mask, state[..., None, :dims], 0)
        return data | {"actions": actions}


@dataclasses.dataclass(frozen=True)
class Normalize:
    """Normalize `state` and `actions` by `stats["state"]` and `stats["actions"]`, to float64.

    Float64, so that a state near the edge of a prompt's bin falls into openpi's bin; PadDims makes it float32. A live
    state, without actions, that is normalized to more than FAR is logged once for each dimension. Raises ValueError for
    an unknown mode, missing stats or NaN.
    """

    stats: Mapping[str, NormStats]
    mode: Normalization
    _warned: set[int] = dataclasses.field(default_factory=set, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        modes_of(self.mode)
        missing = [key for key in ("state", "actions") if key not in self.stats]
        if missing:
            raise ValueError(f"norm stats lack {missing}; they have {sorted(self.stats)}")

    def __call__(self, data: Data) -> Data:
        modes, eps = modes_of(self.mode)
        out = data | {k: self.stats[k].apply(data[k], modes[k], eps) for k in KEYS if k in data}
        if "state" in out and "actions" not in out:
            self._warn_of_far(np.asarray(data["state"]), out["state"])
        return out

    @property
    def modes(self) -> tuple[dict[str, str], float]:
        """The modes of "state" and "actions", and LeRobot's epsilon."""
        return modes_of(self.mode)

    def _warn_of_far(self, state: np.ndarray, normalized: np.ndarray) -> None:
        for dim in np.unique(np.argwhere(np.abs(normalized) > FAR)[:, -1]).tolist():
            if dim not in self._warned:
                self._warned.add(dim)
                logger.warning(
                    "state[%d] is %.6g, far outside of what the model was trained on (normalized %.4g, most are within "
                    "1 to 3): check its unit, its order and the norm stats (logged once for each dimension)",
                    *(dim, state[..., dim].flat[0], normalized[..., dim].flat[0]),
                )

    def inverse(self, data: Data) -> Data:
        """Un-normalize `actions`, and `state` where present."""
        modes, eps = modes_of(self.mode)
        exact = {"state": True, "actions": False}  # the state is the robot's, as it was given
        return data | {k: self.stats[k].invert(data[k], modes[k], eps, exact[k]) for k in KEYS if k in data}


@dataclasses.dataclass(frozen=True)
class DefaultPrompt:
    """Add this prompt to data without a `prompt`."""

    prompt: str

    def __call__(self, data: Data) -> Data:
        return {"prompt": self.prompt} | data


@dataclasses.dataclass(frozen=True)
class CameraMasks:
    """Mask the model's cameras `image_keys` that the robot does not have.

    With `dummy` (π0-FAST) they are zero images that are attended to instead: its decoder needs a prefix without masked
    tokens. Raises ValueError if the robot has a camera that the model does not have, or none at all.
    """

    image_keys: tuple[str, ...]
    dummy: bool = False

    def __call__(self, data: Data) -> Data:
        own = {key.removeprefix("image/") for key in data if key.startswith("image/")}
        unknown = sorted(own - set(self.image_keys))
        if unknown:
            raise ValueError(
                f"the model has no cameras {unknown}; it has {list(self.image_keys)}, to which the robot's option "
                "`cameras` maps its own"
            )
        if not own:
            raise ValueError(f"no 'image/<camera>' of {list(self.image_keys)}; got the keys {sorted(data)}")
        missing = [key for key in self.image_keys if key not in own]
        masks = {f"image_mask/{key}": np.bool_(self.dummy) for key in missing}
        if not (missing and self.dummy):
            return data | masks
        empty = np.zeros_like(data[f"image/{min(own)}"])
        return data | masks | {f"image/{key}": empty for key in missing}


@dataclasses.dataclass(frozen=True)
class ResizeImages:
    """Resize every `image/...` to uint8 [height, width, 3] with its aspect ratio kept, as `resize_with_pad` does."""

    height: int
    width: int

    def __call__(self, data: Data) -> Data:
        images = {key: image for key, image in data.items() if key.startswith("image/")}
        for key, image in images.items():
            if image.dtype != np.uint8 or image.ndim != 3 or image.shape[-1] != 3:
                raise ValueError(f"{key}: {image.dtype} {list(image.shape)}; expected uint8 [H, W, 3]")
        return data | {key: resize_with_pad(image, self.height, self.width) for key, image in images.items()}


@dataclasses.dataclass(frozen=True)
class TokenizePrompt:
    """Replace `prompt` by `tokenized_prompt` int32 [L] and `tokenized_prompt_mask` bool [L], L = max_token_len.

    With `state_in_prompt` (π0.5) the prompt has the state of this step: place it after Normalize and before PadDims,
    as openpi does. Raises ValueError without a prompt, and without actions for one with a state that is too long.
    """

    tokenizer: TextTokenizer
    max_token_len: int
    state_in_prompt: bool

    def __call__(self, data: Data) -> Data:
        if "prompt" not in data:
            raise ValueError(f"no 'prompt' to tokenize; got the keys {sorted(data)}")
        state = data["state"] if self.state_in_prompt else None

        def encode(max_len: int) -> Data:
            ids, mask = self.tokenizer.encode_prompt(data["prompt"], max_len, state=state)
            return {"tokenized_prompt": ids, "tokenized_prompt_mask": mask}

        rest = {key: value for key, value in data.items() if key != "prompt"}
        return rest | _encode(encode, self.max_token_len, whole=self.state_in_prompt and "actions" not in data)


@dataclasses.dataclass(frozen=True)
class TokenizeFASTPrompt:
    """TokenizePrompt of π0-FAST: the text has the state and, in training, `actions`, with masks of attention and loss.

    Adds `tokenized_prompt`, `tokenized_prompt_mask`, `token_ar_mask` and `token_loss_mask`, each [L]. `inverse` decodes
    generated `tokens` [N], where present, to `actions` [action_horizon, action_dim] in the robot's dimensions: place it
    after Normalize and before PadDims. Raises ValueError without a prompt, and without actions for one that is too
    long; FASTError for tokens that do not decode.
    """

    tokenizer: FASTPromptTokenizer
    max_token_len: int
    action_horizon: int
    action_dim: int

    def __call__(self, data: Data) -> Data:
        if "prompt" not in data:
            raise ValueError(f"no 'prompt' to tokenize; got the keys {sorted(data)}")

        def encode(max_len: int) -> Data:
            return self.tokenizer.encode_prompt(data["prompt"], max_len, data["state"], data.get("actions"))

        prompt = _encode(encode, self.max_token_len, whole="actions" not in data)
        return {key: value for key, value in data.items() if key != "prompt"} | prompt

    def inverse(self, data: Data) -> Data:
        """The `actions` [T, A] that the generated tokens stand for."""
        if "tokens" not in data:
            return data
        actions, _ = self.tokenizer.extract_actions(data["tokens"], self.action_horizon, self.action_dim)
        return {key: value for key, value in data.items() if key != "tokens"} | {"actions": actions}


@dataclasses.dataclass(frozen=True)
class TokenizeRecipe:
    """TokenizePrompt of π0.5's recipe: with the target text after the prompt, where there are `actions`.

    Then it adds `token_group` [L] and `has_actions`. With `subtasks`, a frame's `subtask`, if not empty, is a target,
    and a prompt without actions asks for a subtask. A `question` with its `answer` has an empty state and empty
    actions, for PadDims to fill. Raises ValueError without prompt or question, and for a prompt without actions that
    is too long.
    """

    tokenizer: RecipeTokenizer
    max_token_len: int
    action_horizon: int
    subtasks: bool

    def __call__(self, data: Data) -> Data:
        rest = {k: value for k, value in data.items() if k not in ("prompt", "subtask", "question", "answer")}
        if "question" in data:
            text = self.tokenizer.encode_question(data["question"], self.max_token_len, data["answer"])
            empty = {"state": np.zeros(0), "actions": np.zeros((self.action_horizon, 0))}
            return rest | empty | text | {"has_actions": np.bool_(False)}
        if "prompt" not in data:
            raise ValueError(f"no 'prompt' to tokenize; got the keys {sorted(data)}")
        if "actions" not in data:

            def encode(max_len: int) -> Data:
                return self.tokenizer.encode_prompt(
                    data["prompt"], max_len, data["state"], predict_subtask=self.subtasks
                )

            text = _encode(encode, self.max_token_len, whole=True)
            return rest | {key: value for key, value in text.items() if key != "token_group"}
        subtask = (data.get("subtask") or None) if self.subtasks else None
        text = self.tokenizer.encode_prompt(data["prompt"], self.max_token_len, data["state"], subtask, data["actions"])
        return rest | text | {"has_actions": np.bool_(True)}


@dataclasses.dataclass(frozen=True)
class PadDims:
    """Pad `state` [S] and `actions` [T, A] with zeros to float32 [state_dim] and [T, action_dim], the model's dims.

    With `cut_state` (π0-FAST, which reads the state as text) a longer state is cut. `inverse` cuts `actions`, where
    present, back to `robot_action_dim`. Raises ValueError for more dimensions than the model has.
    """

    action_dim: int
    robot_action_dim: int
    cut_state: bool = False
    state_dim: int | None = None  # default: action_dim

    def __post_init__(self) -> None:
        if not 0 < self.robot_action_dim <= self.action_dim:
            raise ValueError(f"robot_action_dim {self.robot_action_dim} is not within 1 to {self.action_dim}")

    def __call__(self, data: Data) -> Data:
        return data | {key: self._pad(key, data[key]) for key in ("state", "actions") if key in data}

    def inverse(self, data: Data) -> Data:
        """The robot's dimensions of `actions` [..., T, A] alone."""
        return data | {k: data[k][..., : self.robot_action_dim] for k in ("actions",) if k in data}

    def _pad(self, key: str, x: np.ndarray) -> np.ndarray:
        x = np.asarray(x, np.float32)
        size = (self.state_dim if key == "state" else None) or self.action_dim
        if self.cut_state and key == "state":
            x = x[..., :size]
        extra = size - x.shape[-1]
        if extra < 0:
            raise ValueError(f"{key}: {x.shape[-1]} dimensions; the model has {size}")
        padded = np.zeros((*x.shape[:-1], size), np.float32)
        padded[..., : x.shape[-1]] = x
        return padded


def _encode(encode: Callable[[int], Data], max_len: int, whole: bool) -> Data:
    """Arrays [max_len] of a prompt, cut to that; raises ValueError where it would be, if it must be whole."""
    if not whole:
        return encode(max_len)
    longer = encode(max_len + 1)
    if longer["tokenized_prompt_mask"][-1]:
        raise ValueError(
            f"the prompt with its state has more than the {max_len} tokens of max_token_len and would be cut: shorten "
            "the instruction, or train with a larger max_token_len"
        )
    return {key: array[:max_len] for key, array in longer.items()}


def resize_with_pad(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """Resize uint8 [H, W, 3] to [height, width, 3]: bilinear, aspect ratio kept, centered, padded with zeros.

    Bit-identical to openpi-client's `image_tools.resize_with_pad`, which rounds sizes down.
    """
    if image.shape[:2] == (height, width):
        return image
    ratio = max(image.shape[1] / width, image.shape[0] / height)
    size = (max(int(image.shape[1] / ratio), 1), max(int(image.shape[0] / ratio), 1))  # PIL's order: width, height
    # A copy: PIL's own memory is read-only, which torch warns about.
    resized = np.array(Image.fromarray(image).resize(size, Image.Resampling.BILINEAR))
    if resized.shape[:2] == (height, width):
        return resized
    left, top = (width - size[0]) // 2, (height - size[1]) // 2
    canvas = np.zeros((height, width, 3), np.uint8)
    canvas[top : top + size[1], left : left + size[0]] = resized
    return canvas


def augment_images(data: Data, rng: np.random.Generator) -> Data:
    """Randomly augment every `image/<camera>` uint8 [H, W, 3], as openpi does in training.

    All cameras: brightness, contrast and saturation scaled by up to 30, 40 and 50 percent. Before that, all but those
    with "wrist" in their name: a crop to 95 percent, resized back, and a rotation by up to 5 degrees about the center,
    filled with zeros. The same `rng` gives the same images; zero images stay zero. Raises ValueError for other
    images.
    Source: openpi `preprocessing_pytorch.py`; its JAX code (`augmax`) intends the same, but loses the saturation.
    """
    images = {key: data[key] for key in sorted(data) if key.startswith("image/")}
    for key, image in images.items():
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[-1] != 3:
            raise ValueError(f"{key}: {image.dtype} {list(image.shape)}; expected uint8 [H, W, 3]")
        images[key] = _jitter(image if "wrist" in key else _crop_and_rotate(image, rng), rng)
    return data | images


def _crop_and_rotate(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    height, width = image.shape[:2]
    crop_height, crop_width = int(height * 0.95), int(width * 0.95)
    top, left = rng.integers(height - crop_height + 1), rng.integers(width - crop_width + 1)
    cropped = Image.fromarray(image[top : top + crop_height, left : left + crop_width])
    # From an output pixel to its place in the crop: rotated about the center, then scaled, as one affine map.
    angle = np.deg2rad(rng.uniform(-5, 5))
    rotation = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    center, scale = np.array([width, height]) / 2, np.array([crop_width / width, crop_height / height])
    matrix = np.column_stack([rotation, center - rotation @ center]) * scale[:, None]
    size, affine = (width, height), Image.Transform.AFFINE
    return np.array(cropped.transform(size, affine, tuple(matrix.ravel()), Image.Resampling.BILINEAR))


def _jitter(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    brightness, contrast, saturation = 1 + rng.uniform(-1, 1, 3) * (0.3, 0.4, 0.5)
    # Brightness x·b, then contrast about the image's mean, then saturation about the mean of a pixel's channels:
    # together an affine function of a pixel's channels, applied in one pass.
    own, grey = brightness * contrast * saturation, brightness * contrast * (1 - saturation) / 3
    shift = brightness * (1 - contrast) * float(image.mean())
    rows = ((own + grey if i == j else grey for j in range(3)) for i in range(3))
    matrix = tuple(value for row in rows for value in (*row, shift))
    return np.array(Image.fromarray(image).convert("RGB", matrix))


def bool_mask(*runs: int) -> tuple[bool, ...]:
    """Runs of True (positive) and False (negative), as in openpi: bool_mask(2, -1) is (True, True, False)."""
    return tuple(run > 0 for run in runs for _ in range(abs(run)))
