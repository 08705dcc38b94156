"""`Robot`, the adapter between a robot's recorded or live frames and a model."""

from __future__ import annotations

import contextlib
import dataclasses
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, ClassVar

import numpy as np

from pi0.observation import to_numpy
from pi0.robots.transforms import bool_mask

# The possible prefixes of a name in a frame: LeRobot's columns, openpi's clients, or none.
PREFIXES = ("observation.images.", "observation.", "observation/", "images/", "")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Robot:
    """Converts a robot's recorded or live frames to the model's flat keys, and the model's actions back.

    A subclass defines `state_dim` S, `action_dim` A, `delta_dims` as `bool_mask` takes them, and the names of which its
    state and its recorded actions are made: `state_names` (with any of PREFIXES) and `action_names` (columns in full),
    both a list of alternatives, each a list of names to concatenate. Where the model's units differ from the robot's it
    overrides `adapt_state`, `adapt_actions` and `restore_actions`, and to change images `adapt_images`.

    The fields are the options that a checkpoint may set: `cameras`, from the robot's names to the model's, all of
    which a frame must have (of several names for one model camera, exactly one) but for `optional_cameras`, which are
    masked where a frame lacks them; `delta`, whether the model's actions are relative to the state in `delta_dims`;
    `default_prompt`, for frames without an instruction.
    """

    cameras: Mapping[str, str]
    delta: bool = False
    default_prompt: str | None = None
    optional_cameras: Sequence[str] = ()

    state_dim = 0
    action_dim = 0
    state_names: ClassVar[Sequence[Sequence[str]]] = (("state",),)
    action_names: ClassVar[Sequence[Sequence[str]]] = (("action",), ("actions",))
    delta_dims: ClassVar[Sequence[int]] = ()

    def __post_init__(self) -> None:
        if not isinstance(self.cameras, Mapping) or not self.cameras:
            raise ValueError(f"{self._name}: cameras is {self.cameras!r}; it maps names of cameras to the model's")
        unknown = sorted(set(self.optional_cameras) - self.cameras.keys())
        if unknown or isinstance(self.optional_cameras, str):
            raise ValueError(f"{self._name}: optional_cameras is {self.optional_cameras!r}; it lists some of `cameras`")
        if self.optional_cameras and self.adapts_images:
            raise ValueError(f"{self._name}: optional_cameras is for robots without `adapt_images`")
        if not isinstance(self.delta, bool) or (self.delta and not self.delta_dims):
            raise ValueError(f"{self._name}: delta is {self.delta!r}; {'true or' if self.delta_dims else 'only'} false")

    @property
    def delta_mask(self) -> tuple[bool, ...] | None:
        """The mask of the model's action dimensions that are relative to the state; None for none."""
        return bool_mask(*self.delta_dims) if self.delta else None

    @property
    def adapts_images(self) -> bool:
        """Whether the class overrides `adapt_images`, and so needs images at their recorded size."""
        return type(self).adapt_images is not Robot.adapt_images

    def to_model(self, item: Mapping[str, Any]) -> dict[str, Any]:
        """One recorded or live frame in the model's flat keys (see `transforms.py`); `actions` only where it has them.

        Images are uint8 [H, W, 3], or float in [0, 1] and channels first, as LeRobot's loader returns them. The
        instruction is `prompt` or `task`. Raises ValueError for a missing camera or state, for wrong shapes, dtypes or
        ranges, and for two different values of one thing.
        """
        item = _flatten(item)
        item |= {key: _text(item[key]) for key in ("prompt", "task") if key in item}
        self._refuse_two(item)
        keys = self.state_keys(item)
        if (state := self._vectors(item, keys)).ndim != 1:
            raise ValueError(f"{self._name}: {' + '.join(keys)} is {list(state.shape)}; expected one vector")
        data = self.numbers(item) | self._images(item)
        prompts = [item[key] for key in ("prompt", "task") if item.get(key) is not None]
        return data | ({"prompt": prompts[0]} if prompts else {})

    def numbers(self, item: Mapping[str, Any]) -> dict[str, np.ndarray]:
        """The state [..., S] and, if any, actions [..., T, A] of frames in the model's units, float64.

        Any leading axes: statistics pass many frames at once, without images. Raises ValueError.
        """
        state = self._vectors(item, self.state_keys(item))
        self._check("state", state, state.shape[:-1], self.state_dim)
        data = {"state": self.adapt_state(state)}
        if keys := self.action_keys(item):
            actions = self._vectors(item, keys)
            self._check(" + ".join(keys), actions, (*state.shape[:-1], "T"), self.action_dim)
            data["actions"] = self.adapt_actions(actions)
        return data

    def chunk(self, item: Mapping[str, Any], actions: Any) -> dict[str, np.ndarray]:
        """The state [S] of a frame and the robot's `actions` [T, A] in the model's units. Raises ValueError."""
        item = _flatten(item)
        values = self._vector({"actions": actions}, "actions")
        self._check("actions", values, ("T",), self.action_dim)
        state = self.numbers({key: item[key] for key in self.state_keys(item)})
        return state | {"actions": self.adapt_actions(values)}

    def columns(self, item: Mapping[str, Any]) -> dict[str, np.ndarray]:
        """A live frame's state, float32 [D], and images, uint8 [H, W, 3], by the columns of a LeRobot dataset.

        Its adapter reads them as it does the frame. Raises ValueError for what is missing or wrong.
        """
        item = _flatten(item)
        found = {f"observation.{_bare(key)}": self._vector(item, key) for key in self.state_keys(item)}
        images = {key: to_uint8(item[key], key) for key in self.camera_keys(item)}
        columns = {name: np.atleast_1d(x).astype(np.float32) for name, x in found.items()}
        return columns | {f"observation.images.{_bare(key)}": image for key, image in images.items()}

    def prompt(self, item: Mapping[str, Any]) -> str:
        """The instruction of a frame, or the default; empty for none."""
        prompts = [_text(item[key]) for key in ("prompt", "task") if item.get(key) is not None]
        return prompts[0] if prompts else self.default_prompt or ""

    def from_model(self, data: Mapping[str, Any]) -> dict[str, np.ndarray]:
        """Un-normalized absolute `actions` [T, A or more] of the model as the robot's `action` float32 [T, A].

        Raises ValueError for another shape.
        """
        actions = np.asarray(data["actions"], np.float64)
        if actions.ndim != 2 or actions.shape[1] < self.action_dim:
            raise ValueError(f"{self._name}: actions {list(actions.shape)}; expected [T, {self.action_dim}] or wider")
        return {"action": self.restore_actions(actions[:, : self.action_dim]).astype(np.float32)}

    def adapt_images(self, images: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """The model's cameras, uint8 [H', W', 3] by their key, from the robot's, uint8 [H, W, 3] by their name.

        A robot that crops, rotates or combines images overrides this method: it gets all of its `cameras` at their
        recorded size, and returns all model cameras of `cameras`. By default images are only renamed.
        """
        return {self.cameras[name]: image for name, image in images.items()}

    def adapt_state(self, state: np.ndarray) -> np.ndarray:
        """The robot's state [..., S] in the model's units."""
        return state

    def adapt_actions(self, actions: np.ndarray) -> np.ndarray:
        """The robot's actions [..., T, A] in the model's units."""
        return actions

    def restore_actions(self, actions: np.ndarray) -> np.ndarray:
        """Undo `adapt_actions`, on [..., T, A]."""
        return actions

    def state_keys(self, available: Collection[str]) -> list[str]:
        """The keys whose values are the state, concatenated. Raises ValueError if there are none."""
        for names in self.state_names:
            if len(keys := _keys(available, names)) == len(names):
                return keys
        wanted = " or ".join(" + ".join(f"observation.{name}" for name in names) for names in self.state_names)
        raise ValueError(f"{self._name}: no {wanted} in a frame of {sorted(available)}")

    def camera_keys(self, available: Collection[str]) -> list[str]:
        """The available keys of its cameras' images."""
        return _keys(available, self.cameras)

    def action_keys(self, available: Collection[str]) -> list[str]:
        """The keys whose values are the recorded actions, concatenated; empty if there are none."""
        return next((list(names) for names in self.action_names if all(name in available for name in names)), [])

    @property
    def _name(self) -> str:
        return type(self).__name__

    def _vectors(self, item: Mapping[str, Any], keys: Sequence[str]) -> np.ndarray:
        """The values of keys, concatenated; one with an axis less, such as a gripper, is one dimension."""
        parts = [self._vector(item, key) for key in keys]
        axes = max(part.ndim for part in parts)
        return np.concatenate([p if p.ndim == axes else p[..., None] for p in parts], axis=-1)

    def _vector(self, item: Mapping[str, Any], key: str) -> np.ndarray:
        try:
            x = to_numpy(item[key])
        except ValueError as error:
            raise ValueError(f"{self._name}: {key} is not an array of numbers: {error}") from error
        if x.dtype.kind not in "biuf":
            raise ValueError(f"{self._name}: {key} is not an array of numbers: its dtype is {x.dtype}")
        x = x.astype(np.float64)
        bad = np.argwhere(~(np.abs(x) <= np.finfo(np.float32).max))
        if len(bad):
            raise ValueError(
                f"{self._name}: {key} is {x[tuple(bad[0])]} at {bad[0].tolist()}; expected finite numbers of float32"
            )
        return x

    def _check(self, key: str, x: np.ndarray, leading: Sequence[int | str], dim: int) -> None:
        if x.ndim != len(leading) + 1 or x.shape[-1] != dim:
            wanted = ", ".join(map(str, (*leading, dim)))
            raise ValueError(f"{self._name}: {key} is {list(x.shape)}; expected [{wanted}]")

    def _refuse_two(self, item: Mapping[str, Any]) -> None:
        """Raise ValueError for prompts that are no text, and for two different values of one thing, by their keys."""
        prompts = [key for key in ("prompt", "task") if item.get(key) is not None]
        for key in prompts:
            check_text(item[key], f"{self._name}: {key}")
        names = [*self.cameras, *(name for names in self.state_names for name in names)]
        for found in [prompts, *([p + name for p in PREFIXES if p + name in item] for name in names)]:
            for other in found[1:]:
                if not _same(item[found[0]], item[other]):
                    raise ValueError(
                        f"{self._name}: {found[0]} and {other} are two different values of one thing; give one of them"
                    )
        states = [keys for names in self.state_names if len(keys := _keys(item, names)) == len(names)]
        for keys in states[1:]:
            if not _same(self._vectors(item, states[0]), self._vectors(item, keys)):
                raise ValueError(f"{self._name}: {states[0]} and {keys} are two different states; give one of them")

    def _images(self, item: Mapping[str, Any]) -> dict[str, Any]:
        keys = {name: key for name in self.cameras if (key := _find(item, name)) is not None}
        for camera in dict.fromkeys(self.cameras.values()):
            names = [name for name, target in self.cameras.items() if target == camera]
            found = [keys[name] for name in names if name in keys]
            if not found and set(names) <= set(self.optional_cameras):
                continue
            if len(found) != (len(names) if self.adapts_images else 1):
                raise ValueError(
                    f"{self._name}: {found or 'no image'} for the model's {camera}, which takes "
                    f"{'all' if self.adapts_images else 'one'} of {names}, in a frame of {sorted(item)}; the robot's "
                    "option `cameras` lists its cameras, `optional_cameras` those that frames may lack"
                )
        images = self.adapt_images({name: to_uint8(item[key], key) for name, key in keys.items()})
        if images.keys() != {self.cameras[name] for name in keys}:
            raise ValueError(
                f"{self._name}.adapt_images returned {sorted(images)}, not the model's cameras of `cameras`"
            )
        masks = {f"image_mask/{camera}": np.bool_(True) for camera in images}
        return {f"image/{camera}": to_uint8(image, camera) for camera, image in images.items()} | masks


def _text(prompt: Any) -> Any:
    """A prompt as openpi's clients send it: text or UTF-8, or an array without axes of either."""
    if isinstance(prompt, np.ndarray) and prompt.ndim == 0:
        prompt = prompt.item()
    with contextlib.suppress(UnicodeDecodeError):  # refused as no text
        return prompt.decode("utf-8") if isinstance(prompt, bytes) else prompt
    return prompt


def gripper_dims(names: Sequence[str], robot: Robot, size: int) -> list[int]:
    """The dimensions of grippers: by their names, else those that are absolute among relative ones, else the last."""
    named = [i for i, name in enumerate(names) if re.search(r"grip|finger|claw|jaw", name.lower())]
    absolute = [i for i, relative in enumerate(bool_mask(*robot.delta_dims)) if not relative]
    return named or [i for i in absolute if i < size] or [size - 1]


def default_cameras(**cameras: str) -> Any:
    """A dataclass field for `cameras` with this default."""
    return dataclasses.field(default_factory=lambda: dict(cameras))


def to_uint8(image: Any, where: str) -> np.ndarray:
    """An image [H, W, 3] or [3, H, W], uint8 or float in [0, 1], as uint8 [H, W, 3].

    Floats are rounded, which is exact for images that were divided by 255. Raises ValueError.
    """
    try:
        array = to_numpy(image)
    except ValueError as error:
        raise ValueError(f"{where}: {error}; expected an image [H, W, 3] or [3, H, W]") from error
    if array.ndim == 3 and array.shape[-1] != 3 and array.shape[0] == 3:
        array = array.transpose(1, 2, 0)
    if array.ndim != 3 or array.shape[-1] != 3 or not array.size:
        raise ValueError(f"{where}: an image of shape {list(np.shape(image))}; expected [H, W, 3] or [3, H, W]")
    if array.dtype == np.uint8:
        return array
    if not np.issubdtype(array.dtype, np.floating) or not (array.min() >= 0 and array.max() <= 1):
        raise ValueError(
            f"{where}: an image of {array.dtype}, {array.min()} to {array.max()}; expected uint8, or float in [0, 1]"
        )
    return np.round(array * 255.0).astype(np.uint8)


def check_text(text: Any, where: str) -> None:
    """Raise ValueError for what is no text, or has half a surrogate pair, which no tokenizer can encode."""
    if not isinstance(text, str):
        raise ValueError(f"{where} is {text!r:.80}; expected text")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(f"{where} is no valid Unicode: {error}") from error


def _same(a: Any, b: Any) -> bool:
    try:
        return a is b or (a == b if isinstance(a, str) else np.array_equal(to_numpy(a), to_numpy(b)))
    except ValueError:
        return False


def _keys(available: Collection[str], names: Iterable[str]) -> list[str]:
    return [key for name in names if (key := _find(available, name)) is not None]


def _find(available: Collection[str], name: str) -> str | None:
    return next((prefix + name for prefix in PREFIXES if prefix + name in available), None)


def _bare(key: str) -> str:
    """A key without its prefix."""
    return key.removeprefix(next(prefix for prefix in PREFIXES if key.startswith(prefix)))


def _flatten(item: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flatten nested dicts, such as openpi's `images`, to keys with slashes."""
    flat: dict[str, Any] = {}
    for key, value in item.items():
        new = _flatten(value, f"{prefix}{key}/") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
        if twice := sorted(flat.keys() & new.keys()):
            raise ValueError(f"{twice} are in the frame twice, nested and not; give one of them")
        flat |= new
    return flat
