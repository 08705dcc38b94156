"""Token ids of text, with a SentencePiece model: the prompts of π0 and π0.5."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import sentencepiece

from pi0.fetch import fetch
from pi0.reading import read_bytes

logger = logging.getLogger(__name__)

PALIGEMMA = "gs://big_vision/paligemma_tokenizer.model"
BUNDLED = "bundled://tokenizer.model"  # 512 pieces, made by pi0/sample/make_tokenizer.py

STATE_BINS = 256  # over the normalized range [-1, 1]
MAX_MODEL = 64 << 20  # bytes of a SentencePiece model; PaliGemma's has 4 MB
MAX_PIECE = 1000  # bytes of text of one piece; PaliGemma's longest has 93
MAX_GROWTH = 256  # bytes of what its normalizer makes of one character; NFKC's longest has 33


class TextTokenizer:
    """Encodes and decodes text with a SentencePiece model.

    `source` is the model file, at any address of `pi0.fetch.fetch`.

    Attributes: `source`; `sha256` of the model file; `vocab_size`; `bos_id`, `eos_id`, `pad_id`; and two
    counters, `encoded` and `truncated`: of all encoded prompts, and of those that were too long.

    Raises FileNotFoundError for a missing file and ValueError if it is not a SentencePiece model.
    """

    def __init__(self, source: str | Path = PALIGEMMA):
        self.source = str(source)
        path = fetch(source)
        model = read_bytes(path, limit=MAX_MODEL)
        self._pieces = sentencepiece.SentencePieceProcessor()
        try:
            check_model(model)
            self._pieces.LoadFromSerializedProto(model)
        except (RuntimeError, ValueError, IndexError) as error:
            raise ValueError(f"{path} is not a SentencePiece model ({error}); give a tokenizer.model file") from error
        self.sha256 = hashlib.sha256(model).hexdigest()
        self.vocab_size: int = self._pieces.vocab_size()
        self.bos_id: int = self._pieces.bos_id()
        self.eos_id: int = self._pieces.eos_id()
        self.pad_id: int = self._pieces.pad_id()
        self.encoded = 0
        self.truncated = 0

    def encode(self, text: str, add_bos: bool = False) -> list[int]:
        """The token ids of `text`, with `add_bos` after `<bos>`."""
        return self._pieces.encode(text, add_bos=add_bos)

    def decode(self, ids: list[int] | np.ndarray) -> str:
        """The text of token ids [N]; special tokens such as `<bos>` and padding are skipped."""
        return self._pieces.decode([int(i) for i in ids])

    def encode_prompt(self, text: str, max_len: int, state: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
        """The prompt of an instruction, padded with id 0 or cut to `max_len` tokens.

        π0 (no state): `<bos>{text}` and, encoded separately, a newline.
        π0.5 (normalized state [S]): `<bos>Task: {text}, State: {bins};\\nAction: `.
        In both, `text` is stripped and its underscores and newlines become spaces. `truncated` counts prompts that are
        cut, and the first one is logged as a warning.

        Returns ids int32 [max_len] and mask bool [max_len], True for tokens.
        Raises ValueError if the state is not one vector of finite numbers.
        Source: `PaligemmaTokenizer` in openpi's models/tokenizer.py.
        """
        text = one_line(text)
        if state is None:
            ids = self.encode(text, add_bos=True) + self.encode("\n")
        else:
            bins = " ".join(map(str, state_bins(state)))
            ids = self.encode(f"Task: {text}, State: {bins};\nAction: ", add_bos=True)
        return self.pad(ids, max_len)

    def reference(self) -> dict[str, str]:
        """The entry of a checkpoint's config; see `from_reference`."""
        return {"kind": "sentencepiece", "source": self.source, "sha256": self.sha256}

    @classmethod
    def from_reference(cls, reference: dict[str, Any]) -> TextTokenizer:
        """The tokenizer of a `reference()`.

        Raises ValueError if it is another tokenizer's, or if the file at its source has changed.
        """
        if reference.get("kind") != "sentencepiece" or not isinstance(reference.get("source"), str):
            raise ValueError(f"not a reference to a SentencePiece tokenizer: {reference}")
        tokenizer = cls(reference["source"])
        require_sha256(tokenizer.source, tokenizer.sha256, reference.get("sha256"))
        return tokenizer

    def pad(self, ids: list[int], max_len: int) -> tuple[np.ndarray, np.ndarray]:
        """Ids int32 [max_len], padded with 0 or cut, and mask bool [max_len]. Counts and logs those that are cut."""
        self.encoded += 1
        if len(ids) > max_len:
            self.truncated += 1
            if self.truncated == 1:
                logger.warning(
                    "a prompt of %d tokens was cut to %d; raise max_token_len in the model config if this is "
                    "frequent (logged once; `truncated` counts them all)",
                    len(ids),
                    max_len,
                )
            ids = ids[:max_len]
        padded = np.zeros(max_len, np.int32)
        padded[: len(ids)] = ids
        return padded, np.arange(max_len) < len(ids)


def check_model(model: bytes) -> None:
    """Raise ValueError for a SentencePiece model whose use could take unbounded memory.

    That is, one with pieces of very long text, or with a normalizer that makes very long text of a character. Reads the
    wire format of `sentencepiece_model.proto`. Raises ValueError or IndexError for anything else.
    """
    pieces = 0
    for field, content in _messages(model):
        if field == 1:  # ModelProto.pieces
            pieces += 1
            if any(name == 1 and len(text) > MAX_PIECE for name, text in _messages(content)):
                raise ValueError(f"piece {pieces - 1} has more than {MAX_PIECE} bytes")
        elif field in (3, 5):  # normalizer_spec, denormalizer_spec
            for charsmap in [text for name, text in _messages(content) if name == 2 and text]:
                replacements = charsmap[4 + int.from_bytes(charsmap[:4], "little") :]  # after the trie
                if max(map(len, replacements.split(b"\0"))) > MAX_GROWTH:
                    raise ValueError(f"its normalizer makes more than {MAX_GROWTH} bytes of one character")
    if not pieces:
        raise ValueError("it has no pieces")


def _messages(data: bytes) -> Iterator[tuple[int, bytes]]:
    """The number and content of each length-delimited field of a protocol buffer."""
    at = 0

    def varint() -> int:
        nonlocal at
        value, shift = 0, 0
        while True:
            byte, at = data[at], at + 1
            value |= (byte & 0x7F) << shift
            shift += 7
            if not byte & 0x80:
                return value
            if shift > 63:
                raise ValueError("a number is too long")

    while at < len(data):
        tag = varint()
        wire = tag & 7
        if wire == 0:
            varint()
        elif wire in (1, 2, 5):
            size = varint() if wire == 2 else 8 if wire == 1 else 4
            if at + size > len(data):
                raise ValueError("it is truncated")
            if wire == 2:
                yield tag >> 3, data[at : at + size]
            at += size
        else:
            raise ValueError(f"unknown wire type {wire}")


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


def one_line(text: str) -> str:
    """A prompt without surrounding space; underscores and newlines become spaces."""
    return text.strip().replace("_", " ").replace("\n", " ")


def require_sha256(source: str, found: str, expected: str | None) -> None:
    """Raise ValueError where a tokenizer's hash is not the expected one."""
    if expected not in (None, found):  # None: a reference of LeRobot's, by name alone
        raise ValueError(
            f"{source} is not the tokenizer that was used: its sha256 is {found}, expected {expected}. Put the "
            "original there, or remove a stale copy from the cache."
        )
