"""JSON and JSON lines in files of a dataset, within the limits of `pi0.reading`."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pi0.reading
from pi0.datasets.errors import DataError
from pi0.reading import MAX_JSON


def read_jsonl(file: Path) -> Iterator[tuple[int, Any]]:
    """The values in a JSONL file with their line numbers from 1 on. Raises DataError."""
    if not file.exists():
        raise DataError("the file is missing", file)
    pi0.reading.require_regular(file, DataError)
    with file.open("rb") as stream:  # split at \n alone: text may have other line separators
        for line, text in enumerate(iter(lambda: stream.readline(MAX_JSON + 1), b""), start=1):
            yield line, parse_json(text, file, f"line {line}")


def parse_json(text: bytes, file: Path, where: str) -> Any:
    """The value of UTF-8 JSON, of a file or a line. Raises DataError, also for half a surrogate pair, which is no text.

    The limits are those of `pi0.reading`.
    """
    try:
        value = pi0.reading.parse_json(text.decode("utf-8"), where, expected=object)
        if b"\\ud" in text.lower():
            json.dumps(value, ensure_ascii=False).encode("utf-8")
        return value
    except UnicodeError as error:
        raise DataError(f"{where} is not UTF-8: {error}", file) from error
    except ValueError as error:
        raise DataError(str(error), file) from error
