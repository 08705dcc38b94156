"""A robot that is described by its options: selected dimensions, degrees and deltas."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np

from pi0.robots.robot import Robot
from pi0.robots.transforms import bool_mask


@dataclasses.dataclass(frozen=True, kw_only=True)
class Generic(Robot):
    """A robot described by options, for instance in a checkpoint's config.json:

        {"name": "generic", "cameras": {"front": "base_0_rgb"}, "state": [[0, 6]], "actions": [[0, 6]],
         "degrees": [5], "delta_dims": [5, -1], "delta": true}

    `state` and `actions` are the ranges [start, stop) of the recorded vectors that the model reads and predicts.
    `degrees` and `delta_dims` mark dimensions of those, as `bool_mask` does: recorded in degrees, converted to radians
    for the model; and relative to the state where `delta` is set. Raises ValueError for empty ranges.
    """

    state: Sequence[Sequence[int]]
    actions: Sequence[Sequence[int]]
    degrees: Sequence[int] = ()
    delta_dims: Sequence[int] = ()  # type: ignore[misc]  # an option here, a constant of other robots

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("state", "actions"):
            ranges = getattr(self, name)
            if not ranges or not all(len(r) == 2 and 0 <= r[0] < r[1] for r in ranges):
                raise ValueError(f"Generic: {name} is {ranges!r}; expected ranges [[start, stop], ...]")
        object.__setattr__(self, "state_dim", len(self._take(self.state)))
        object.__setattr__(self, "action_dim", len(self._take(self.actions)))
        least = min(self.state_dim, self.action_dim)
        for name in ("degrees", "delta_dims"):
            if len(bool_mask(*getattr(self, name))) > least:
                raise ValueError(f"Generic: {name} {getattr(self, name)!r} marks more than the {least} dimensions")

    def adapt_state(self, state: np.ndarray) -> np.ndarray:
        return self._radians(state[..., self._take(self.state)], np.deg2rad)

    def adapt_actions(self, actions: np.ndarray) -> np.ndarray:
        return self._radians(actions[..., self._take(self.actions)], np.deg2rad)

    def restore_actions(self, actions: np.ndarray) -> np.ndarray:
        return self._radians(actions.copy(), np.rad2deg)

    def _take(self, ranges: Sequence[Sequence[int]]) -> list[int]:
        return [i for start, stop in ranges for i in range(start, stop)]

    def _radians(self, x: np.ndarray, convert: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
        dims = np.flatnonzero(bool_mask(*self.degrees))
        x[..., dims] = convert(x[..., dims])
        return x

    def _check(self, key: str, x: np.ndarray, leading: Sequence[int | str], dim: int) -> None:
        """Recorded vectors may be longer than the selected ranges."""
        last = 1 + max(self._take(self.state if key == "state" else self.actions))
        super()._check(key, x[..., :last], leading, last)
