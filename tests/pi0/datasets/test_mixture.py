from __future__ import annotations

import collections

import numpy as np
import pytest

from pi0.datasets.mixture import BLOCK, SHUFFLES, Mixture, feistel, split_episodes


def test_split_by_fraction():
    episodes = [3, 1, 4, 15, 9, 2, 6, 5, 8, 7]
    training, validation = split_episodes(episodes, 0.3, seed=1)
    assert len(validation) == 3 and sorted(training + validation) == sorted(episodes)
    assert [n for n in episodes if n in training] == training, "the order is kept"
    assert split_episodes(episodes, 0.3, seed=1) == (training, validation)
    assert split_episodes(episodes, 0.3, seed=2) != (training, validation)
    assert len(split_episodes(episodes, 0.01)[1]) == 1
    assert split_episodes(episodes, 0.0) == (episodes, [])


def test_split_by_list():
    assert split_episodes([0, 1, 2, 3], [2]) == ([0, 1, 3], [2])


@pytest.mark.parametrize("validation", [1.0, -0.1, [7], [0, 1], 0.9])
def test_impossible_splits(validation: object):
    with pytest.raises(ValueError, match="validation"):
        split_episodes([0, 1], validation)  # type: ignore[arg-type]


DATASETS = [range(1000), range(1000, 1300), range(1300, 1307)]


def test_weights_hold_in_every_block():
    mixture = Mixture(DATASETS, [2, 1, 1], seed=3)
    for block in range(3):
        counts = collections.Counter(mixture.locate(block * BLOCK + place)[0] for place in range(BLOCK))
        assert counts == {0: BLOCK // 2, 1: BLOCK // 4, 2: BLOCK // 4}


@pytest.mark.parametrize("shuffle", SHUFFLES)
def test_every_frame_comes_once_before_any_comes_again(shuffle: str):
    mixture, seen = Mixture(DATASETS, [2, 1, 1], shuffle=shuffle), collections.defaultdict(list)
    for position in range(3 * BLOCK):
        dataset, frame = mixture.locate(position)
        seen[dataset].append(frame)
    for dataset, frames in seen.items():
        size = len(DATASETS[dataset])
        epochs = [frames[i : i + size] for i in range(0, len(frames) - size + 1, size)]
        assert epochs and all(sorted(epoch) == list(range(size)) for epoch in epochs)
        assert len({tuple(epoch) for epoch in epochs[:4]}) == len(epochs[:4]), "each is shuffled anew"


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 16, 17, 1000])
def test_feistel_is_a_permutation(size: int):
    orders = {tuple(feistel(i, size, (key, 7)) for i in range(size)) for key in range(5)}
    assert all(sorted(order) == list(range(size)) for order in orders)
    assert size < 16 or len(orders) == 5


def test_feistel_looks_random():
    """Of 2¹⁴ numbers: each sixteenth of positions goes evenly to each sixteenth (χ², 255 degrees: 99.99 % < 345), and
    the steps between neighbours do not repeat."""
    size = 2**14
    order = np.array([feistel(i, size, (0, 1)) for i in range(size)])
    counts = np.histogram2d(np.arange(size), order, 16, [[0, size], [0, size]])[0]
    assert ((counts - size / 256) ** 2 / (size / 256)).sum() < 345
    assert abs(np.corrcoef(order[1:], order[:-1])[0, 1]) < 5 / size**0.5
    assert np.unique(np.diff(order)).size > size / 2


def test_the_same_in_later_versions():
    """Runs go on in their order: these numbers may not change."""
    assert [feistel(i, 25_000_000, (0, 1, 0, 3)) for i in (0, 1, 24_999_999)] == [7879524, 17798395, 17756011]
    orders = [[Mixture(DATASETS, seed=3, shuffle=name).locate(p)[1] for p in (0, 1, 5000)] for name in SHUFFLES]
    assert orders == [[240, 269, 352], [122, 23, 522]]


def test_by_size_and_items():
    mixture = Mixture(DATASETS)
    assert len(mixture) == 1307
    counts = collections.Counter(mixture.locate(position)[0] for position in range(BLOCK))
    assert all(abs(counts[n] - BLOCK * len(DATASETS[n]) / 1307) < 1 for n in range(3))
    dataset, frame = mixture.locate(11)
    assert mixture[11] == DATASETS[dataset][frame]


def test_pure():
    """Any worker sees the same, in any order; another seed gives another order."""
    there, here = Mixture(DATASETS, seed=5), Mixture(DATASETS, seed=5)
    positions = [0, 70000, 3, 4096, 4095, 12]
    assert [there.locate(p) for p in positions] == [here.locate(p) for p in reversed(positions)][::-1]
    assert [Mixture(DATASETS, seed=6).locate(p) for p in positions] != [here.locate(p) for p in positions]


@pytest.mark.parametrize(
    ("datasets", "weights", "problem"),
    [
        ([], None, "needs datasets"),
        ([range(3), range(0)], None, "needs datasets with frames"),
        (DATASETS, [1, 2], "3 positive ones are needed"),
        (DATASETS, [1, 2, 0], "3 positive ones are needed"),
        (DATASETS, [1, 2, float("nan")], "3 positive ones are needed"),
        (DATASETS, [1, 1, 1e-6], "at least 1/4096"),
    ],
)
def test_impossible_mixtures(datasets: list[range], weights: list[float] | None, problem: str):
    with pytest.raises(ValueError, match=problem):
        Mixture(datasets, weights)


def test_negative_position():
    with pytest.raises(IndexError, match="-1"):
        Mixture(DATASETS).locate(-1)


def test_unknown_shuffle():
    with pytest.raises(ValueError, match="'riffle'; known are feistel, permutation"):
        Mixture(DATASETS, shuffle="riffle")
