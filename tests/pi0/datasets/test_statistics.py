from __future__ import annotations

import functools
import json
import operator

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from pi0.assets import fetch_norm_stats
from pi0.datasets import statistics
from pi0.datasets.lerobot import LeRobotDataset
from pi0.datasets.statistics import BINS, RunningStats, dataset_statistics, dimension_warnings, main, report
from pi0.robots.normalize import load_norm_stats
from pi0.robots.registry import make_robot
from pi0.sample import METAWORLD

# Cameras by another name, an order of our own and actions relative to the state: what a plain column would not show.
ROBOT = make_robot(
    {
        "name": "generic",
        "cameras": {"corner": "base_0_rgb"},
        "state": [[1, 4], [0, 1]],
        "actions": [[0, 3]],
        "delta_dims": [2],
        "delta": True,
    }
)


def streamed(x: np.ndarray, sizes: list[int]) -> RunningStats:
    parts = np.split(x, np.cumsum(sizes)[:-1])
    return functools.reduce(operator.add, [RunningStats.of(part) for part in parts])


def assert_numpy_s(stats: RunningStats, x: np.ndarray) -> None:
    norm, span = stats.norm_stats(), np.ptp(x, axis=0)
    scale = np.abs(x).max(axis=0)
    assert (np.abs(norm.mean - x.mean(axis=0)) <= 1e-6 * scale).all()
    assert (np.abs(norm.std - x.std(axis=0)) <= 1e-6 * scale).all()
    for ours, exact in zip((norm.q01, norm.q99), np.quantile(x, [0.01, 0.99], axis=0), strict=True):
        assert (np.abs(ours - exact) <= 1e-3 * span + 1e-15 * scale).all()  # numpy's own last place, for constants
    np.testing.assert_array_equal([norm.min, norm.max], [x.min(axis=0), x.max(axis=0)])


@pytest.mark.parametrize("seed", range(3))
def test_streaming_is_numpy_on_the_whole(seed: int):
    """Dimensions of very different kinds, in an order that makes the range grow: mean and std 1e-6, quantiles 1e-3."""
    rng = np.random.default_rng(seed)
    x = np.stack(
        [
            rng.normal(size=20_000),
            np.sort(rng.lognormal(0, 3, 20_000)),  # the largest come last and are thousands of times the median
            rng.uniform(-1e-6, 1e-6, 20_000) + 1000,
            rng.integers(0, 2, 20_000),
            np.full(20_000, 0.1),
            np.zeros(20_000),
            np.linspace(-1, 1, 20_000) ** 3,
        ],
        axis=1,
    )
    assert_numpy_s(streamed(x, [1, 2, 997, 9000, 10_000]), x)


# Nothing so small that a bin of it is no number any more: 1e-308 is the least, and no robot's.
NUMBERS = st.floats(-1e6, 1e6) | st.floats(-1e-3, 1e-3) | st.sampled_from([0.0, 0.1, 1.0, -1.0])
NUMBERS = NUMBERS.map(lambda x: x if abs(x) > 1e-200 else 0.0)


@hypothesis.given(hnp.arrays(np.float64, st.tuples(st.integers(3, 40), st.just(2)), elements=NUMBERS), st.data())
@hypothesis.settings(max_examples=40, deadline=None)
def test_merging_parts_is_the_whole(x: np.ndarray, data: st.DataObject):
    """Counts exactly, however the data are cut and whichever part comes first; few and odd numbers."""
    first = data.draw(st.integers(1, len(x) - 2))
    second = data.draw(st.integers(first + 1, len(x) - 1))
    a, b, c = (RunningStats.of(part) for part in (x[:first], x[first:second], x[second:]))
    whole = RunningStats.of(x)
    for merged in ((a + b) + c, a + (b + c), c + a + b):
        np.testing.assert_array_equal(merged.counts, whole.counts)
        np.testing.assert_array_equal(merged.quantile(0.01), whole.quantile(0.01))
        assert merged.count == whole.count and (merged.counts.sum(axis=1) == len(x)).all()
        assert_numpy_s(merged, x)


def test_bins_are_fine():
    """At least half of the bins, less one, span any range, which bounds a quantile's error."""
    rng = np.random.default_rng(0)
    for _ in range(200):
        low = rng.normal(size=3) * 10.0 ** rng.integers(-5, 5)
        span = 10.0 ** rng.uniform(-4, 4, 3)
        used = np.flatnonzero(RunningStats.of(np.stack([low, low + span])).counts[0])
        assert BINS // 2 - 1 <= used[-1] - used[0] < BINS


def test_a_dataset_s_statistics(monkeypatch: pytest.MonkeyPatch):
    """Against every frame read one by one, pictures and all; in blocks that cut episodes; and in parts."""
    monkeypatch.setattr(statistics, "BLOCK", 1000)
    dataset = LeRobotDataset(METAWORLD, action_horizon=6, episodes=[1, 4], cameras=[])
    stats = dataset_statistics(dataset, ROBOT)
    state, actions = [], []
    for i in range(len(dataset)):
        item = dataset[i]
        state.append(item["observation.state"][[1, 2, 3, 0]].astype(np.float64))
        relative = np.array([*state[-1][:2], 0])
        actions.append(item["action"][:, :3] - relative)
    assert_numpy_s(stats["state"], np.stack(state))
    assert_numpy_s(stats["actions"], np.concatenate(actions))
    parts = [
        dataset_statistics(LeRobotDataset(METAWORLD, action_horizon=6, episodes=[e], cameras=[]), ROBOT) for e in (4, 1)
    ]
    for key, whole in stats.items():
        merged = parts[0][key] + parts[1][key]
        np.testing.assert_array_equal(merged.counts, whole.counts)
        np.testing.assert_allclose([merged.mean, merged.m2], [whole.mean, whole.m2], rtol=1e-9)


def test_warnings():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(5000, 5))
    x[:, 1] = 3 + 1e-6 * x[:, 1]
    x[7, 2] = 40
    x[:, 3] = np.clip(x[:, 3], -1.5, 5)
    x[:, 4] = np.where(np.arange(5000) == 3, 1.0, 0.0)  # a range, but none between the quantiles
    stats = RunningStats.of(x)
    found = [" ".join(dimension_warnings(stats, dim).values()) for dim in range(5)]
    assert found[0] == "" and "nearly constant" in found[1] and "nearly constant" in found[4]
    assert "max 40 lies" in found[2] and "clipped" not in found[2]
    assert "is min (-1.5) in 6%" in found[3]
    assert "lies" not in found[3]
    text = report({"state": stats})
    assert text.count("warning: ") == 3 and "state[1] is nearly constant" in text and "; state[4] is nearly" in text
    assert "clipped" not in report({"state": stats}, grippers={"state": [3]})
    assert "no dimension" in report({"state": RunningStats.of(x[:, :1])})


def test_histogram_for_a_picture():
    edges, counts = RunningStats.of(np.linspace(-3, 5, 1000)[:, None]).histogram(0, bars=20)
    assert len(edges) == len(counts) + 1 <= 21 and counts.sum() == 1000
    assert edges[0] <= -3 and edges[-1] >= 5


def test_the_command(tmp_path, capsys: pytest.CaptureFixture[str]):
    arguments = ["bundled://metaworld_v30", "--robot", "metaworld", "--action-horizon", "10", "--asset-id", "lab/arm"]
    main([*arguments, "--out", str(tmp_path / "assets")])
    printed = capsys.readouterr().out
    assert printed.count("warning:") == 1 and "actions dy is min (-1) in 11%" in printed
    assert "gripper is" not in printed  # open and closed, as it should be
    folder = tmp_path / "assets" / "lab" / "arm"
    assert {f.name for f in folder.iterdir()} == {"norm_stats.json", "norm_stats.png"}
    loaded = fetch_norm_stats(tmp_path, "lab/arm")  # as a checkpoint's
    again = fetch_norm_stats(tmp_path / "assets", "lab/arm")  # as `--out` was given
    np.testing.assert_array_equal(again["state"].mean, loaded["state"].mean)
    with pytest.raises(FileNotFoundError, match=r"no norm stats of 'arm': neither .*/assets/arm/.* nor .*/arm/"):
        fetch_norm_stats(tmp_path, "arm")
    assert loaded.keys() == load_norm_stats(folder / "norm_stats.json").keys() == {"state", "actions"}
    recorded = LeRobotDataset(METAWORLD, cameras=[]).table("observation.state")
    np.testing.assert_allclose(loaded["state"].mean, recorded.mean(axis=0), rtol=1e-5)
    entry = json.loads((folder / "norm_stats.json").read_text())["norm_stats"]["actions"]
    assert entry.keys() >= {"mean", "std", "q01", "q99"} and len(entry["mean"]) == 4


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"--robot": "toaster"}, "toaster"),
        ({"--robot": '{"name": "metaworld", "wings": 2}'}, "wings"),
        ({"--robot": "aloha"}, r"[1165, 4]"),
        ({"--action-horizon": "0"}, "action_horizon is 0"),
    ],
)
def test_refusals_write_nothing(change: dict[str, str], said: str, tmp_path, capsys: pytest.CaptureFixture[str]):
    options = {"--robot": "metaworld", "--action-horizon": "5", "--out": str(tmp_path), "--asset-id": "x"} | change
    with pytest.raises(SystemExit):
        main(["bundled://metaworld_v30", *[text for pair in options.items() for text in pair]])
    error = capsys.readouterr().err
    assert error.startswith("pi0-stats: ") and said in error and error.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_a_robot_that_is_not_json(tmp_path, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit):
        main(["x", "--robot", "{", "--action-horizon", "5", "--out", str(tmp_path), "--asset-id", "x"])
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("pi0-stats: ") and "Expecting" in error
    assert not list(tmp_path.iterdir())


def test_bad_numbers_are_refused():
    with pytest.raises(ValueError, match="1 others of 2"):
        RunningStats.of(np.array([[1.0], [np.nan]]))
    with pytest.raises(ValueError, match="2 and of 3"):
        RunningStats.of(np.ones((2, 2))) + RunningStats.of(np.ones((2, 3)))
    with pytest.raises(ValueError, match="at least 2"):
        RunningStats.of(np.ones((1, 2))).norm_stats()
