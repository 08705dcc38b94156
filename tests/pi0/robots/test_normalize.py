from __future__ import annotations

import json

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from pi0.robots.normalize import EPSILON, MODES, NormStats, check_norm_stats, load_norm_stats, save_norm_stats

RNG = np.random.default_rng(0)
STATS = NormStats.from_data(RNG.normal(3, 2, (200, 4)))


def test_statistics_are_numpy_s():
    x = RNG.normal(size=(50, 3)).astype(np.float32)
    stats, wide = NormStats.from_data(x), x.astype(np.float64)
    np.testing.assert_array_equal(stats.mean, wide.mean(0))
    np.testing.assert_array_equal(stats.std, wide.std(0))
    np.testing.assert_array_equal([stats.q01, stats.q99], np.quantile(wide, [0.01, 0.99], axis=0))
    np.testing.assert_array_equal([stats.min, stats.max], [wide.min(0), wide.max(0)])


def test_formulas():
    x = np.array([[1.0, 2.0, 3.0, 4.0]])
    span = STATS.q99 - STATS.q01
    expected = {
        "zscore": (x - STATS.mean) / (STATS.std + EPSILON),
        "quantile": 2 * (x - STATS.q01) / (span + EPSILON) - 1,
        "quantile01": (x - STATS.q01) / span,
        "mean_std": (x - STATS.mean) / (STATS.std + 1e-8),
        "min_max": 2 * (x - STATS.min) / (STATS.max - STATS.min) - 1,
        "quantiles": 2 * (x - STATS.q01) / span - 1,
        "quantile10": 2 * (x - STATS.q10) / (STATS.q90 - STATS.q10) - 1,
        "identity": x,
    }
    for mode in MODES:
        # The same float64 formula, perhaps associated otherwise: a few units in the last place.
        np.testing.assert_allclose(STATS.apply(x, mode), expected[mode], rtol=1e-13, atol=1e-13)


@hypothesis.given(
    x=hnp.arrays(np.float64, (3, 4), elements=st.floats(-100, 100)),
    mode=st.sampled_from(MODES),
    dims=st.integers(1, 6),
)
def test_inverse(x: np.ndarray, mode: str, dims: int):
    """Also where stats are longer or shorter than the data; float64 throughout, so far inside 1e-6."""
    stats = NormStats.from_data(np.random.default_rng(dims).normal(size=(20, dims)))
    np.testing.assert_allclose(stats.invert(stats.apply(x, mode), mode), x, atol=1e-6)


def test_extra_dims_pass_through():
    x = RNG.normal(size=(5, 6))
    np.testing.assert_array_equal(STATS.apply(x, "zscore")[:, 4:], x[:, 4:])
    np.testing.assert_array_equal(STATS.apply(x[:, :2], "zscore"), STATS.apply(x, "zscore")[:, :2])


def test_files(tmp_path):
    file = tmp_path / "norm_stats.json"
    save_norm_stats(file, {"state": STATS, "actions": STATS})
    loaded = load_norm_stats(file)
    assert list(loaded) == ["state", "actions"]
    np.testing.assert_array_equal(loaded["actions"].q99, STATS.q99)
    assert set(json.loads(file.read_text())["norm_stats"]["state"]) >= {"mean", "std", "q01", "q99"}
    assert [f.name for f in tmp_path.iterdir()] == ["norm_stats.json"]


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("{", "norm_stats.json"),
        ("{}", "norm_stats"),
        ('{"norm_stats": {"state": {"mean": [0], "std": [1], "q01": [0]}}}', "q99"),
        ('{"norm_stats": {"state": {"mean": [0], "std": [1], "q01": [0], "q99": [1, 2]}}}', "q99"),
    ],
)
def test_bad_files_are_refused(tmp_path, text: str, named: str):
    file = tmp_path / "norm_stats.json"
    file.write_text(text)
    with pytest.raises(ValueError, match=named):
        load_norm_stats(file)


def test_bad_numbers_are_refused():
    with pytest.raises(ValueError, match="mode"):
        STATS.apply(np.zeros((1, 4)), "minmax")
    with pytest.raises(ValueError, match=r"\[1, 0\]"):
        NormStats.from_data(np.array([[0.0, 1.0], [np.nan, 1.0]]))
    with pytest.raises(ValueError, match="2 frames"):
        NormStats.from_data(np.zeros((1, 4)))
    with pytest.raises(ValueError, match="std"):
        NormStats(np.zeros(1), -np.ones(1), np.zeros(1), np.zeros(1))


def stats_of(state: int, actions: int, quantiles: bool = True, padding: int = 0) -> dict:
    def one(dims: int) -> NormStats:
        pad = np.zeros(padding)
        fields = {"mean": np.ones(dims), "std": np.ones(dims)}
        fields |= {"q01": np.zeros(dims), "q99": np.ones(dims)} if quantiles else {}
        return NormStats(**{name: np.concatenate([x, pad]) for name, x in fields.items()})

    return {"state": one(state), "actions": one(actions)}


@pytest.mark.parametrize(
    ("stats", "mode"),
    [
        (stats_of(4, 3), "zscore"),
        (stats_of(4, 3), "quantile"),
        (stats_of(4, 3), "quantile01"),
        (stats_of(4, 3, quantiles=False), "zscore"),
        (stats_of(8, 8), "zscore"),  # the model's dimensions, as openpi pads them
        (stats_of(4, 3, padding=5), "quantile01"),  # zeros, of a model that was wider: not divided by
    ],
)
def test_norm_stats_that_fit(stats: dict, mode: str):
    check_norm_stats(stats, mode, {"state": 4, "actions": 3}, padded={"state": 8, "actions": 8})


@pytest.mark.parametrize(
    ("stats", "mode", "problem"),
    [
        (stats_of(2, 3), "zscore", "norm stats of 'state' have 2 dimensions, the robot has 4"),
        (stats_of(4, 2), "zscore", "norm stats of 'actions' have 2 dimensions, the robot has 3"),
        (
            stats_of(7, 7),
            "zscore",
            "norm stats of 'state' have 7 dimensions, the robot has 4: they are of another robot",
        ),
        (stats_of(4, 3, quantiles=False), "quantile", "norm stats of 'state': mode 'quantile' needs q01 and q99"),
        (stats_of(4, 3) | {"state": NormStats(*np.ones((4, 4)))}, "quantile01", "is 0 in dimensions"),
        (stats_of(4, 3), "minmax", "unknown normalization mode 'minmax'"),
        ({"state": stats_of(4, 3)["state"]}, "zscore", r"norm stats lack \['actions'\]"),
    ],
)
def test_norm_stats_that_do_not_fit(stats: dict, mode: str, problem: str):
    with pytest.raises(ValueError, match=problem):
        check_norm_stats(stats, mode, {"state": 4, "actions": 3}, padded={"state": 8, "actions": 8})
