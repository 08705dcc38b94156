"""Norm stats: computed from data, applied, inverted, and stored in openpi's JSON format."""

from __future__ import annotations

import dataclasses
import json
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from pi0.reading import read_json
from pi0.storage import write_text

EPSILON = 1e-6  # added to the divisor of "zscore" and "quantile" (openpi `transforms.Normalize`)
MODES = ("zscore", "quantile", "quantile01")
REQUIRED = ("mean", "std")
PADDING = 1e-6  # |mean| and std, at most, of dimensions that are padding


@dataclasses.dataclass(frozen=True, eq=False)
class NormStats:
    """Statistics of D dimensions over many frames: each field float64 [D], in the units of the data.

    `q01` and `q99` are optional for "zscore"; `min` and `max` are informative, no mode uses them. Raises ValueError for
    lengths that differ or NaN.
    """

    mean: np.ndarray
    std: np.ndarray
    q01: np.ndarray | None = None
    q99: np.ndarray | None = None
    min: np.ndarray | None = None
    max: np.ndarray | None = None

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
        if (self.q01 is None) != (self.q99 is None):
            raise ValueError("norm stats: q01 and q99 go together; one of them is missing")
        crossed = np.zeros(0) if self.q01 is None or self.q99 is None else self.q01 > self.q99
        for name, wrong in {"std < 0": self.std < 0, "q01 > q99": crossed}.items():
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
        q01, q99 = np.quantile(x, [0.01, 0.99], axis=0)
        return cls(x.mean(axis=0), x.std(axis=0), q01, q99, x.min(axis=0), x.max(axis=0))

    def apply(self, x: np.ndarray, mode: str) -> np.ndarray:
        """Normalize x [..., D'] to float64 [..., D'] by `mode`, one of MODES.

        "zscore": (x - mean) / (std + EPSILON); "quantile": 2 (x - q01) / (q99 - q01 + EPSILON) - 1; "quantile01":
        (x - q01) / (q99 - q01). Dimensions beyond the stats pass through, stats beyond the data are ignored (openpi
        `transforms.py`). Raises ValueError for NaN, another mode, or a "quantile01" of zero range.
        """
        offset, scale, shift = self._affine(mode, np.shape(x)[-1])
        out = np.array(x, np.float64)
        _require_finite(out, "data to normalize")
        used = out[..., : len(offset)]
        used[...] = (used - offset) / scale - shift
        return out

    def invert(self, x: np.ndarray, mode: str) -> np.ndarray:
        """Undo `apply`: normalized x [..., D'] back to the data's units, float64 [..., D']. Raises as `apply` does."""
        offset, scale, shift = self._affine(mode, np.shape(x)[-1])
        out = np.array(x, np.float64)
        _require_finite(out, "data to un-normalize")
        used = out[..., : len(offset)]
        used[...] = (used + shift) * scale + offset
        return out

    def _affine(self, mode: str, dims: int) -> tuple[np.ndarray, np.ndarray, float]:
        """Offset [D], scale [D] and shift such that normalized = (x - offset) / scale - shift."""
        if mode not in MODES:
            raise ValueError(f"unknown normalization mode {mode!r}; choose one of {list(MODES)}")
        if mode == "zscore":
            return self.mean[:dims], self.std[:dims] + EPSILON, 0.0
        if self.q01 is None or self.q99 is None:
            raise ValueError(f"mode {mode!r} needs q01 and q99, which these norm stats do not have")
        q01, q99 = self.q01[:dims], self.q99[:dims]
        if mode == "quantile":
            return q01, (q99 - q01 + EPSILON) / 2, 1.0
        constant = np.flatnonzero(q99 == q01).tolist()
        if constant:
            raise ValueError(f"mode 'quantile01' divides by q99 - q01, which is 0 in dimensions {constant}")
        return q01, q99 - q01, 0.0

    def present(self) -> dict[str, np.ndarray]:
        """The statistics that are not None, by name."""
        return {f.name: v for f in dataclasses.fields(self) if (v := getattr(self, f.name)) is not None}


def check_norm_stats(stats: Mapping[str, NormStats], mode: str, dims: Mapping[str, int], padded: int) -> None:
    """Raise ValueError unless norm stats normalize by `mode` a robot's state and actions of `dims` each.

    Stats of more dimensions are allowed as openpi has them, padded to the model's: `padded` in all, or zeros.
    """
    if mode not in MODES:
        raise ValueError(f"unknown normalization mode {mode!r}; choose one of {list(MODES)}")
    missing = [key for key in dims if key not in stats]
    if missing:
        raise ValueError(f"norm stats lack {missing}; they have {sorted(stats)}")
    for key, size in dims.items():
        one = stats[key]
        extra = any(np.abs(x[size:]).max(initial=0) > PADDING for x in (one.mean, one.std))
        if len(one.mean) < size or (len(one.mean) != padded and extra):
            raise ValueError(
                f"norm stats of {key!r} have {len(one.mean)} dimensions, the robot has {size}: they are of another "
                "robot; compute its own with pi0-stats"
            )
        try:
            one._affine(mode, size)
        except ValueError as error:
            raise ValueError(f"norm stats of {key!r}: {error}") from error


def load_norm_stats(path: str | pathlib.Path) -> dict[str, NormStats]:
    """Read {"norm_stats": {"state": {mean, std, q01, q99}, "actions": {...}}}, openpi's `norm_stats.json`.

    Raises FileNotFoundError, or ValueError naming the file and the entry that is missing or wrong.
    """
    path = pathlib.Path(path)
    content = read_json(path)
    if not isinstance(content.get("norm_stats"), dict):
        raise ValueError(f'{path}: expected an object {{"norm_stats": {{...}}}}')
    return {key: _entry(f"{path}: {key!r:.80}", entry) for key, entry in content["norm_stats"].items()}


def save_norm_stats(path: str | pathlib.Path, stats: Mapping[str, NormStats]) -> None:
    """Write the file that `load_norm_stats` reads, whole or not at all."""
    entries = {key: {k: v.tolist() for k, v in value.present().items()} for key, value in stats.items()}
    write_text(pathlib.Path(path), json.dumps({"norm_stats": entries}, indent=2))


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
