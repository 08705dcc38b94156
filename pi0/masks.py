"""Who sees whom in π0.5, and at which position: one mask for both frameworks, for each stage of training and inference.

Each token belongs to a group. Images and prompt see each other; the subtask's text (or the answer to a question) is
written after them, token by token; FAST tokens after both; the action expert's tokens see each other and all but the
FAST tokens, which are not there at inference. Nobody sees a later group (π0.5 paper, section IV; "Knowledge Insulating
Vision-Language-Action Models", section V). Axes: B batch, S tokens.
"""

from __future__ import annotations

from typing import Any

PREFIX, SUBTASK, FAST, ACTIONS = GROUPS = range(4)
NAMES = ("images, prompt", "subtask", "FAST tokens", "actions")


def attention_mask(groups: Any, valid: Any) -> Any:
    """Who (row) sees whom (column): bool [B, S, S], of `groups` int [B, S] and `valid` bool [B, S].

    The arrays are NumPy's, JAX's or PyTorch's: nothing but operators touches them.
    """
    order = valid.cumsum(1)
    query, key = groups[:, :, None], groups[:, None, :]
    together = (query == PREFIX) | (query == ACTIONS)
    within = (key == query) & (together | (order[:, None, :] <= order[:, :, None]))
    hidden = (query == ACTIONS) & (key == FAST)
    return ((key < query) & ~hidden | within) & valid[:, :, None] & valid[:, None, :]


def positions(groups: Any, valid: Any) -> Any:
    """The position of each token, int [B, S]: how many valid ones are before it; actions do not count FAST tokens."""
    unseen = (valid & (groups == FAST)).sum(1)[:, None]
    return valid.cumsum(1) - 1 - (groups == ACTIONS) * unseen
