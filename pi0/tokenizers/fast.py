"""FAST: a normalized action chunk to token ids and back."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import scipy.fft
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from pi0.fetch import fetch
from pi0.storage import local_path
from pi0.tokenizers.text import require_sha256

FAST = "hf://physical-intelligence/fast"
FAST_FILES = ("tokenizer.json", "processor_config.json")
SURROGATES = 0xD800  # the first code point that is no character


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
        require_sha256(reference["source"], tokenizer.sha256, reference["sha256"])
        return tokenizer


_TOKENIZER_CONFIG = b'{"clean_up_tokenization_spaces": false, "tokenizer_class": "PreTrainedTokenizerFast"}\n'


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
