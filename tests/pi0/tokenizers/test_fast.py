"""FAST action tokens, and the texts of π0-FAST that hold them."""

from __future__ import annotations

import importlib
import json
import logging
import pickle
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from pi0.tokenizers.fast import FASTError, FASTTokenizer, _dct_matrix, _quantize
from pi0.tokenizers.prompts import FASTPromptTokenizer
from pi0.tokenizers.text import BUNDLED, TextTokenizer

scipy = pytest.importorskip("scipy")  # JAX depends on it; published tokenizers were fitted with it
importlib.import_module("scipy.fft")

T, A, SCALE = 6, 3, 10


def smooth_chunks(n: int, seed: int = 0, horizon: int = T) -> np.ndarray:
    """Random walks [n, T, A] that stay near [-1, 1]."""
    steps = np.random.default_rng(seed).normal(0, 0.3, (n, horizon, A))
    return np.tanh(np.cumsum(steps, axis=1))


def coefficients(chunk: np.ndarray) -> np.ndarray:
    return scipy.fft.dct(chunk, axis=0, norm="ortho")


@pytest.fixture(scope="module")
def fast() -> FASTTokenizer:
    return FASTTokenizer.fit(list(smooth_chunks(200)), SCALE, 300)


@pytest.fixture(scope="module")
def folder(fast: FASTTokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("fast") / "fitted"
    fast.save(path)
    return path


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer made by the steps of the public processor's `fit`, its raw alphabet and GPT-2 words included."""
    path = tmp_path_factory.mktemp("published")
    found = [np.around(coefficients(chunk) * SCALE).astype(int).ravel() for chunk in smooth_chunks(200)]
    low, high = min(f.min() for f in found), max(f.max() for f in found)
    bpe = tokenizers.ByteLevelBPETokenizer()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=512,
        min_frequency=2,
        special_tokens=[],
        initial_alphabet=[chr(i) for i in range(high - low + 1)],
        max_token_length=10000,
        show_progress=False,
    )
    bpe._tokenizer.train_from_iterator(["".join(map(chr, f - low)) for f in found], trainer=trainer)
    bpe.save(str(path / "tokenizer.json"))
    config = {"scale": SCALE, "vocab_size": 512, "min_token": int(low), "time_horizon": None, "action_dim": None}
    (path / "processor_config.json").write_text(json.dumps(config | {"processor_class": "UniversalActionProcessor"}))
    (path / "processing_action_tokenizer.py").write_text("raise SystemExit('remote code was run')")
    return path


def published_decode(folder: Path, ids: list[int]) -> np.ndarray:
    """What the public processor makes of token ids, [T, A]."""
    config = json.loads((folder / "processor_config.json").read_text())
    text = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json")).decode(ids)
    found = (np.array([ord(c) for c in text]) + config["min_token"]).reshape(T, A)
    return scipy.fft.idct(found / config["scale"], axis=0, norm="ortho")


@given(st.data())
def test_error_is_half_a_step_of_each_coefficient(data: st.DataObject) -> None:
    shape = data.draw(st.tuples(st.integers(1, 12), st.integers(1, 5)))
    numbers = st.floats(-3, 3, allow_subnormal=False)
    chunks = data.draw(st.lists(hnp.arrays(np.float64, shape, elements=numbers), min_size=1, max_size=4))
    scale = data.draw(st.floats(0.5, 200))
    tokenizer = FASTTokenizer.fit(chunks, scale, 280)
    for chunk in chunks:
        decoded, whole = tokenizer.decode(tokenizer.encode(chunk))
        assert whole and decoded.shape == shape
        # Rounding is off by half a step; the transforms by some units of float64's last place.
        assert np.abs(coefficients(decoded) - coefficients(chunk)).max() <= 0.5 / scale + 1e-12


@given(hnp.arrays(np.float64, (T, A), elements=st.floats(-1, 1)))
def test_chunks_it_was_not_fitted_on(fast: FASTTokenizer, chunk: np.ndarray) -> None:
    decoded, _ = fast.decode(fast.encode(chunk))
    assert np.abs(coefficients(decoded) - coefficients(chunk)).max() <= 0.5 / SCALE + 1e-12


def test_it_compresses(fast: FASTTokenizer) -> None:
    others = smooth_chunks(50, seed=1)
    assert np.mean([len(fast.encode(chunk)) for chunk in others]) < T * A


def test_same_chunks_same_bytes(fast: FASTTokenizer) -> None:
    assert FASTTokenizer.fit(list(smooth_chunks(200)), float(SCALE), 300).sha256 == fast.sha256
    assert FASTTokenizer.fit(list(smooth_chunks(201)), SCALE, 300).sha256 != fast.sha256


def test_chunks_of_several_lengths_leave_the_shape_open() -> None:
    short, long = smooth_chunks(5)[0], smooth_chunks(5, horizon=9)[0]
    tokenizer = FASTTokenizer.fit([short, long])
    assert (tokenizer.time_horizon, tokenizer.action_dim) == (None, None)
    assert tokenizer.decode(tokenizer.encode(long), 9, A)[0].shape == (9, A)
    with pytest.raises(ValueError, match="give time_horizon and action_dim"):
        tokenizer.decode(tokenizer.encode(long))


def test_a_saved_one_gives_the_same_ids(fast: FASTTokenizer, folder: Path) -> None:
    loaded = FASTTokenizer(folder)
    theirs = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    assert (loaded.sha256, loaded.scale, loaded.min_token) == (fast.sha256, fast.scale, fast.min_token)
    assert (loaded.time_horizon, loaded.action_dim, loaded.vocab_size) == (T, A, 300)
    for chunk in smooth_chunks(20, seed=2):
        codes = np.around(coefficients(chunk) * SCALE).astype(int).ravel() - fast.min_token
        ids = fast.encode(chunk)
        assert loaded.encode(chunk) == ids == theirs.encode("".join(map(chr, codes))).ids


def test_interchange_with_the_published_code(folder: Path, published: Path) -> None:
    for path in (folder, published):
        tokenizer = FASTTokenizer(path)
        for chunk in smooth_chunks(20):
            ids = tokenizer.encode(chunk)
            # SciPy's transform adds in another order than a matrix product: a few of float64's last places.
            np.testing.assert_allclose(tokenizer.decode(ids, T, A)[0], published_decode(path, ids), rtol=0, atol=1e-15)


@pytest.mark.parametrize("horizon", [1, 2, 5, 10, 15, 16, 32, 50])
def test_the_same_tokens_and_actions_as_with_scipy(horizon: int) -> None:
    """Of random chunks, and of those that end at the normalized limits, as commands do."""
    tokenizer = FASTTokenizer("bundled://fast_tokenizer")
    rng = np.random.default_rng(horizon)
    chunks = np.clip(rng.normal(size=(500, 1, 7)) + rng.normal(size=(500, horizon, 7)).cumsum(1) / 5, -1, 1)
    for chunk in [*chunks, np.sign(chunks[0]), np.zeros_like(chunks[0])]:
        rounded = np.around(coefficients(chunk) * tokenizer.scale)
        np.testing.assert_array_equal(_quantize(chunk, tokenizer.scale), rounded)
        expected = scipy.fft.idct(rounded / tokenizer.scale, axis=0, norm="ortho")
        np.testing.assert_allclose(_dct_matrix(horizon).T @ rounded / tokenizer.scale, expected, rtol=0, atol=1e-14)


def test_a_published_vocabulary_without_the_character_is_refused(published: Path) -> None:
    """`tokenizers` drops what it does not know; the published code would train on the wrong actions."""
    tokenizer = FASTTokenizer(published)
    far = np.zeros((T, A))
    far[:, 0] = 40.0  # a first coefficient near 980: two bytes, the first of which occurs nowhere in the data
    text = tokenizers.Tokenizer.from_file(str(published / "tokenizer.json"))
    assert len(text.decode(text.encode(chr(980 - tokenizer.min_token)).ids)) == 0
    with pytest.raises(ValueError, match=r"vocabulary of .*published.* lacks"):
        tokenizer.encode(far)


@pytest.mark.parametrize(
    ("actions", "message"),
    [
        (np.full((T, A), -50.0), r"coefficients go from -1225 to 0, but this tokenizer starts at -\d+"),
        (np.full((T, A), 1e5), "ends at"),
        (np.full((T, A), np.nan), r"shape \[6, 3\]; expected finite"),
        (np.zeros(T), r"shape \[6\]"),
        (np.zeros((0, A)), r"shape \[0, 3\]"),
    ],
)
def test_actions_that_cannot_be_said(fast: FASTTokenizer, actions: np.ndarray, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fast.encode(actions)


def wrong_ids(fast: FASTTokenizer) -> dict[str, tuple[list[int], str]]:
    ids = fast.encode(smooth_chunks(1)[0])
    lone = fast._bpe.token_to_id("Ä")  # a byte that begins a character of two
    return {
        "none": ([], r"0 tokens hold 0 coefficients; a chunk of \[6, 3\] has 18"),
        "cut": (ids[:-1], "coefficients; a chunk of"),
        "twice": (ids * 2, "hold 36 coefficients"),
        "beyond": ([*ids, 300], r"not in 0 to 299: \[300\]"),
        "negative": ([*ids, -1], r"not in 0 to 299: \[-1\]"),
        "no character": ([lone, lone], "no coefficients"),
    }


@pytest.mark.parametrize("case", ["none", "cut", "twice", "beyond", "negative", "no character"])
def test_ids_that_are_no_chunk(fast: FASTTokenizer, case: str) -> None:
    ids, message = wrong_ids(fast)[case]
    with pytest.raises(FASTError, match=message):
        fast.decode(ids)
    zeros, whole = fast.decode(ids, fallback=True)
    assert whole is False and zeros.shape == (T, A) and not zeros.any()


@pytest.mark.parametrize(
    ("chunks", "scale", "vocab_size", "message"),
    [
        ([], 10, 300, "0 chunks"),
        ([np.zeros((2, 2))], 0, 300, "scale 0"),
        ([np.zeros((2, 2))], 10, 255, "at least 256 tokens"),
        ([np.full((2, 2), np.inf)], 10, 300, "finite"),
    ],
)
def test_nothing_to_fit(chunks: list[np.ndarray], scale: float, vocab_size: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FASTTokenizer.fit(chunks, scale, vocab_size)


def test_folders(fast: FASTTokenizer, tmp_path: Path) -> None:
    folder = tmp_path / "fast"
    with pytest.raises(FileNotFoundError, match="no such file or folder"):
        FASTTokenizer(folder)
    fast.save(folder)
    with pytest.raises(FileExistsError, match="pass --overwrite"):
        fast.save(folder)
    fast.save(folder, overwrite=True)
    (folder / "thesis.tex").touch()
    with pytest.raises(FileExistsError, match="other files"):
        fast.save(folder, overwrite=True)
    (folder / "thesis.tex").unlink()
    assert [f.name for f in tmp_path.iterdir()] == ["fast"]
    config = json.loads((folder / "processor_config.json").read_text())
    for change, message in [({"scale": 0}, "scale 0"), ({"vocab_size": 100}, "no more than vocab_size 100")]:
        (folder / "processor_config.json").write_text(json.dumps(config | change))
        with pytest.raises(ValueError, match=message):
            FASTTokenizer(folder)
    (folder / "processor_config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"is not a FAST tokenizer: KeyError: 'scale'"):
        FASTTokenizer(folder)
    (folder / "tokenizer.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"no tokenizer\.json"):
        FASTTokenizer(folder)


def test_reference(folder: Path, fast: FASTTokenizer) -> None:
    tokenizer = FASTTokenizer(folder)
    reference = tokenizer.reference()
    assert reference == {"kind": "fast", "source": str(folder), "sha256": fast.sha256}
    assert FASTTokenizer.from_reference(reference).sha256 == fast.sha256
    with pytest.raises(ValueError, match="is not the tokenizer that was used"):
        FASTTokenizer.from_reference(reference | {"sha256": "00"})
    with pytest.raises(ValueError, match="not a reference to a FAST tokenizer"):
        FASTTokenizer.from_reference(reference | {"kind": "sentencepiece"})
    with pytest.raises(ValueError, match="save it first"):
        FASTTokenizer.fit(list(smooth_chunks(2))).reference()


def test_pickles_for_loader_processes(fast: FASTTokenizer) -> None:
    chunk = smooth_chunks(1)[0]
    assert pickle.loads(pickle.dumps(fast)).encode(chunk) == fast.encode(chunk)


V = 512 + 128 + 300  # text, the ids kept free, FAST tokens


@pytest.fixture
def prompts(fast: FASTTokenizer) -> FASTPromptTokenizer:
    return FASTPromptTokenizer(TextTokenizer(BUNDLED), fast, V)


STATE, CHUNK = np.array([-1.0, 0.0, 1.0]), smooth_chunks(1)[0]


def test_text_of_pi0_fast(prompts: FASTPromptTokenizer, fast: FASTTokenizer) -> None:
    text = prompts.text
    prefix = [text.bos_id, *text.encode("Task: open the drawer, State: 0 128 255;\n")]
    answer = [*text.encode("Action: "), *(V - 129 - k for k in fast.encode(CHUNK)), *text.encode("|"), text.eos_id]
    row = prompts.encode_prompt(" Open_The drawer ", 80, STATE, CHUNK)
    length, rest = len(prefix) + len(answer), 80 - len(prefix) - len(answer)
    assert row["tokenized_prompt"].tolist() == prefix + answer + [0] * rest
    assert row["tokenized_prompt_mask"].tolist() == [True] * length + [False] * rest
    assert row["token_ar_mask"].tolist() == [0] * len(prefix) + [1] * len(answer) + [0] * rest
    assert row["token_loss_mask"].tolist() == [False] * len(prefix) + [True] * len(answer) + [False] * rest
    assert {k: v.dtype.name for k, v in row.items()} == {
        "tokenized_prompt": "int32",
        "tokenized_prompt_mask": "bool",
        "token_ar_mask": "int32",
        "token_loss_mask": "bool",
    }


def test_without_actions_there_is_nothing_to_predict(prompts: FASTPromptTokenizer) -> None:
    row, trained = (prompts.encode_prompt("go", 80, STATE, a) for a in (None, CHUNK))
    n = int(row["tokenized_prompt_mask"].sum())
    assert row["tokenized_prompt"][:n].tolist() == trained["tokenized_prompt"][:n].tolist()
    assert n == 80 - int(trained["token_loss_mask"].sum()) - int((~trained["tokenized_prompt_mask"]).sum())
    assert not row["token_ar_mask"].any() and not row["token_loss_mask"].any()


def test_cut_texts_are_counted_and_said_once(fast: FASTTokenizer, caplog: pytest.LogCaptureFixture) -> None:
    prompts = FASTPromptTokenizer(TextTokenizer(BUNDLED), fast, V)
    whole = prompts.encode_prompt("go", 80, STATE, CHUNK)
    with caplog.at_level(logging.WARNING):
        prompts.encode_prompt("go", 30, STATE, CHUNK)
        cut = prompts.encode_prompt("go", 30, STATE, CHUNK)
    for key, values in whole.items():
        assert cut[key].tolist() == values[:30].tolist()
    assert cut["token_loss_mask"].any() and cut["tokenized_prompt_mask"].all()
    assert (prompts.text.encoded, prompts.text.truncated) == (3, 2)
    assert len(caplog.messages) == 1 and "was cut to 30; raise max_token_len" in caplog.messages[0]


def generated(prompts: FASTPromptTokenizer) -> list[int]:
    row = prompts.encode_prompt("go", 80, STATE, CHUNK)
    return row["tokenized_prompt"][row["token_loss_mask"]].tolist()


def test_extract_actions_inverts_encode(prompts: FASTPromptTokenizer, fast: FASTTokenizer) -> None:
    answer = generated(prompts)
    expected = fast.decode(fast.encode(CHUNK))[0]
    stray = [9, *answer[:4], 9, *answer[4:-2], 7, *answer[-2:]]  # tokens of text, which openpi skips
    again = [*answer[:-2], *answer]  # openpi cuts at a second "Action: "
    arrays = (np.array(answer, np.int32),)
    for tokens in (answer, answer[:-1], answer[:-2], [*answer, 7, 7], [*answer, *answer], stray, again, *arrays):
        actions, whole = prompts.extract_actions(tokens, T, A)
        assert whole
        np.testing.assert_array_equal(actions, expected)


def test_generated_tokens_that_are_no_actions(prompts: FASTPromptTokenizer) -> None:
    answer, eos = generated(prompts), prompts.text.eos_id
    for tokens, message in [
        ([], "no 'Action: '"),
        ([eos], "no 'Action: '"),
        (answer[1:], "no 'Action: '"),
        ([*answer[:4], eos, *answer[4:]], "a chunk of"),
        ([*answer[:4], 9, *answer[5:]], "a chunk of"),
        ([*answer[:5], *answer], "a chunk of"),  # up to the second "Action: "
        ([*answer[:4], V - 1, *answer[4:]], r"not in 0 to 299: \[-128\]"),
    ]:
        with pytest.raises(FASTError, match=message):
            prompts.extract_actions(tokens, T, A)
        zeros, whole = prompts.extract_actions(tokens, T, A, fallback=True)
        assert whole is False and zeros.shape == (T, A) and not zeros.any()


@pytest.mark.parametrize("vocab_size", [None, 400, 512, V - 1])
def test_a_vocabulary_without_room_is_refused(fast: FASTTokenizer, vocab_size: int | None) -> None:
    with pytest.raises(ValueError, match=re.escape(f"vocab_size must be at least {V}")):
        FASTPromptTokenizer(TextTokenizer(BUNDLED), fast, vocab_size)


@pytest.mark.network
def test_published() -> None:
    """The released tokenizer and PaliGemma's text: the ids at the end of the vocabulary, but for 128."""
    fast = FASTTokenizer()
    assert (fast.scale, fast.min_token, fast.vocab_size) == (10, -354, 2048)
    prompts = FASTPromptTokenizer(TextTokenizer(), fast)
    answer = generated(prompts)
    assert max(answer) <= 257152 - 129
    np.testing.assert_array_equal(prompts.extract_actions(answer, T, A)[0], fast.decode(fast.encode(CHUNK), T, A)[0])


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            {"normalizer": {"type": "Replace", "pattern": {"String": " "}, "content": "x" * 999}},
            "normalizer is 'Replace'",
        ),
        ({"pre_tokenizer": {"type": "Split", "pattern": {"Regex": "(a+)+$"}}}, "pre_tokenizer is 'Split'"),
        ({"decoder": {"type": "Sequence", "decoders": []}}, "decoder is 'Sequence'"),
        ({"post_processor": {"type": "TemplateProcessing"}}, "post_processor is 'TemplateProcessing'"),
        ({"padding": {"strategy": {"Fixed": 2**40}}}, "padding is"),
        ({"truncation": {"max_length": 3}}, "truncation is"),
        ({"model": {"type": "WordPiece", "vocab": {}}}, "model is 'WordPiece'"),
        ({"model": {"type": "BPE", "vocab": {"x" * 10_001: 0}, "merges": []}}, "a token has 10001 characters"),
        ({"added_tokens": [{"content": "y" * 10_001, "id": 1}]}, "a token has 10001 characters"),
        ({"model": None}, "model is None"),
    ],
)
def test_components_that_may_take_forever(change: dict, said: str, folder: Path, tmp_path: Path) -> None:
    """A file of a stranger may have regular expressions and normalizers that never end; FAST's has none."""
    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    values = json.loads((copy / "tokenizer.json").read_text())
    (copy / "tokenizer.json").write_text(json.dumps(values | change))
    with pytest.raises(ValueError, match=rf"copy is not a FAST tokenizer: .*tokenizer\.json: {said}"):
        FASTTokenizer(copy)


@pytest.mark.parametrize(
    "change", [{"time_horizon": 2**40}, {"action_dim": -1}, {"scale": 1e999}, {"min_token": 2**60}, {"vocab_size": "9"}]
)
def test_numbers_of_strangers(change: dict, folder: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    values = json.loads((copy / "processor_config.json").read_text())
    (copy / "processor_config.json").write_text(json.dumps(values | change))
    with pytest.raises(ValueError, match=rf"copy is not a FAST tokenizer: .*{next(iter(change))}"):
        FASTTokenizer(copy)
