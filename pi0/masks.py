"""Attention masks and positions of all models, for arrays of NumPy, JAX or PyTorch: nothing but operators touches them.

A query token attends to valid key tokens whose block number is at most its own. π0 has three blocks: images and prompt,
state, actions. In π0-FAST images and prompt are one block, and each token that is written after them another. In π0.5
each token belongs to a group: images and prompt attend to each other; the subtask's text (or the answer to a question)
follows, token by token; FAST tokens after both; the action expert's tokens attend to each other and to all but the FAST
tokens, which are absent at inference. No token attends to a later group (π0.5 paper, section IV; "Knowledge Insulating
Vision-Language-Action Models", section V). Axes: B batch, S tokens.
"""

from __future__ import annotations

from typing import Any

PREFIX, SUBTASK, FAST, ACTIONS = GROUPS = range(4)
NAMES = ("images, prompt", "subtask", "FAST tokens", "actions")


def block_mask(blocks: Any, valid: Any, last: int | None = None) -> Any:
    """Attention mask, query (row) to key (column), bool [B, S, S], of `blocks` int [S] or [B, S] and `valid` [B, S].

    With `last`, of that many last queries alone.
    """
    rows = slice(None if last is None else -last, None)
    return (blocks[..., None, :] <= blocks[..., rows, None]) & valid[:, rows, None] & valid[:, None, :]


def attention_mask(groups: Any, valid: Any) -> Any:
    """Attention mask, query (row) to key (column), bool [B, S, S], of `groups` int [B, S] and `valid` bool [B, S]."""
    written = (groups == SUBTASK) | (groups == FAST)  # token by token: a block each
    blocks = written * valid.cumsum(1) + (groups == ACTIONS) * (groups.shape[1] + 1)
    hidden = (groups == ACTIONS)[:, :, None] & (groups == FAST)[:, None, :]
    return block_mask(blocks, valid) & ~hidden


def positions(groups: Any, valid: Any) -> Any:
    """The position of each token, int [B, S]: the valid ones before it; actions do not count FAST tokens."""
    unseen = (valid & (groups == FAST)).sum(1)[:, None]
    return valid.cumsum(1) - 1 - (groups == ACTIONS) * unseen
