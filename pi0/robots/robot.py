"""What all robots share: where a frame keeps its pictures, state, actions and instruction, and what they must be."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping, Sequence
from typing import Any, ClassVar

import numpy as np

from pi0.robots.transforms import bool_mask

# A thing named X may lie in a frame under any of these: LeRobot's columns, openpi's clients, or its bare name.
PREFIXES = ("observation.images.", "observation.", "observation/", "images/", "")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Robot:
    """A robot's recorded or live frames in the model's flat keys, and the model's actions back in its own units.

    A subclass states `state_dim` S, `action_dim` A, the `state_names` that make up its state (alternatives, each
    concatenated) and the `delta_dims` as `bool_mask` takes them; where the model's units differ from the robot's it
    overrides `adapt_state`, `adapt_actions` and `restore_actions`.

    The fields are the options that a checkpoint may set: `cameras`, from the robot's names to the model's, all of
    which a frame must have (of several names for one model camera, exactly one); `delta`, whether the model's actions
    are relative to the state in `delta_dims`; `default_prompt`, for frames without an instruction.
    """

    cameras: Mapping[str, str]
    delta: bool = False
    default_prompt: str | None = None

    state_dim = 0
    action_dim = 0
    state_names: ClassVar[Sequence[Sequence[str]]] = (("state",),)
    delta_dims: ClassVar[Sequence[int]] = ()

    def __post_init__(self) -> None:
        if not isinstance(self.cameras, Mapping) or not self.cameras:
            raise ValueError(f"{self._name}: cameras is {self.cameras!r}; it maps names of cameras to the model's")
        if not isinstance(self.delta, bool) or (self.delta and not self.delta_dims):
            raise ValueError(f"{self._name}: delta is {self.delta!r}; {'true or' if self.delta_dims else 'only'} false")

    @property
    def delta_mask(self) -> tuple[bool, ...] | None:
        """Which of the model's action dimensions are relative to the state; None for none."""
        return bool_mask(*self.delta_dims) if self.delta else None

    def to_model(self, item: Mapping[str, Any]) -> dict[str, Any]:
        """One recorded or live frame in the model's flat keys (see `transforms.py`); `actions` only where it has them.

        Pictures are uint8 [H, W, 3], or float in [0, 1] and channels first, as LeRobot's loader gives them. Raises
        ValueError for a camera or a state that is missing, and for shapes, dtypes or ranges that do not fit.
        """
        item = _flatten(item)
        data = self.numbers(item) | self._images(item)
        prompt = next((item[key] for key in ("task", "prompt") if key in item), None)
        if prompt is not None and not isinstance(prompt, str):
            raise ValueError(f"{self._name}: the prompt is {prompt!r:.80}; expected text")
        return data if prompt is None else data | {"prompt": prompt}

    def numbers(self, item: Mapping[str, Any]) -> dict[str, np.ndarray]:
        """The state [..., S] and, if any, actions [..., T, A] of frames as the model has them, float64.

        Any leading axes: statistics pass many frames at once, without pictures. Raises ValueError.
        """
        parts = [self._vector(item, key) for key in self.state_keys(item)]
        axes = max(part.ndim for part in parts)
        state = np.concatenate([p if p.ndim == axes else p[..., None] for p in parts], axis=-1)  # a gripper alone
        self._check("state", state, state.shape[:-1], self.state_dim)
        data = {"state": self.adapt_state(state)}
        key = self.action_key(item)
        if key is not None:
            actions = self._vector(item, key)
            self._check(key, actions, (*state.shape[:-1], "T"), self.action_dim)
            data["actions"] = self.adapt_actions(actions)
        return data

    def from_model(self, data: Mapping[str, Any]) -> dict[str, np.ndarray]:
        """Un-normalized absolute `actions` [T, A or more] of the model as the robot's `action` float32 [T, A].

        Raises ValueError for another shape.
        """
        actions = np.asarray(data["actions"], np.float64)
        if actions.ndim != 2 or actions.shape[1] < self.action_dim:
            raise ValueError(f"{self._name}: actions {list(actions.shape)}; expected [T, {self.action_dim}] or wider")
        return {"action": self.restore_actions(actions[:, : self.action_dim]).astype(np.float32)}

    def adapt_state(self, state: np.ndarray) -> np.ndarray:
        """The robot's state [..., S] in the model's units."""
        return state

    def adapt_actions(self, actions: np.ndarray) -> np.ndarray:
        """The robot's actions [..., T, A] in the model's units."""
        return actions

    def restore_actions(self, actions: np.ndarray) -> np.ndarray:
        """Undo `adapt_actions`."""
        return actions

    def state_keys(self, available: Collection[str]) -> list[str]:
        """The keys of which the state is made. Raises ValueError if there are none."""
        for names in self.state_names:
            keys = [key for name in names if (key := _find(available, name)) is not None]
            if len(keys) == len(names):
                return keys
        wanted = " or ".join(" + ".join(f"observation.{name}" for name in names) for names in self.state_names)
        raise ValueError(f"{self._name}: no {wanted} in a frame of {sorted(available)}")

    def camera_keys(self, available: Collection[str]) -> list[str]:
        """The keys of its cameras' pictures, of those that are available."""
        return [key for name in self.cameras if (key := _find(available, name)) is not None]

    def action_key(self, available: Collection[str]) -> str | None:
        """The key of recorded actions, if there is one."""
        return next((key for key in ("action", "actions") if key in available), None)

    @property
    def _name(self) -> str:
        return type(self).__name__

    def _vector(self, item: Mapping[str, Any], key: str) -> np.ndarray:
        try:
            x = np.asarray(item[key], np.float64)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{self._name}: {key} is no array of numbers: {error}") from error
        bad = np.argwhere(~np.isfinite(x))
        if len(bad):
            raise ValueError(f"{self._name}: {key} is {x[tuple(bad[0])]} at {bad[0].tolist()}; expected finite numbers")
        return x

    def _check(self, key: str, x: np.ndarray, leading: Sequence[int | str], dim: int) -> None:
        if x.ndim != len(leading) + 1 or x.shape[-1] != dim:
            wanted = ", ".join(map(str, (*leading, dim)))
            raise ValueError(f"{self._name}: {key} is {list(x.shape)}; expected [{wanted}]")

    def _images(self, item: Mapping[str, Any]) -> dict[str, Any]:
        data: dict[str, Any] = {}
        for camera in dict.fromkeys(self.cameras.values()):
            names = [name for name, target in self.cameras.items() if target == camera]
            keys = [key for name in names if (key := _find(item, name)) is not None]
            if len(keys) != 1:
                raise ValueError(
                    f"{self._name}: {keys or 'no picture'} for the model's {camera}, which is one of {names}, in a "
                    f"frame of {sorted(item)}; the robot's option `cameras` says which there are"
                )
            data[f"image/{camera}"] = to_uint8(item[keys[0]], keys[0])
            data[f"image_mask/{camera}"] = np.bool_(True)
        return data


def to_uint8(image: Any, where: str) -> np.ndarray:
    """A picture [H, W, 3] or [3, H, W], uint8 or float in [0, 1], as uint8 [H, W, 3].

    Floats are rounded, which gives back the bytes they were made from by x / 255. Raises ValueError.
    """
    array = np.asarray(image)
    if array.ndim == 3 and array.shape[-1] != 3 and array.shape[0] == 3:
        array = array.transpose(1, 2, 0)
    if array.ndim != 3 or array.shape[-1] != 3 or not array.size:
        raise ValueError(f"{where}: a picture of shape {list(np.shape(image))}; expected [H, W, 3] or [3, H, W]")
    if array.dtype == np.uint8:
        return array
    if array.dtype.kind != "f" or not (array.min() >= 0 and array.max() <= 1):
        raise ValueError(
            f"{where}: a picture of {array.dtype}, {array.min()} to {array.max()}; expected uint8, or float in [0, 1]"
        )
    return np.round(array * 255.0).astype(np.uint8)


def _find(available: Collection[str], name: str) -> str | None:
    return next((prefix + name for prefix in PREFIXES if prefix + name in available), None)


def _flatten(item: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested tables, such as openpi's `images`, as keys with slashes."""
    flat: dict[str, Any] = {}
    for key, value in item.items():
        flat |= _flatten(value, f"{prefix}{key}/") if isinstance(value, Mapping) else {prefix + key: value}
    return flat
