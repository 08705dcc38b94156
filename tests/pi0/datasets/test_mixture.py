from __future__ import annotations

import collections

import pytest

from pi0.datasets.mixture import BLOCK, Mixture, split_episodes


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


def test_every_frame_comes_once_before_any_comes_again():
    mixture, seen = Mixture(DATASETS, [2, 1, 1]), collections.defaultdict(list)
    for position in range(3 * BLOCK):
        dataset, frame = mixture.locate(position)
        seen[dataset].append(frame)
    for dataset, frames in seen.items():
        size = len(DATASETS[dataset])
        epochs = [frames[i : i + size] for i in range(0, len(frames) - size + 1, size)]
        assert epochs and all(sorted(epoch) == list(range(size)) for epoch in epochs)
        assert len({tuple(epoch) for epoch in epochs[:4]}) == len(epochs[:4]), "each is shuffled anew"


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
