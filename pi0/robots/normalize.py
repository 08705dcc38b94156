"""Norm stats: computed from data, applied, inverted, and stored in openpi's JSON format."""

from __future__ import annotations

import dataclasses
import json
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from pi0.reading import read_json
from pi0.storage import as_path, write_text

EPSILON = 1e-6  # added to the divisor of "zscore" and "quantile" (openpi `transforms.Normalize`)
# LeRobot's modes, with its epsilon, an option: "mean_std" adds it to the divisor of what goes in, and not to the factor
# of what comes out; the others replace a range of zero by it.
LEROBOT_MODES = {
    "MEAN_STD": "mean_std",
    "MIN_MAX": "min_max",
    "QUANTILES": "quantiles",
    "QUANTILE10": "quantile10",
    "IDENTITY": "identity",
}
LEROBOT_EPSILON = 1e-8  # its default
MODES = ("zscore", "quantile", "quantile01", *LEROBOT_MODES.values())
KEYS = ("state", "actions")
RANGES = {  # the statistics that a mode maps to [-1, 1]
    "quantile": ("q01", "q99"),
    "quantile01": ("q01", "q99"),
    "quantiles": ("q01", "q99"),
    "min_max": ("min", "max"),
    "quantile10": ("q10", "q90"),
}
REQUIRED = ("mean", "std")
PADDING = 1e-6  # |mean| and std, at most, of dimensions that are padding


@dataclasses.dataclass(frozen=True, eq=False)
class NormStats:
    """Statistics of D dimensions over many frames: each field float64 [D], in the units of the data.

    All but `mean` and `std` are optional, where the mode does not use them. Raises ValueError for lengths that differ,
    or NaN.
    """

    mean: np.ndarray
    std: np.ndarray
    q01: np.ndarray | None = None
    q99: np.ndarray | None = None
    min: np.ndarray | None = None
    max: np.ndarray | None = None
    q10: np.ndarray | None = None
    q90: np.ndarray | None = None

    def __post_init__(self) -> None:
        for name, value in self.present().items():
            array = np.asarray(value, np.float64)
            if array.ndim != 1 or len(array) != np.size(self.mean):
                raise ValueError(
                    f"norm stats: {name} has shape {list(array.shape)}; expected [{np.size(self.mean)}], that of mean"
                )
            if not np.isfinite(array).all():
                dim = int(np.argmin(np.isfinite(array)))
                raise ValueError(f"norm stats: {name}[{dim}] is {array[dim]}; expected finite numbers")
            object.__setattr__(self, name, array)
        checks = {"std < 0": self.std < 0}
        for low, high in dict.fromkeys(RANGES.values()):
            first, second = getattr(self, low), getattr(self, high)
            if (first is None) != (second is None):
                raise ValueError(f"norm stats: {low} and {high} go together; one of them is missing")
            if first is not None and low != "min":
                checks[f"{low} > {high}"] = first > second
        for name, wrong in checks.items():
            if wrong.any():
                raise ValueError(f"norm stats: {name} in dimensions {np.flatnonzero(wrong).tolist()}")

    @classmethod
    def from_data(cls, x: np.ndarray) -> NormStats:
        """The statistics of x [N,D], computed in float64; quantiles are exact, linear between frames.

        Raises ValueError for another shape, fewer than two frames, or NaN.
        """
        x = np.asarray(x, np.float64)
        if x.ndim != 2 or len(x) < 2:
            raise ValueError(f"norm stats need data [N, D] of at least 2 frames; got shape {list(x.shape)}")
        _require_finite(x, "data")
        q01, q10, q90, q99 = np.quantile(x, [0.01, 0.1, 0.9, 0.99], axis=0)
        return cls(x.mean(axis=0), x.std(axis=0), q01, q99, x.min(axis=0), x.max(axis=0), q10, q90)

    def apply(self, x: np.ndarray, mode: str, eps: float = LEROBOT_EPSILON) -> np.ndarray:
        """Normalize x [..., D'] to float64 [..., D'] by `mode`, one of MODES.

        "zscore": (x - mean) / (std + EPSILON); "quantile": 2 (x - q01) / (q99 - q01 + EPSILON) - 1; "quantile01": (x -
        q01) / (q99 - q01); and LeRobot's, with its `eps`. Dimensions beyond the stats pass through, stats beyond the
        data are ignored (openpi `transforms.py`). Raises ValueError for NaN, another mode, or a "quantile01" of zero
        range.
        """
        offset, scale, shift = self._affine(mode, np.shape(x)[-1], eps)
        out = np.array(x, np.float64)
        _require_finite(out, "data to normalize")
        used = out[..., : len(offset)]
        used[...] = (used - offset) / scale - shift
        return out

    def invert(self, x: np.ndarray, mode: str, eps: float = LEROBOT_EPSILON, exact: bool = False) -> np.ndarray:
        """Undo `apply`: normalized x [..., D'] back to the data's units, float64 [..., D']. Raises as `apply` does.

        LeRobot's "mean_std" multiplies by std alone; with `exact`, it is undone like the others.
        """
        offset, scale, shift = self._affine(mode, np.shape(x)[-1], eps)
        if mode == "mean_std" and not exact:
            scale = self.std[: len(offset)]
        out = np.array(x, np.float64)
        _require_finite(out, "data to un-normalize")
        used = out[..., : len(offset)]
        used[...] = (used + shift) * scale + offset
        return out

    def _affine(self, mode: str, dims: int, eps: float = LEROBOT_EPSILON) -> tuple[np.ndarray, np.ndarray, float]:
        """Offset [D], scale [D] and shift such that normalized = (x - offset) / scale - shift."""
        if mode not in MODES:
            raise ValueError(f"unknown normalization mode {mode!r}; choose one of {list(MODES)}")
        if mode == "identity":
            return np.zeros(0), np.ones(0), 0.0
        if mode not in RANGES:
            return self.mean[:dims], self.std[:dims] + (EPSILON if mode == "zscore" else eps), 0.0
        names = RANGES[mode]
        low, high = (getattr(self, name) for name in names)
        if low is None:
            raise ValueError(f"mode {mode!r} needs {' and '.join(names)}, which these norm stats do not have")
        low, high = low[:dims], high[:dims]
        if mode == "quantile":
            return low, (high - low + EPSILON) / 2, 1.0
        constant = np.flatnonzero(high == low).tolist()
        if mode != "quantile01":
            return low, np.where(high == low, eps, high - low) / 2, 1.0
        if constant:
            raise ValueError(f"mode 'quantile01' divides by q99 - q01, which is 0 in dimensions {constant}")
        return low, high - low, 0.0

    def bounds(self) -> tuple[np.ndarray, np.ndarray]:
        """The range [D] in which most of the data was: q01 to q99, or within three standard deviations."""
        if self.q01 is not None and self.q99 is not None:
            return self.q01, self.q99
        return self.mean - 3 * self.std, self.mean + 3 * self.std

    def present(self) -> dict[str, np.ndarray]:
        """The statistics [D] that are not None, by name."""
        return {f.name: v for f in dataclasses.fields(self) if (v := getattr(self, f.name)) is not None}


Normalization = str | Mapping[str, Any]  # a mode, or {"state": mode, "actions": mode, "eps": LeRobot's epsilon}


def modes_of(normalization: Normalization) -> tuple[dict[str, str], float]:
    """The modes of "state" and "actions", and LeRobot's epsilon. Raises ValueError for anything else."""
    if isinstance(normalization, str):
        modes, eps = dict.fromkeys(KEYS, normalization), LEROBOT_EPSILON
    elif isinstance(normalization, Mapping) and {*KEYS} <= {*normalization} <= {*KEYS, "eps"}:
        modes, eps = {key: normalization[key] for key in KEYS}, normalization.get("eps", LEROBOT_EPSILON)
    else:
        raise ValueError(f"normalization is {normalization!r:.200}; it must be a mode, or one each of {list(KEYS)}")
    unknown = sorted({str(mode) for mode in modes.values() if mode not in MODES})
    if unknown:
        raise ValueError(f"unknown normalization mode {unknown[0]!r}; choose one of {list(MODES)}")
    if type(eps) not in (int, float) or not 0 <= eps < 1:
        raise ValueError(f"normalization: eps is {eps!r}; it must be a number from 0 to 1")
    return modes, float(eps)


def check_norm_stats(
    stats: Mapping[str, NormStats], normalization: Normalization, dims: Mapping[str, int], padded: Mapping[str, int]
) -> None:
    """Raise ValueError unless norm stats normalize a robot's state and actions of `dims` each.

    Stats of more dimensions are allowed as openpi has them, padded to the model's: `padded` in all, or zeros.
    """
    modes, _ = modes_of(normalization)
    missing = [key for key in dims if key not in stats]
    if missing:
        raise ValueError(f"norm stats lack {missing}; they have {sorted(stats)}")
    for key, size in dims.items():
        one = stats[key]
        extra = any(np.abs(x[size:]).max(initial=0) > PADDING for x in (one.mean, one.std))
        if len(one.mean) < size or (len(one.mean) != padded[key] and extra):
            raise ValueError(
                f"norm stats of {key!r} have {len(one.mean)} dimensions, the robot has {size}: they are of another "
                "robot; compute its own with pi0-stats"
            )
        try:
            one._affine(modes[key], size)
        except ValueError as error:
            raise ValueError(f"norm stats of {key!r}: {error}") from error


def load_norm_stats(path: str | pathlib.Path) -> dict[str, NormStats]:
    """Read {"norm_stats": {"state": {mean, std, q01, q99}, "actions": {...}}}, openpi's `norm_stats.json`.

    Raises FileNotFoundError, or ValueError naming the file and the entry that is missing or wrong.
    """
    path = as_path(path)
    content = read_json(path)
    if not isinstance(content.get("norm_stats"), dict):
        raise ValueError(f'{path}: expected an object {{"norm_stats": {{...}}}}')
    return {key: _entry(f"{path}: {key!r:.80}", entry) for key, entry in content["norm_stats"].items()}


def save_norm_stats(path: str | pathlib.Path, stats: Mapping[str, NormStats]) -> None:
    """Write the file that `load_norm_stats` reads, whole or not at all."""
    entries = {key: {k: v.tolist() for k, v in value.present().items()} for key, value in stats.items()}
    write_text(as_path(path), json.dumps({"norm_stats": entries}, indent=2))


def _entry(where: str, entry: object) -> NormStats:
    if not isinstance(entry, dict):
        raise ValueError(f"{where}: expected an object with {list(REQUIRED)}, got {entry!r}")
    missing = [name for name in REQUIRED if entry.get(name) is None]
    if missing:
        raise ValueError(f"{where}: {missing} missing; it has {sorted(entry)}")
    try:
        fields: dict[str, Any] = {f.name: entry.get(f.name) for f in dataclasses.fields(NormStats)}
        return NormStats(**fields)
    except (TypeError, ValueError, OverflowError) as error:
        raise ValueError(f"{where}: {error}") from error


def _require_finite(x: np.ndarray, what: str) -> None:
    bad = np.argwhere(~np.isfinite(x))
    if len(bad):
        raise ValueError(f"{what}: {x[tuple(bad[0])]} at index {bad[0].tolist()}; expected finite values")
