"""Token sequences of π0-FAST and of π0.5's recipe: a prompt, and in training the target text after it."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import numpy as np

from pi0.families import TEXT_FORMATS, TextFormat
from pi0.tokenizers.fast import FASTError, FASTTokenizer
from pi0.tokenizers.text import TextTokenizer, one_line, state_bins

logger = logging.getLogger(__name__)

SKIPPED_IDS = 128  # the last ids of PaliGemma's vocabulary, which are not FAST tokens


class FASTPromptTokenizer:
    """Token sequences of π0-FAST: instruction and state, followed by the actions as FAST tokens.

    FAST token k has id `vocab_size` − 1 − 128 − k. `vocab_size` is the model's (default: the text tokenizer's, as for
    PaliGemma, whose last pieces occur in no prompt). `text.encoded` and `text.truncated` count prompts.

    `text_format` is the checkpoint's. Raises ValueError if the FAST tokens do not fit into the model's vocabulary; in
    LeRobot's format that is logged, since LeRobot does not check it.
    Source: `FASTTokenizer` in openpi's models/tokenizer.py.
    """

    def __init__(
        self,
        text: TextTokenizer,
        fast: FASTTokenizer,
        vocab_size: int | None = None,
        text_format: TextFormat = TEXT_FORMATS["openpi"],
    ):
        self.text, self.fast, self.format = text, fast, text_format
        # LeRobot counts from the end of the text tokenizer's vocabulary, which is PaliGemma's.
        self.vocab_size = text.vocab_size if vocab_size is None or text_format.bos_after_prompt else vocab_size
        self._start, self._end = text.encode("Action: "), text.encode("|")
        taken = text.vocab_size
        if self.vocab_size == text.vocab_size:
            taken = 1 + max(text.encode("Task: , State: -0123456789;\nAction: |"))
        if self.vocab_size - SKIPPED_IDS - fast.vocab_size < taken:
            size = self.vocab_size
            problem = f"{fast.vocab_size} FAST tokens do not fit into a vocabulary of {size} above {taken} ids of text"
            if not text_format.bos_after_prompt:
                least = text.vocab_size + SKIPPED_IDS + fast.vocab_size
                raise ValueError(f"{problem}; the model's vocab_size must be at least {least}")
            logger.warning("%s: some are text too, as LeRobot has them. Are these the policy's tokenizers?", problem)

    def encode_prompt(
        self, text: str, max_len: int, state: np.ndarray, actions: np.ndarray | None = None
    ) -> dict[str, np.ndarray]:
        """`<bos>Task: {text}, State: {bins};\\n`, and with actions [T, A] `Action: {FAST tokens}|<eos>`.

        The text is stripped and lower-cased, its underscores become spaces; state [S] and actions are normalized. In
        LeRobot's format its case is kept, newlines become spaces too, and a `<bos>` precedes the actions.

        Returns `tokenized_prompt` int32 [max_len], padded with 0 or cut; `tokenized_prompt_mask` bool [max_len], True
        for tokens; `token_ar_mask` int32 and `token_loss_mask` bool [max_len], 1 and True for the target tokens.
        Raises ValueError for a bad state or bad actions.
        """
        bins = " ".join(map(str, state_bins(state)))
        text = text.lower().strip().replace("_", " ") if self.format.lowercase else one_line(text)
        prefix = self.text.encode(f"Task: {text}, State: {bins};\n", add_bos=True)
        start = [self.text.bos_id] * self.format.bos_after_prompt
        answer = [] if actions is None else [*self._start, *self.action_ids(actions)]
        ids, mask = self.text.pad([*prefix, *start, *answer], max_len)
        places, first = np.arange(max_len), len(prefix) + len(start)
        # In training, LeRobot's <bos> is the first of the tokens that are attended to only from themselves on.
        causal = len(prefix) if actions is not None else first
        return {
            "tokenized_prompt": ids,
            "tokenized_prompt_mask": mask,
            "token_ar_mask": (mask & (places >= causal)).astype(np.int32),
            "token_loss_mask": mask & (places >= first),
        }

    def action_ids(self, actions: np.ndarray) -> list[int]:
        """Ids of normalized actions [T, A] in the model's vocabulary, ending with "|" and `<eos>`.

        Raises ValueError where the vocabulary is too small for them.
        """
        ids = [self.vocab_size - 1 - SKIPPED_IDS - k for k in self.fast.encode(actions)]
        if min(ids) < 0:
            raise ValueError(
                f"a FAST token has the id {min(ids)} in a vocabulary of {self.vocab_size}: it is too small"
            )
        return [*ids, *self._end, self.text.eos_id]

    def extract_actions(
        self, tokens: Sequence[int] | np.ndarray, time_horizon: int, action_dim: int, fallback: bool = False
    ) -> tuple[np.ndarray, bool]:
        """The chunk float64 [T, A] in generated tokens [N], after "Action: " to "|", `<eos>` or a second one; and True.

        Tokens of text among them are skipped, as openpi does, if what remains is exactly one chunk. Raises FASTError
        for anything else; with `fallback` the result is zeros and False instead, which is openpi's answer.
        """
        try:
            return self.fast.decode(self._answer([int(t) for t in tokens]), time_horizon, action_dim)
        except FASTError:
            if not fallback:
                raise
            return np.zeros((time_horizon, action_dim)), False

    def _answer(self, tokens: list[int]) -> list[int]:
        start = _find(tokens, self._start)
        if start == len(tokens):
            raise FASTError(f"the {len(tokens)} generated tokens have no 'Action: '")
        answer = tokens[start + len(self._start) :]
        answer = answer[: min(_find(answer, end) for end in (self._end, [self.text.eos_id], self._start))]
        ids = [self.vocab_size - 1 - SKIPPED_IDS - t for t in answer]
        return [i for i in ids if i < self.fast.vocab_size]  # without text; ids below 0 are special tokens, no text


class RecipeTokenizer:
    """Token sequences of π0.5's recipe: a prompt, and as targets a subtask, an answer or FAST tokens.

    `fast` is None without FAST tokens. Returns the same as FASTPromptTokenizer, but with `token_group` int32 [max_len],
    the group of `pi0.masks` of each token, instead of its two masks.
    """

    def __init__(self, text: TextTokenizer, fast: FASTPromptTokenizer | None = None):
        self.text, self.fast = text, fast

    def encode_prompt(
        self,
        text: str,
        max_len: int,
        state: np.ndarray,
        subtask: str | None = None,
        actions: np.ndarray | None = None,
        predict_subtask: bool = False,
    ) -> dict[str, np.ndarray]:
        """`<bos>Task: {text}, State: {bins};\\nSubtask: ` with `predict_subtask` or a subtask, else π0.5's prompt.

        The targets are `{subtask}<eos>`, and for normalized actions [T, A] `{FAST tokens}|<eos>`, after a subtask
        preceded by `Action: `. Raises ValueError for a bad state or bad actions.
        """
        bins = " ".join(map(str, state_bins(state)))
        cue = "Action: " if subtask is None and not predict_subtask else "Subtask: "
        prompt = self.text.encode(f"Task: {one_line(text)}, State: {bins};\n{cue}", add_bos=True)
        target = [] if subtask is None else [*self.text.encode(one_line(subtask)), self.text.eos_id]
        fast: list[int] = []
        if self.fast is not None and actions is not None:
            fast = [*([] if subtask is None else self.text.encode("Action: ")), *self.fast.action_ids(actions)]
        return self._grouped((prompt, target, fast), max_len)

    def encode_question(self, question: str, max_len: int, answer: str) -> dict[str, np.ndarray]:
        """`<bos>Question: {question}\\nAnswer: `, and the target `{answer}<eos>`. Arrays are [max_len]."""
        prompt = self.text.encode(f"Question: {one_line(question)}\nAnswer: ", add_bos=True)
        return self._grouped((prompt, [*self.text.encode(one_line(answer)), self.text.eos_id], []), max_len)

    def encode_subtask(self, subtask: str, length: int) -> np.ndarray:
        """`{subtask}<eos>` int32 [length], padded as generated tokens are. Raises ValueError for a longer text."""
        ids = [*self.text.encode(one_line(subtask)), self.text.eos_id]
        if len(ids) > length:
            raise ValueError(f"the subtask has {len(ids)} tokens; at most {length} are read")
        return np.array(ids + [0] * (length - len(ids)), np.int32)

    def read(self, tokens: Sequence[int] | np.ndarray) -> str:
        """The text of generated tokens [N] up to the first `<eos>`, without ids beyond the text vocabulary."""
        ids = [int(t) for t in tokens]
        ids = ids[: _find(ids, [self.text.eos_id])]
        return self.text.decode([i for i in ids if i < self.text.vocab_size]).strip()

    def _grouped(self, parts: Sequence[list[int]], max_len: int) -> dict[str, np.ndarray]:
        ids, mask = self.text.pad([i for part in parts for i in part], max_len)
        ends = np.cumsum([len(part) for part in parts])[:-1]
        group = np.searchsorted(ends, np.arange(max_len), side="right") * mask
        return {"tokenized_prompt": ids, "tokenized_prompt_mask": mask, "token_group": group.astype(np.int32)}


def _find(ids: list[int], part: list[int]) -> int:
    """The first index of `part` in `ids`, or len(ids)."""
    return next((i for i in range(len(ids)) if ids[i : i + len(part)] == part), len(ids))
