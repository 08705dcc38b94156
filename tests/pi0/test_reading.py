"""Files of others cost bounded memory and time to refuse, and errors name them."""

from __future__ import annotations

import io
import json
import os
import re
import zipfile
from pathlib import Path

import numpy as np
import pytest

from pi0.config import ConfigError
from pi0.reading import naming, parse_json, read_json, read_npz, require_stored
from pi0.variants import get_variant, read_variant


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[1]", "holds list; expected an object"),
        ('{"a": ' + "[" * 40 + "]" * 40 + "}", "nests more than 32"),
        ('{"a": ' + "[" * 100_000 + "]" * 100_000 + "}", "is not JSON: maximum recursion depth"),
        ('{"a": 1, "a": 2}', r"duplicate entries \['a'\]"),
        ('{"a": ' + "9" * 5000 + "}", "is not JSON: Exceeds the limit"),
        ('{"a": "' + "x" * 200 + '"}', "has more than 100 bytes"),
        ("", "is not JSON"),
    ],
)
def test_json_that_is_refused(text: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(ConfigError, match=rf"x\.json.*{said}"):
        read_json(tmp_path / "x.json", limit=100 if "xxx" in text else 1 << 20, error=ConfigError)


def test_limits_can_be_raised() -> None:
    deep = "[" * 40 + "]" * 40
    assert parse_json(deep, "it", expected=list, depth=40)
    with pytest.raises(ValueError, match="it nests more than 39"):
        parse_json(deep, "it", expected=list, depth=39)


def test_what_is_no_regular_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "zero").symlink_to("/dev/zero")
    for name in ("pipe", "zero"):
        with pytest.raises(ValueError, match=f"{name} is not a regular file"):
            read_json(tmp_path / name)
    (tmp_path / "latin").write_bytes(b'{"a": "\xe9"}')
    with pytest.raises(ValueError, match="latin is not UTF-8 text"):
        read_json(tmp_path / "latin")


def test_configs_of_other_programs_name_their_file(tmp_path: Path) -> None:
    config = get_variant("tiny").to_dict()
    for field, value in {"max_token_len": 2**40, "action_horizon": 2**40, "image_resolution": [2**40, 14]}.items():
        (tmp_path / "m.json").write_text(json.dumps(config | {field: value}))
        with pytest.raises(ConfigError, match=rf"m\.json: (model\.)?{field} "):
            read_variant(str(tmp_path / "m.json"))
    runtime = config | {"runtime": config["runtime"] | {"num_steps": 2**40}}
    (tmp_path / "m.json").write_text(json.dumps(runtime))
    with pytest.raises(ConfigError, match=r"num_steps is 1099511627776; at most"):
        read_variant(str(tmp_path / "m.json"))


def archive(file: Path, header: bytes, content: bytes = b"") -> Path:
    magic = b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little")
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as zipped:
        zipped.writestr("a.npy", magic + header + content)
    return file


@pytest.mark.parametrize(
    ("header", "said"),
    [
        (b"{'descr': '<f4', 'fortran_order': False, 'shape': (1099511627776,)}", "at most 1,073,741,824 are read"),
        (b"{'descr': '<f4', 'fortran_order': False, 'shape': (-1,)}", "expected an array of numbers"),
        (b"{'descr': '|O', 'fortran_order': False, 'shape': (1,)}", "expected an array of numbers"),
        (b"(" * 5000, "no valid header"),
        (b"{'descr': '<f4', 'fortran_order': False, 'shape': (9,)*999999999}", "is damaged"),
    ],
)
def test_arrays_that_are_refused(header: bytes, said: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=rf"a\.npz.*({said})"):
        read_npz(archive(tmp_path / "a.npz", header))


def test_arrays(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", a=np.arange(3), b=np.ones((2, 2), np.float16))
    read = read_npz(tmp_path / "a.npz")
    assert read["a"].tolist() == [0, 1, 2] and read["b"].dtype == np.float16
    file = io.BytesIO()
    np.savez(file, a=np.array([{"code": 1}], object))
    (tmp_path / "o.npz").write_bytes(file.getvalue())
    with pytest.raises(ValueError, match=r"o\.npz"):
        read_npz(tmp_path / "o.npz")


def test_more_declared_than_stored() -> None:
    require_stored("x", 1 << 30, 0)
    with pytest.raises(ConfigError, match="x declares arrays of 2,147,483,648 bytes and stores 10"):
        require_stored("x", 2 << 30, 10, ConfigError)


def test_errors_get_the_name_of_their_file() -> None:
    with pytest.raises(ConfigError, match=r"^f\.json: no field"), naming("f.json"):
        raise ConfigError("no field")
    with pytest.raises(ConfigError, match=r"^f\.json lacks"), naming("f.json"):
        raise ConfigError("f.json lacks")


def test_nothing_is_unpickled() -> None:
    """No product file can run code of a file: by name, as there is no use for any of these."""
    root = Path(__file__).parents[2]
    found = [
        f"{file.relative_to(root)}: {match[0]}"
        for package in ("pi0", "convert", "pi0_jax", "pi0_torch", "pi0_eval", "configs")
        for file in (root / package).rglob("*.py")
        for match in re.finditer(
            r"\b(pickle|cPickle|dill|joblib|shelve|marshal)\b(?=\.|$| import)|allow_pickle=True|\btorch\.load\(|"
            r"trust_remote_code=True|\beval\(|\bexec\(|deserialize_and_load|yaml\.load",
            file.read_text(encoding="utf-8"),
            re.M,
        )
    ]
    assert not found
