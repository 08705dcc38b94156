from __future__ import annotations

import itertools

import numpy as np

from pi0.masks import ACTIONS, FAST, PREFIX, SUBTASK, attention_mask, positions


def sees(query: int, key: int, earlier: bool) -> bool:
    """The rule in words, pair by pair: whether a token sees another valid one, which is `earlier` (or itself)."""
    return {
        PREFIX: key == PREFIX,
        SUBTASK: key == PREFIX or (key == SUBTASK and earlier),
        FAST: key in (PREFIX, SUBTASK) or (key == FAST and earlier),
        ACTIONS: key in (PREFIX, SUBTASK, ACTIONS),
    }[query]


def test_every_pair():
    groups = np.repeat([PREFIX, SUBTASK, FAST, ACTIONS], [4, 3, 3, 2])
    valid = np.random.default_rng(0).random((6, 12)) < 0.7
    valid[0] = True
    mask = attention_mask(np.tile(groups, (6, 1)), valid)
    for row, i, j in itertools.product(range(6), range(12), range(12)):
        expected = valid[row, i] and valid[row, j] and sees(groups[i], groups[j], earlier=j <= i)
        assert mask[row, i, j] == expected, (row, i, j)


def test_it_is_transitive():
    """Who sees a token sees all that it has seen; else what a token may not see would reach it in two layers."""
    groups = np.repeat([PREFIX, SUBTASK, FAST, ACTIONS], [4, 3, 3, 2])[None]
    mask = attention_mask(groups, np.ones(groups.shape, bool))[0].astype(int)
    assert not ((mask @ mask > 0) & (mask == 0)).any()


def test_positions_skip_padding_and_what_actions_do_not_see():
    groups = np.array([[PREFIX, PREFIX, SUBTASK, SUBTASK, FAST, FAST, ACTIONS, ACTIONS]])
    valid = np.array([[True, False, True, True, True, True, True, True]])
    assert positions(groups, valid)[0, valid[0]].tolist() == [0, 1, 2, 3, 4, 3, 4]
