"""Read JSON, text and arrays of files that others wrote: within limits, with errors that name the file.

What a checkpoint, a dataset or a tokenizer contains is not trusted (docs/trust.md): it costs bounded memory and time to
find out that it is wrong. Limits are arguments, whose defaults are far above what real files need.
"""

from __future__ import annotations

import collections
import contextlib
import json
import math
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import numpy as np

from pi0.storage import requests

MAX_JSON = 16 << 20  # bytes; the largest that we know, the metadata of a checkpoint of 3 B parameters, has 0.4 MB
MAX_DEPTH = 32  # of nested objects and lists
MAX_EXPANSION = 64  # of stored arrays, beyond FREE_EXPANSION; weights hardly compress
FREE_EXPANSION = 1 << 30  # bytes
HEADER = 10_000  # bytes of an .npy header, as in NumPy
# what zipfile and NumPy raise for a damaged npz file
ZIP_ERRORS = (zipfile.BadZipFile, zlib.error, EOFError, OSError, NotImplementedError, RuntimeError, ValueError)


def read_bytes(file: Path, *, limit: int, error: type[ValueError] = ValueError) -> bytes:
    """The content of a regular file of at most `limit` bytes. Raises OSError, or `error` for any other file."""
    with requests(f"cannot read {file}"):
        require_regular(file, error)
        with file.open("rb") as stream:
            content = stream.read(limit + 1)
    if len(content) > limit:
        raise error(f"{file} has more than {limit:,} bytes, the most that is read of such a file")
    return content


@contextlib.contextmanager
def naming(file: str | Path) -> Iterator[None]:
    """Begin the message of an error that is raised inside with the name of the file, where it does not have it."""
    try:
        yield
    except (ValueError, OSError) as error:
        own = type(error).__module__ != "builtins" and "__init__" in vars(type(error))  # made from other arguments
        if str(file) in str(error) or own or len(error.args) != 1:
            raise
        raise type(error)(f"{file}: {error}") from error


def require_regular(file: Path, error: type[ValueError] = ValueError) -> None:
    """Raise `error` for a pipe or a device, which may have no end, and for a folder."""
    if file.exists() and not file.is_file():
        raise error(f"{file} is not a regular file")


def read_text(file: Path, *, limit: int = MAX_JSON, error: type[ValueError] = ValueError) -> str:
    """The text of a UTF-8 file. Raises OSError, or `error` for a file that is too large or not UTF-8."""
    try:
        return read_bytes(file, limit=limit, error=error).decode("utf-8")
    except UnicodeDecodeError as problem:
        raise error(f"{file} is not UTF-8 text: {problem}") from problem


def read_json(
    file: Path,
    *,
    expected: type[Any] = dict,
    limit: int = MAX_JSON,
    depth: int = MAX_DEPTH,
    error: type[ValueError] = ValueError,
) -> Any:
    """The value in a JSON file, of the type `expected`; see `parse_json`. Raises OSError or `error`."""
    text = read_text(file, limit=limit, error=error)
    return parse_json(text, str(file), expected=expected, limit=limit, depth=depth, error=error)


def parse_json(
    text: str | bytes,
    where: str,
    *,
    expected: type[Any] = dict,
    limit: int = MAX_JSON,
    depth: int = MAX_DEPTH,
    error: type[ValueError] = ValueError,
) -> Any:
    """The value of JSON text, of at most `limit` characters and `depth` nested objects and lists.

    `where` begins the message of `error`, which is raised for anything else, and for names that an object has twice.
    """
    if len(text) > limit:
        raise error(f"{where} has more than {limit:,} characters of JSON, the most that is read")
    try:
        value = json.loads(text, object_pairs_hook=_without_duplicates)
    except (ValueError, RecursionError) as problem:
        raise error(f"{where} is not JSON: {problem}") from problem
    level, found = [value], 0
    while level := [v for v in level if isinstance(v, dict | list)]:
        if (found := found + 1) > depth:
            raise error(f"{where} nests more than {depth} objects and lists, the most that is read")
        level = [child for v in level for child in (v.values() if isinstance(v, dict) else v)]
    if not isinstance(value, expected):
        raise error(f"{where} holds {type(value).__name__}; expected {'an object' if expected is dict else expected}")
    return value


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        counts = collections.Counter(name for name, _ in pairs)
        raise ValueError(f"duplicate entries {sorted(name for name, count in counts.items() if count > 1)[:5]}")
    return values


def require_stored(where: str, declared: int, stored: int, error: type[ValueError] = ValueError) -> None:
    """Raise `error` where arrays claim far more bytes than are stored of them."""
    if declared > FREE_EXPANSION + MAX_EXPANSION * stored:
        raise error(f"{where} declares arrays of {declared:,} bytes and stores {stored:,}; is it a decompression bomb?")


def read_npy_header(stream: IO[bytes], name: str) -> tuple[tuple[int, ...], bool, np.dtype]:
    """Shape, Fortran order and dtype of the .npy file that begins here. Raises ValueError for objects and records."""
    version = np.lib.format.read_magic(stream)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    try:
        shape, fortran_order, dtype = read(stream, max_header_size=HEADER)
    except Exception as error:  # NumPy reads it as a Python literal, which fails in many ways
        raise ValueError(f"{name} has no valid header: {type(error).__name__}: {str(error)[:100]}") from error
    plain = dtype.kind in "biufcSU" or dtype == np.dtype("V2")  # the latter is NumPy's encoding of bfloat16
    if not plain or dtype.shape or any(size < 0 for size in shape) or math.prod(shape) >= 2**60:
        raise ValueError(f"{name} holds {dtype} {list(shape)}; expected an array of numbers")
    return shape, fortran_order, dtype


def read_npz(file: Path, *, limit: int = FREE_EXPANSION, error: type[ValueError] = ValueError) -> dict[str, np.ndarray]:
    """All arrays, of any shape, of an npz file, of at most `limit` bytes together; nothing is unpickled.

    Raises OSError or `error`.
    """
    require_regular(file, error)
    try:
        with zipfile.ZipFile(file) as archive:
            sizes = {}
            for member in archive.infolist():
                with archive.open(member) as stream:
                    shape, _, dtype = read_npy_header(stream, member.filename)
                sizes[member.filename] = math.prod(shape) * dtype.itemsize
        if sum(sizes.values()) > limit:
            raise ValueError(f"arrays of {sum(sizes.values()):,} bytes; at most {limit:,} are read")
        with np.load(file, allow_pickle=False, max_header_size=HEADER) as arrays:
            return dict(arrays)
    except FileNotFoundError:
        raise
    except ZIP_ERRORS as problem:
        raise error(f"{file} is not an npz file, or is damaged: {problem}") from problem
