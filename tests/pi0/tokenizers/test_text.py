from __future__ import annotations

import hashlib
import logging
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
from hypothesis import given
from hypothesis import strategies as st

from pi0.fetch import fetch
from pi0.sample import make_tokenizer
from pi0.tokenizers.text import BUNDLED, PALIGEMMA, TextTokenizer, state_bins


@pytest.fixture(scope="module")
def tokenizer() -> TextTokenizer:
    return TextTokenizer(BUNDLED)


def text_of(tokenizer: TextTokenizer, prompt: tuple[np.ndarray, np.ndarray]) -> str:
    ids, mask = prompt
    return tokenizer.decode(ids[mask])


def test_special_ids_are_paligemmas(tokenizer: TextTokenizer) -> None:
    assert (tokenizer.pad_id, tokenizer.eos_id, tokenizer.bos_id) == (0, 1, 2)
    assert tokenizer.vocab_size == 512
    assert tokenizer.sha256 == hashlib.sha256(make_tokenizer.MODEL.read_bytes()).hexdigest()


def test_the_script_makes_the_bundled_model() -> None:
    made = sentencepiece.SentencePieceProcessor(model_proto=make_tokenizer.train())
    bundled = sentencepiece.SentencePieceProcessor(model_file=str(make_tokenizer.MODEL))
    pieces = [[(m.id_to_piece(i), m.get_score(i)) for i in range(m.vocab_size())] for m in (made, bundled)]
    assert pieces[0] == pieces[1]


@given(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\u2581")))
def test_decode_inverts_encode(tokenizer: TextTokenizer, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text, add_bos=True)) == text


def test_known_sentences_are_short_and_digits_apart(tokenizer: TextTokenizer) -> None:
    assert len(tokenizer.encode("open the drawer")) == 3
    assert len(tokenizer.encode("255")) == 3
    assert len(tokenizer.encode("\n")) == 1


def test_pi0_prompt(tokenizer: TextTokenizer) -> None:
    ids, mask = tokenizer.encode_prompt(" open_the\ndrawer \n", 12)
    expected = [tokenizer.bos_id, *tokenizer.encode("open the drawer"), *tokenizer.encode("\n")]
    assert ids.dtype == np.int32 and mask.dtype == bool
    assert ids.tolist() == expected + [0] * (12 - len(expected))
    assert mask.tolist() == [True] * len(expected) + [False] * (12 - len(expected))


def test_pi05_prompt(tokenizer: TextTokenizer) -> None:
    state = np.array([-1.0, 0.0, 1.0, -1.5], np.float32)
    ids, mask = tokenizer.encode_prompt("open_the drawer", 64, state)
    text = "Task: open the drawer, State: 0 128 255 -1;\nAction: "
    assert ids[mask].tolist() == [tokenizer.bos_id, *tokenizer.encode(text)]
    assert text_of(tokenizer, (ids, mask)) == text


def test_empty_instruction(tokenizer: TextTokenizer) -> None:
    ids, mask = tokenizer.encode_prompt("", 4)
    assert ids[mask].tolist() == [tokenizer.bos_id, *tokenizer.encode("\n")]


@pytest.mark.parametrize(
    ("value", "bin"), [(-1, 0), (-0.9921, 1), (-1e-7, 127), (0, 128), (0.9999, 255), (9, 255), (-9, -1)]
)
def test_state_bins(value: float, bin: int) -> None:
    assert state_bins(np.array([value], np.float32)) == [bin]


@pytest.mark.parametrize(("state", "message"), [([[0.0]], r"shape \[1, 1\]"), ([0.0, np.nan], r"NaN.*\[1\]")])
def test_bad_state(tokenizer: TextTokenizer, state: list[float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tokenizer.encode_prompt("go", 32, np.array(state))


def test_truncation_is_counted_and_said_once(caplog: pytest.LogCaptureFixture) -> None:
    tokenizer = TextTokenizer(BUNDLED)
    full = [tokenizer.bos_id, *tokenizer.encode("open the drawer"), *tokenizer.encode("\n")]
    with caplog.at_level(logging.WARNING):
        ids, mask = tokenizer.encode_prompt("open the drawer", 3)
        tokenizer.encode_prompt("open the drawer", 3)
        tokenizer.encode_prompt("open the drawer", len(full))
    assert ids.tolist() == full[:3] and mask.all()
    assert (tokenizer.encoded, tokenizer.truncated) == (3, 2)
    assert len(caplog.messages) == 1
    assert f"{len(full)} tokens was cut to 3; raise max_token_len" in caplog.messages[0]


def test_reference(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.model"
    shutil.copy(make_tokenizer.MODEL, path)
    reference = TextTokenizer(path).reference()
    assert reference == {
        "kind": "sentencepiece",
        "source": str(path),
        "sha256": TextTokenizer(BUNDLED).sha256,
    }
    again = TextTokenizer.from_reference(reference)
    assert again.encode("open the drawer") == TextTokenizer(BUNDLED).encode("open the drawer")

    with pytest.raises(ValueError, match=r"is not the tokenizer that was used.*expected 00"):
        TextTokenizer.from_reference(reference | {"sha256": "00"})
    with pytest.raises(ValueError, match="not a reference to a SentencePiece tokenizer"):
        TextTokenizer.from_reference({"kind": "other"})
    path.unlink()
    with pytest.raises(FileNotFoundError, match=r"tokenizer\.model"):
        TextTokenizer.from_reference(reference)


@pytest.mark.parametrize("content", [b"", b"{}", b"not a model" * 100])
def test_not_a_sentencepiece_file(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"tokenizer\.json is not a SentencePiece model"):
        TextTokenizer(path)


def test_pickles_for_loader_processes(tokenizer: TextTokenizer) -> None:
    copy = pickle.loads(pickle.dumps(tokenizer))
    assert copy.encode("open the drawer") == tokenizer.encode("open the drawer")


@pytest.mark.network
def test_paligemma() -> None:
    """The ids that openpi feeds: bos, "pick up the cup", and the newline, which PaliGemma has as 108."""
    tokenizer = TextTokenizer(PALIGEMMA)
    assert (tokenizer.vocab_size, tokenizer.pad_id, tokenizer.eos_id, tokenizer.bos_id) == (257152, 0, 1, 2)
    ids, mask = tokenizer.encode_prompt("pick up the cup", 48)
    assert ids[mask][0] == 2 and ids[mask][-1] == 108
    assert text_of(tokenizer, (ids, mask)) == "pick up the cup\n"


def field(number: int, content: bytes) -> bytes:
    """A length-delimited field of a protocol buffer."""
    size, out = len(content), bytearray([number << 3 | 2])
    while size > 127:
        out.append(size & 127 | 128)
        size >>= 7
    return bytes([*out, size]) + content


GROWING = (1024).to_bytes(4, "little") + bytes(1024) + b"x" * 100_000 + b"\0"


@pytest.mark.parametrize(
    ("extra", "said"),
    [
        (field(3, field(2, GROWING)), "its normalizer makes more than 256 bytes of one character"),
        (field(5, field(2, GROWING)), "its normalizer makes more than 256 bytes"),
        (field(1, field(1, b"y" * 1001)), "piece 512 has more than 1000 bytes"),
        (b"\x0a\xff", "truncated|index out of range"),
        (b"\x0f", "unknown wire type 7"),
    ],
)
def test_models_that_take_unbounded_memory(extra: bytes, said: str, tmp_path) -> None:
    file = tmp_path / "tokenizer.model"
    file.write_bytes(fetch(BUNDLED).read_bytes() + extra)
    with pytest.raises(ValueError, match=rf"tokenizer\.model is not a SentencePiece model .*{said}"):
        TextTokenizer(file)


def test_what_is_no_model(tmp_path) -> None:
    (tmp_path / "zero").symlink_to("/dev/zero")
    with pytest.raises(ValueError, match="zero is not a regular file"):
        TextTokenizer(tmp_path / "zero")
    (tmp_path / "large").write_bytes(bytes(64 << 20) + b"x")
    with pytest.raises(ValueError, match="large has more than 67,108,864 bytes"):
        TextTokenizer(tmp_path / "large")
