"""FAST: token ids of normalized action chunks."""

from __future__ import annotations

import functools
import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from pi0.fetch import fetch
from pi0.reading import MAX_JSON, parse_json, read_bytes
from pi0.storage import as_path, below, new_folder
from pi0.tokenizers.text import require_sha256

FAST = "hf://physical-intelligence/fast"
FAST_FILES = ("tokenizer.json", "processor_config.json")
FOLDER: dict[str, Any] = {"marker": FAST_FILES, "files": ("tokenizer_config.json",)}  # what `save` may replace
SURROGATES = 0xD800  # the first code point that is not a character
MAX_TOKEN = 10_000  # characters of one token, as in `fit`
MAX_CHUNK = 4096  # actions of a chunk, and dimensions of an action
# What tokenizer.json may contain besides a BPE model: other components (normalizers, regular expressions) can take
# unbounded time and memory, and this format needs none of them. None: absent.
COMPONENTS = {
    "truncation": (None,),
    "padding": (None,),
    "normalizer": (None,),
    "pre_tokenizer": ("ByteLevel",),
    "post_processor": (None, "ByteLevel"),
    "decoder": ("ByteLevel",),
    "model": ("without a type", "BPE"),  # as in files of the first versions
}


class FASTError(ValueError):
    """Token ids that do not decode to an action chunk; the message has the reason."""


class FASTTokenizer:
    """Encodes normalized action chunks: DCT over time, rounded, as characters, byte-pair encoded.

    `source` is a folder in the Hugging Face layout of physical-intelligence/fast, at any address of `pi0.fetch.fetch`;
    its Python file is neither needed nor run. `fit` makes a new one.

    Attributes: `source`, None until a fitted one has been saved; `sha256` of its FAST_FILES; `scale`: rounding changes
    a coefficient by at most 0.5 / scale; `min_token`, the coefficient whose character is 0; `vocab_size`;
    `time_horizon` T and `action_dim` A, which may be None.

    Raises FileNotFoundError for missing files and ValueError for damaged ones.
    Source: "FAST: Efficient Action Tokenization", section V, and physical-intelligence/fast on the Hugging Face Hub.
    """

    def __init__(self, source: str | Path = FAST):
        folder = fetch(source)
        missing = [name for name in FAST_FILES if not (folder / name).is_file()]
        if missing:
            raise FileNotFoundError(f"{folder} is not a FAST tokenizer: it has no {' and no '.join(missing)}")
        self._set({name: read_bytes(below(folder, name), limit=MAX_JSON) for name in FAST_FILES}, str(source))

    def _set(self, files: Mapping[str, bytes], source: str | None) -> None:
        self.source, self._files = source, files
        try:
            check_components(parse_json(files["tokenizer.json"], "tokenizer.json"))
            self._bpe = tokenizers.Tokenizer.from_str(files["tokenizer.json"].decode())
            config = parse_json(files["processor_config.json"], "processor_config.json")
            self.scale, self.min_token = float(config["scale"]), _whole(config, "min_token", -(2**31), 2**31)
            self.time_horizon = None if config.get("time_horizon") is None else _whole(config, "time_horizon")
            self.action_dim = None if config.get("action_dim") is None else _whole(config, "action_dim")
            declared = _whole(config, "vocab_size", high=2**31)
        except Exception as error:  # `tokenizers` raises nothing more precise
            raise ValueError(f"{source} is not a FAST tokenizer: {type(error).__name__}: {error}") from error
        self.vocab_size: int = self._bpe.get_vocab_size()
        self.sha256 = hashlib.sha256(b"".join(files[name] for name in FAST_FILES)).hexdigest()
        if not 0 < self.scale < math.inf or self.vocab_size > declared:
            raise ValueError(
                f"{source} is not a FAST tokenizer: scale {self.scale} must be above 0, and the {self.vocab_size} "
                f"tokens of tokenizer.json no more than vocab_size {declared} of processor_config.json"
            )

    @classmethod
    def fit(cls, chunks: Sequence[np.ndarray], scale: float = 10, vocab_size: int = 1024) -> FASTTokenizer:
        """A tokenizer fitted on normalized action chunks [T, A]; the same chunks give the same bytes.

        Fitted as the published one, with three differences that are stored in its files, so that openpi's code can read
        them: every byte is in the vocabulary, so that no character is lost; coefficients twice as far below zero as any
        of these can be encoded; and tokens are not split at GPT-2's word pattern, which would take 40% more tokens
        for a chunk of 10 Meta-World actions. Raises ValueError for no or bad chunks, scale <= 0, or a vocabulary
        smaller than the 256 bytes.
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
            # the code that transformers runs for this layout
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

        Raises ValueError for another shape, NaN, or a coefficient that is not in the vocabulary.
        """
        text = _characters(_quantize(actions, self.scale), self.min_token)
        ids = self._bpe.encode(text, add_special_tokens=False).ids
        if self._bpe.decode(ids, skip_special_tokens=False) != text:  # `tokenizers` drops unknown characters
            raise ValueError(
                f"these actions have DCT coefficients that the vocabulary of {self.source} lacks, as its training "
                "data had none like them. Check the normalization, or fit a tokenizer on this data"
            )
        return ids

    def decode(
        self,
        ids: Sequence[int] | np.ndarray,
        time_horizon: int | None = None,
        action_dim: int | None = None,
        fallback: bool = False,
    ) -> tuple[np.ndarray, bool]:
        """The chunk float64 [T, A] of token ids, and True.

        T and A default to the tokenizer's; ValueError if it has none. Ids of no such chunk raise FASTError; with
        `fallback` they give zeros and False instead.
        """
        horizon, dim = time_horizon or self.time_horizon, action_dim or self.action_dim
        if horizon is None or dim is None:
            raise ValueError(f"{self.source} has no time_horizon or action_dim; give time_horizon and action_dim")
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
                f"not FAST tokens: shape {list(ids.shape)}, not in 0 to {self.vocab_size - 1}: {unknown[:8]}"
            )
        codes = [ord(c) for c in self._bpe.decode(ids.tolist(), skip_special_tokens=False)]
        if max(codes, default=0) >= SURROGATES:  # U+FFFD: bytes that are not UTF-8
            raise FASTError(f"the {len(ids)} tokens decode to no coefficients: not UTF-8")
        if len(codes) != np.prod(shape):
            raise FASTError(
                f"{len(ids)} tokens hold {len(codes)} coefficients; a chunk of {list(shape)} has {np.prod(shape)}"
            )
        coefficients = (np.array(codes) + self.min_token).reshape(shape)
        return _dct_matrix(shape[0]).T @ (coefficients / self.scale)

    def save(self, folder: str | Path, overwrite: bool = False) -> None:
        """Write the folder, whole or not at all, and set `source` to it.

        Includes `tokenizer_config.json`, which transformers needs to load the tokenizer. Raises FileExistsError if it
        exists, unless it is a FAST tokenizer's to `overwrite`.
        """
        files = {**self._files, "tokenizer_config.json": _TOKENIZER_CONFIG}
        with new_folder(as_path(folder), overwrite, **FOLDER) as temporary:
            for name, content in files.items():
                (temporary / name).write_bytes(content)
        self.source = str(folder)

    def reference(self) -> dict[str, str]:
        """The entry of a checkpoint's config; see `from_reference`. Raises ValueError before the tokenizer is saved."""
        if self.source is None:
            raise ValueError("this FAST tokenizer has not been saved, so it has no source to refer to; save it first")
        return {"kind": "fast", "source": self.source, "sha256": self.sha256}

    @classmethod
    def from_reference(cls, reference: dict[str, Any]) -> FASTTokenizer:
        """The tokenizer of a `reference()`. Raises ValueError if it is another tokenizer's, or the files changed."""
        if reference.get("kind") != "fast" or not isinstance(reference.get("source"), str):
            raise ValueError(f"not a reference to a FAST tokenizer: {reference}")
        tokenizer = cls(reference["source"])
        require_sha256(reference["source"], tokenizer.sha256, reference.get("sha256", "missing"))
        return tokenizer


_TOKENIZER_CONFIG = b'{"clean_up_tokenization_spaces": false, "tokenizer_class": "PreTrainedTokenizerFast"}\n'


def check_components(values: Mapping[str, Any]) -> None:
    """Raise ValueError for a tokenizer.json with other components than a FAST tokenizer's."""
    for name, allowed in COMPONENTS.items():
        part = values.get(name)
        found = part.get("type", "without a type") if isinstance(part, dict) else part
        if found not in allowed:
            raise ValueError(f"tokenizer.json: {name} is {found!r:.80}; of a FAST tokenizer it is {allowed[-1]}")
    bpe = values.get("model")
    vocabulary = bpe.get("vocab") if isinstance(bpe, dict) else None
    if not isinstance(bpe, dict) or not isinstance(vocabulary, dict) or not vocabulary:
        raise ValueError("tokenizer.json: model.vocab is no table of tokens")
    added = values.get("added_tokens") or []
    texts = [*vocabulary, *(str(token.get("content")) for token in added if isinstance(token, dict))]
    if (longest := max(map(len, texts))) > MAX_TOKEN:
        raise ValueError(f"tokenizer.json: a token has {longest} characters; at most {MAX_TOKEN} are read")


def _whole(config: Mapping[str, Any], name: str, low: int = 1, high: int = MAX_CHUNK) -> int:
    """A whole number of processor_config.json. Raises KeyError or ValueError."""
    value = config[name]
    if type(value) is not int or not low <= value <= high:
        raise ValueError(f"processor_config.json: {name} is {value!r:.80}; it must be a whole number, {low} to {high}")
    return value


@functools.lru_cache
def _dct_matrix(size: int) -> np.ndarray:
    """The orthonormal DCT-II of vectors [T] as a matrix [T, T]; its transpose is the inverse, the DCT-III.

    It differs from SciPy's FFT, which openpi uses, by float64's rounding: only exact ties are quantized differently.
    """
    frequency, time = np.arange(size)[:, None], np.arange(size)
    phase = (2 * time + 1) * frequency % (4 * size)  # reduced to a period, so that large ones lose no precision
    matrix = np.cos(np.pi / (2 * size) * phase) * np.sqrt(2 / size)
    matrix[0] = np.sqrt(1 / size)
    return matrix


def _quantize(actions: np.ndarray, scale: float) -> np.ndarray:
    """Rounded DCT-II coefficients int64 [T, A] of a chunk [T, A]. Raises ValueError for another shape or NaN."""
    actions = np.asarray(actions, np.float64)
    if actions.ndim != 2 or not actions.size or not np.isfinite(actions).all():
        raise ValueError(f"actions of shape {list(actions.shape)}; expected finite numbers [T, A]")
    return np.around(_dct_matrix(len(actions)) @ actions * scale).astype(np.int64)


def _characters(coefficients: np.ndarray, min_token: int) -> str:
    """Coefficients [T, A] as characters in row-major order. Raises ValueError for those without a character."""
    codes = coefficients.ravel() - min_token
    if codes.min() < 0 or codes.max() >= SURROGATES:
        raise ValueError(
            f"the actions' DCT coefficients go from {coefficients.min()} to {coefficients.max()}, but this tokenizer "
            f"starts at {min_token} and ends at {min_token + SURROGATES - 1}. Are the actions normalized with the "
            "stats that it was fitted with?"
        )
    return "".join(map(chr, codes.tolist()))
