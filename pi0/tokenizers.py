"""From text and actions to token ids, and back: the prompts that the models read, the actions that π0-FAST writes."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import scipy.fft
import sentencepiece
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from pi0.fetch import fetch, local_path

logger = logging.getLogger(__name__)

PALIGEMMA = "gs://big_vision/paligemma_tokenizer.model"
BUNDLED = "bundled://tokenizer.model"  # 512 pieces, made by pi0/sample/make_tokenizer.py

STATE_BINS = 256  # over the normalized range [-1, 1]

FAST = "hf://physical-intelligence/fast"
FAST_FILES = ("tokenizer.json", "processor_config.json")
SKIPPED_IDS = 128  # the last ids of PaliGemma's vocabulary, which FAST tokens leave alone
SURROGATES = 0xD800  # the first code point that is no character


class TextTokenizer:
    """Text to token ids and back, with a SentencePiece model.

    `source` is where the model file is: anything `pi0.fetch.fetch` takes.

    Attributes: `source`; `sha256` of the model file; `vocab_size`; `bos_id`, `eos_id`, `pad_id`; and two
    counters, `encoded` and `truncated`: the prompts encoded so far and those of them that were too long.

    Raises FileNotFoundError if there is no such file and ValueError if it is no SentencePiece model.
    """

    def __init__(self, source: str | Path = PALIGEMMA):
        self.source = str(source)
        path = fetch(source)
        model = path.read_bytes()
        self._pieces = sentencepiece.SentencePieceProcessor()
        try:
            self._pieces.LoadFromSerializedProto(model)
        except RuntimeError as error:
            raise ValueError(f"{path} is not a SentencePiece model; give a tokenizer.model file") from error
        self.sha256 = hashlib.sha256(model).hexdigest()
        self.vocab_size: int = self._pieces.vocab_size()
        self.bos_id: int = self._pieces.bos_id()
        self.eos_id: int = self._pieces.eos_id()
        self.pad_id: int = self._pieces.pad_id()
        self.encoded = 0
        self.truncated = 0

    def encode(self, text: str, add_bos: bool = False) -> list[int]:
        """The token ids of `text`, after `<bos>` if asked."""
        return self._pieces.encode(text, add_bos=add_bos)

    def decode(self, ids: list[int] | np.ndarray) -> str:
        """The text of token ids; special tokens such as `<bos>` and padding have none."""
        return self._pieces.decode([int(i) for i in ids])

    def encode_prompt(self, text: str, max_len: int, state: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
        """An instruction as a model reads it, padded with id 0 or cut to `max_len` tokens.

        π0 (no state): `<bos>{text}` and, encoded apart, a newline that starts the answer.
        π0.5 (normalized state [S]): `<bos>Task: {text}, State: {bins};\\nAction: `.
        In both, `text` is stripped and its underscores and newlines become spaces. A prompt that is cut is
        counted in `truncated`, and the first one is logged as a warning.

        Returns ids int32 [max_len] and mask bool [max_len], true where there is a token.
        Raises ValueError if the state is not one vector of finite numbers.
        Source: `PaligemmaTokenizer` in openpi's models/tokenizer.py.
        """
        text = _one_line(text)
        if state is None:
            ids = self.encode(text, add_bos=True) + self.encode("\n")
        else:
            bins = " ".join(map(str, state_bins(state)))
            ids = self.encode(f"Task: {text}, State: {bins};\nAction: ", add_bos=True)
        return self.pad(ids, max_len)

    def reference(self) -> dict[str, str]:
        """What a checkpoint says about its tokenizer; see `from_reference`."""
        return {"kind": "sentencepiece", "source": self.source, "sha256": self.sha256}

    @classmethod
    def from_reference(cls, reference: dict[str, Any]) -> TextTokenizer:
        """The tokenizer that `reference()` described.

        Raises ValueError if it is of another kind, or if the file at its source is another one by now.
        """
        if reference.get("kind") != "sentencepiece":
            raise ValueError(f"not a reference to a SentencePiece tokenizer: {reference}")
        tokenizer = cls(reference["source"])
        _require_sha256(tokenizer.source, tokenizer.sha256, reference.get("sha256"))
        return tokenizer

    def pad(self, ids: list[int], max_len: int) -> tuple[np.ndarray, np.ndarray]:
        """Ids int32 [max_len], padded with 0 or cut, and mask bool [max_len]; cut ones are counted and warned of."""
        self.encoded += 1
        if len(ids) > max_len:
            self.truncated += 1
            if self.truncated == 1:
                logger.warning(
                    "a prompt of %d tokens was cut to %d; raise max_token_len in the model config if this is "
                    "frequent (said once; `truncated` counts them all)",
                    len(ids),
                    max_len,
                )
            ids = ids[:max_len]
        padded = np.zeros(max_len, np.int32)
        padded[: len(ids)] = ids
        return padded, np.arange(max_len) < len(ids)


def state_bins(state: np.ndarray) -> np.ndarray:
    """The bin of each number of a normalized state [S]: 0 to 255 over [-1, 1], and -1 below.

    Raises ValueError if the state is not one vector of finite numbers.
    Source: openpi's models/tokenizer.py.
    """
    state = np.asarray(state)
    if state.ndim != 1:
        raise ValueError(f"a prompt holds one state of shape [S], got shape {list(state.shape)}")
    if not np.isfinite(state).all():
        raise ValueError(f"the state has NaN or infinite numbers at {np.flatnonzero(~np.isfinite(state))}")
    return np.digitize(state, np.linspace(-1, 1, STATE_BINS + 1)[:-1]) - 1


class FASTError(ValueError):
    """Token ids that are no action chunk; the message says what is wrong with them."""


class FASTTokenizer:
    """A normalized action chunk to token ids and back: DCT over time, rounded, as characters, byte-pair encoded.

    `source` is a folder of the Hugging Face layout of physical-intelligence/fast, anywhere `pi0.fetch.fetch` reads;
    its Python file is neither needed nor run. `fit` makes a new one.

    Attributes: `source`, None until one that was fitted has been saved; `sha256` of its FAST_FILES; `scale`, so that a
    rounded coefficient is off by at most 0.5 / scale; `min_token`, the coefficient whose character is 0; `vocab_size`;
    `time_horizon` T and `action_dim` A, which may be None.

    Raises FileNotFoundError for missing files and ValueError for damaged ones.
    Source: "FAST: Efficient Action Tokenization", section V, and physical-intelligence/fast on the Hugging Face Hub.
    """

    def __init__(self, source: str | Path = FAST):
        folder = fetch(source)
        missing = [name for name in FAST_FILES if not (folder / name).is_file()]
        if missing:
            raise FileNotFoundError(f"{folder} is no FAST tokenizer: it has no {' and no '.join(missing)}")
        self._set({name: (folder / name).read_bytes() for name in FAST_FILES}, str(source))

    def _set(self, files: Mapping[str, bytes], source: str | None) -> None:
        self.source, self._files = source, files
        try:
            self._bpe = tokenizers.Tokenizer.from_str(files["tokenizer.json"].decode())
            config = json.loads(files["processor_config.json"])
            self.scale, self.min_token = float(config["scale"]), int(config["min_token"])
            declared = int(config["vocab_size"])
        except Exception as error:  # `tokenizers` raises nothing more precise
            raise ValueError(f"{source} is no FAST tokenizer: {type(error).__name__}: {error}") from error
        self.time_horizon: int | None = config.get("time_horizon")
        self.action_dim: int | None = config.get("action_dim")
        self.vocab_size: int = self._bpe.get_vocab_size()
        self.sha256 = hashlib.sha256(b"".join(files[name] for name in FAST_FILES)).hexdigest()
        if not self.scale > 0 or self.vocab_size > declared:
            raise ValueError(
                f"{source} is no FAST tokenizer: scale {self.scale} must be above 0, and the {self.vocab_size} tokens "
                f"of tokenizer.json no more than vocab_size {declared} of processor_config.json"
            )

    @classmethod
    def fit(cls, chunks: Sequence[np.ndarray], scale: float = 10, vocab_size: int = 1024) -> FASTTokenizer:
        """A tokenizer for normalized action chunks [T, A] like these; the same chunks give the same bytes.

        As the published one is fitted, except for three things that its files carry, so that either code reads what the
        other has fitted: every byte is in the vocabulary, so no character is ever lost; there is room for coefficients
        twice as far below zero as any here; and tokens may span what GPT-2's pattern takes for words: with its breaks
        a chunk of 10 Meta-World actions takes 40% more tokens.
        Raises ValueError for no or bad chunks, scale <= 0, or a vocabulary smaller than the 256 bytes.
        """
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
        if not len(chunks) or not scale > 0 or vocab_size < len(alphabet):
            raise ValueError(
                f"{len(chunks)} chunks, scale {scale}, vocab_size {vocab_size}: a FAST tokenizer is fitted on one "
                f"chunk or more, with a scale above 0 and at least {len(alphabet)} tokens"
            )
        coefficients = [_quantize(chunk, scale) for chunk in chunks]
        min_token = 2 * min(-1, min(int(c.min()) for c in coefficients))
        bpe = tokenizers.Tokenizer(models.BPE())
        bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        bpe.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size,
            min_frequency=2,
            special_tokens=[],
            initial_alphabet=alphabet,
            max_token_length=10_000,
            show_progress=False,
        )
        bpe.train_from_iterator([_characters(c, min_token) for c in coefficients], trainer)
        shapes = {c.shape for c in coefficients}
        horizon, dim = shapes.pop() if len(shapes) == 1 else (None, None)
        config = {
            "action_dim": dim,
            # where transformers finds the code that goes with this layout
            "auto_map": {
                "AutoProcessor": "physical-intelligence/fast--processing_action_tokenizer.UniversalActionProcessor"
            },
            "min_token": min_token,
            "processor_class": "UniversalActionProcessor",
            "scale": float(scale),
            "time_horizon": horizon,
            "vocab_size": bpe.get_vocab_size(),
        }
        tokenizer = cls.__new__(cls)
        files = {
            "tokenizer.json": bpe.to_str(pretty=True),
            "processor_config.json": json.dumps(config, indent=2) + "\n",
        }
        tokenizer._set({name: text.encode() for name, text in files.items()}, None)
        return tokenizer

    def encode(self, actions: np.ndarray) -> list[int]:
        """The token ids of a normalized chunk [T, A].

        Raises ValueError for another shape, NaN, or a coefficient that the vocabulary cannot say.
        """
        text = _characters(_quantize(actions, self.scale), self.min_token)
        ids = self._bpe.encode(text, add_special_tokens=False).ids
        if self._bpe.decode(ids, skip_special_tokens=False) != text:  # `tokenizers` drops what it does not know
            raise ValueError(
                f"these actions have DCT coefficients that the vocabulary of {self.source} lacks: its training data "
                "had none like them. Check the normalization, or fit a tokenizer on this data"
            )
        return ids

    def decode(
        self,
        ids: Sequence[int] | np.ndarray,
        time_horizon: int | None = None,
        action_dim: int | None = None,
        fallback: bool = False,
    ) -> tuple[np.ndarray, bool]:
        """The chunk float64 [T, A] that ids stand for, and True.

        T and A are the tokenizer's own where not given; ValueError if it has none. Ids that are no such chunk raise
        FASTError; with `fallback` they give zeros and False instead.
        """
        horizon, dim = time_horizon or self.time_horizon, action_dim or self.action_dim
        if horizon is None or dim is None:
            raise ValueError(
                f"{self.source} does not say how long and wide a chunk is; give time_horizon and action_dim"
            )
        try:
            return self._decode(np.asarray(ids), (horizon, dim)), True
        except FASTError:
            if not fallback:
                raise
            return np.zeros((horizon, dim)), False

    def _decode(self, ids: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
        unknown = [int(i) for i in ids.ravel() if not 0 <= i < self.vocab_size]
        if ids.ndim != 1 or unknown:
            raise FASTError(
                f"no FAST tokens: shape {list(ids.shape)}, not in 0 to {self.vocab_size - 1}: {unknown[:8]}"
            )
        codes = [ord(c) for c in self._bpe.decode(ids.tolist(), skip_special_tokens=False)]
        if max(codes, default=0) >= SURROGATES:  # U+FFFD: bytes that are no character
            raise FASTError(f"the {len(ids)} tokens put bytes together that are no coefficients")
        if len(codes) != np.prod(shape):
            raise FASTError(
                f"{len(ids)} tokens hold {len(codes)} coefficients; a chunk of {list(shape)} has {np.prod(shape)}"
            )
        coefficients = (np.array(codes) + self.min_token).reshape(shape)
        return scipy.fft.idct(coefficients / self.scale, type=2, axis=0, norm="ortho")

    def save(self, folder: str | Path, overwrite: bool = False) -> None:
        """Write the folder, whole or not at all, and make it the `source`.

        `tokenizer_config.json` is for transformers, which would not load the tokenizer without it.
        Raises FileExistsError if it exists, unless it is a FAST tokenizer's to `overwrite`.
        """
        folder = local_path(folder)
        files = {**self._files, "tokenizer_config.json": _TOKENIZER_CONFIG}
        if folder.exists() and not (overwrite and {f.name for f in folder.iterdir()} <= set(files)):
            hint = "it has other files than a FAST tokenizer's" if overwrite else "--overwrite replaces it"
            raise FileExistsError(f"{folder} exists already: choose another folder ({hint})")
        temporary = folder.with_name(f".{folder.name}.{os.getpid()}")
        temporary.mkdir(parents=True)
        for name, content in files.items():
            (temporary / name).write_bytes(content)
        if folder.exists():
            shutil.rmtree(folder)
        temporary.rename(folder)
        self.source = str(folder)

    def reference(self) -> dict[str, str]:
        """What a checkpoint says about its action tokenizer; see `from_reference`. ValueError before it is saved."""
        if self.source is None:
            raise ValueError("this FAST tokenizer lies in no folder yet that could be referred to; save it first")
        return {"kind": "fast", "source": self.source, "sha256": self.sha256}

    @classmethod
    def from_reference(cls, reference: dict[str, Any]) -> FASTTokenizer:
        """The tokenizer that `reference()` described. Raises ValueError if it is of another kind, or has changed."""
        if reference.get("kind") != "fast":
            raise ValueError(f"not a reference to a FAST tokenizer: {reference}")
        tokenizer = cls(reference["source"])
        _require_sha256(reference["source"], tokenizer.sha256, reference["sha256"])
        return tokenizer


_TOKENIZER_CONFIG = b'{"clean_up_tokenization_spaces": false, "tokenizer_class": "PreTrainedTokenizerFast"}\n'


class FASTPromptTokenizer:
    """A whole text of π0-FAST: the instruction and the state, and after them the actions that answer.

    FAST token k has id `vocab_size` − 1 − 128 − k. `vocab_size` is the model's (default: the text tokenizer's own, as
    with PaliGemma, whose last pieces occur in no prompt); prompts are counted in `text.encoded` and `text.truncated`.

    Raises ValueError if the model's vocabulary has no room for the FAST tokens.
    Source: `FASTTokenizer` in openpi's models/tokenizer.py.
    """

    def __init__(self, text: TextTokenizer, fast: FASTTokenizer, vocab_size: int | None = None):
        self.text, self.fast = text, fast
        self.vocab_size = text.vocab_size if vocab_size is None else vocab_size
        self._start, self._end = text.encode("Action: "), text.encode("|")
        taken = text.vocab_size
        if self.vocab_size == text.vocab_size:
            taken = 1 + max(text.encode("Task: , State: -0123456789;\nAction: |"))
        if self.vocab_size - SKIPPED_IDS - fast.vocab_size < taken:
            raise ValueError(
                f"{fast.vocab_size} FAST tokens do not fit into a vocabulary of {self.vocab_size} above {taken} ids of "
                f"text; the model's vocab_size must be at least {text.vocab_size + SKIPPED_IDS + fast.vocab_size}"
            )

    def encode_prompt(
        self, text: str, max_len: int, state: np.ndarray, actions: np.ndarray | None = None
    ) -> dict[str, np.ndarray]:
        """`<bos>Task: {text}, State: {bins};\\n`, and with actions [T, A] `Action: {FAST tokens}|<eos>`.

        The text is stripped and in lower case, its underscores are spaces; state [S] and actions are normalized.

        Returns `tokenized_prompt` int32 [max_len], padded with 0 or cut; `tokenized_prompt_mask` bool [max_len], true
        where there is a token; `token_ar_mask` int32 and `token_loss_mask` bool [max_len], 1 and true on the answer.
        Raises ValueError for a bad state or bad actions.
        """
        bins = " ".join(map(str, state_bins(state)))
        text = text.lower().strip().replace("_", " ")
        prefix = self.text.encode(f"Task: {text}, State: {bins};\n", add_bos=True)
        answer = [] if actions is None else [*self._start, *self.action_ids(actions)]
        ids, mask = self.text.pad(prefix + answer, max_len)
        in_answer = mask & (np.arange(max_len) >= len(prefix))
        return {
            "tokenized_prompt": ids,
            "tokenized_prompt_mask": mask,
            "token_ar_mask": in_answer.astype(np.int32),
            "token_loss_mask": in_answer,
        }

    def action_ids(self, actions: np.ndarray) -> list[int]:
        """Normalized actions [T, A] as ids of the model's vocabulary, closed by "|" and `<eos>`."""
        ids = [self.vocab_size - 1 - SKIPPED_IDS - k for k in self.fast.encode(actions)]
        return [*ids, *self._end, self.text.eos_id]

    def extract_actions(
        self, tokens: Sequence[int] | np.ndarray, time_horizon: int, action_dim: int, fallback: bool = False
    ) -> tuple[np.ndarray, bool]:
        """The chunk float64 [T, A] in generated tokens [N], between "Action: " and the first "|" or `<eos>`; and True.

        Raises FASTError if there is none; with `fallback` the result is zeros and False instead.
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
        answer = answer[: min(_find(answer, self._end), _find(answer, [self.text.eos_id]))]
        return [self.vocab_size - 1 - SKIPPED_IDS - t for t in answer]


class RecipeTokenizer:
    """A whole text of π0.5's recipe: a prompt, and after it what is to be written: a subtask, an answer, FAST tokens.

    `fast` is None where no FAST tokens are written. What is returned is what FASTPromptTokenizer returns, but for
    `token_group` int32 [max_len], the group of `pi0.masks` of each token, instead of its two masks.
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
        plan: bool = False,
    ) -> dict[str, np.ndarray]:
        """`<bos>Task: {text}, State: {bins};\\nSubtask: `, to `plan` or with a subtask given; else π0.5's plain prompt.

        The subtask is written as `{subtask}<eos>`; normalized actions [T, A] as `{FAST tokens}|<eos>`, after a subtask
        with `Action: ` before them. Raises ValueError for a bad state or bad actions.
        """
        bins = " ".join(map(str, state_bins(state)))
        cue = "Action: " if subtask is None and not plan else "Subtask: "
        prompt = self.text.encode(f"Task: {_one_line(text)}, State: {bins};\n{cue}", add_bos=True)
        written = [] if subtask is None else [*self.text.encode(_one_line(subtask)), self.text.eos_id]
        fast: list[int] = []
        if self.fast is not None and actions is not None:
            fast = [*([] if subtask is None else self.text.encode("Action: ")), *self.fast.action_ids(actions)]
        return self._grouped((prompt, written, fast), max_len)

    def encode_question(self, question: str, max_len: int, answer: str) -> dict[str, np.ndarray]:
        """`<bos>Question: {question}\\nAnswer: `, and `{answer}<eos>`, which is to be written."""
        prompt = self.text.encode(f"Question: {_one_line(question)}\nAnswer: ", add_bos=True)
        return self._grouped((prompt, [*self.text.encode(_one_line(answer)), self.text.eos_id], []), max_len)

    def read(self, tokens: Sequence[int] | np.ndarray) -> str:
        """The text that generated tokens [N] say: up to the first `<eos>`, without ids that are no text."""
        ids = [int(t) for t in tokens]
        ids = ids[: _find(ids, [self.text.eos_id])]
        return self.text.decode([i for i in ids if i < self.text.vocab_size]).strip()

    def _grouped(self, parts: Sequence[list[int]], max_len: int) -> dict[str, np.ndarray]:
        ids, mask = self.text.pad([i for part in parts for i in part], max_len)
        ends = np.cumsum([len(part) for part in parts])[:-1]
        group = np.searchsorted(ends, np.arange(max_len), side="right") * mask
        return {"tokenized_prompt": ids, "tokenized_prompt_mask": mask, "token_group": group.astype(np.int32)}


def _one_line(text: str) -> str:
    return text.strip().replace("_", " ").replace("\n", " ")


def _find(ids: list[int], part: list[int]) -> int:
    """Where `part` first begins in `ids`; len(ids) where it does not occur."""
    return next((i for i in range(len(ids)) if ids[i : i + len(part)] == part), len(ids))


def _quantize(actions: np.ndarray, scale: float) -> np.ndarray:
    """Rounded DCT-II coefficients int64 [T, A] of a chunk [T, A]. Raises ValueError for another shape or NaN."""
    actions = np.asarray(actions, np.float64)
    if actions.ndim != 2 or not actions.size or not np.isfinite(actions).all():
        raise ValueError(f"actions of shape {list(actions.shape)}; expected finite numbers [T, A]")
    return np.around(scipy.fft.dct(actions, type=2, axis=0, norm="ortho") * scale).astype(np.int64)


def _characters(coefficients: np.ndarray, min_token: int) -> str:
    """Coefficients [T, A] as characters, time first. Raises ValueError for those that have none."""
    codes = coefficients.ravel() - min_token
    if codes.min() < 0 or codes.max() >= SURROGATES:
        raise ValueError(
            f"the actions' DCT coefficients go from {coefficients.min()} to {coefficients.max()}, but this tokenizer "
            f"starts at {min_token} and ends at {min_token + SURROGATES - 1}. Are the actions normalized with the "
            "stats that it was fitted with?"
        )
    return "".join(map(chr, codes.tolist()))


def _require_sha256(source: str, found: str, expected: str | None) -> None:
    if expected not in (None, found):  # None: a reference of LeRobot's, by name alone
        raise ValueError(
            f"{source} is not the tokenizer that was used: its sha256 is {found}, expected {expected}. Put the "
            "original there, or remove a stale copy from the cache."
        )
