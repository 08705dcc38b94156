"""Checksums of a checkpoint's files, by which changed, missing and foreign ones are found.

A training run signs every file of a checkpoint, `pi0-convert` the sidecar files of what it wrote: config, norm stats
and tokenizers. Opening a checkpoint verifies its sidecar files; resuming a run verifies all files.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

from convert.tensors import CheckpointError
from pi0.assets import CHECKSUMS
from pi0.reading import read_json
from pi0.storage import File, below, delete, digest, is_bucket, list_files, requests, write_text

MD5 = "md5:"  # begins an MD5 in the table; others are BLAKE2b
WEIGHTS = ("params", "train_state")  # folders of arrays; all other files are sidecars, but for weights by suffix


def is_sidecar(name: str) -> bool:
    """Whether a file of a checkpoint, by its name relative to the folder, is not one of its weights."""
    return name.split("/")[0] not in WEIGHTS and not name.endswith(".safetensors")


def sign(folder: Path, chosen: Callable[[str], bool] = lambda name: True) -> None:
    """Write `checksums.json` of a complete checkpoint's files, of those whose relative name is `chosen`."""
    temporary = folder / f".{CHECKSUMS}"  # without `write_text`, which makes the folder where it is missing
    try:
        table = {name: _signature(file) for name, file in _files(folder).items() if chosen(name)}
        text = json.dumps(table, indent=2)
        if is_bucket(folder):
            write_text(folder / CHECKSUMS, text)
            if len(list_files(folder)) == 1:  # the checkpoint was deleted meanwhile
                delete(folder / CHECKSUMS)
            return
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, folder / CHECKSUMS)
    except FileNotFoundError:  # the checkpoint was deleted meanwhile, in favour of a newer one
        return


def read_checksums(folder: Path) -> dict[str, str] | None:
    """The table in `checksums.json`, or None without the file. Raises CheckpointError for anything else in it."""
    file = folder / CHECKSUMS
    with requests(f"cannot read {file}"):
        if not file.exists():
            return None
    table = read_json(below(folder, CHECKSUMS), error=CheckpointError)
    if not table or not all(isinstance(digest, str) for digest in table.values()):
        raise CheckpointError(f"{file} is no table of file names and checksums; was it emptied?")
    return table


def find_changes(
    folder: Path, expected: dict[str, str], chosen: Callable[[str], bool] = lambda name: True
) -> list[str]:
    """What is wrong with the `chosen` files, by name: changed, missing, and weights that the table lacks."""
    found = {name: file for name, file in _files(folder).items() if chosen(name)}
    problems = [f"{name} is missing" for name in sorted(expected) if chosen(name) and name not in found]
    problems += [
        f"{n} is not what was written" for n, f in found.items() if n in expected and not _is_signed(f, expected[n])
    ]
    # sidecars that are not listed are old, or the user's own; weights are written together with the table
    unsigned = [name for name in found if name not in expected and name.split("/")[0] in WEIGHTS]
    return problems + [f"{name} is not listed in {CHECKSUMS}" for name in unsigned]


def verify_sidecars(folder: Path) -> None:
    """Raise CheckpointError where a sidecar file is not the one that was written with the checkpoint."""
    expected = read_checksums(folder)
    if expected is not None and (problems := find_changes(folder, expected, is_sidecar)):
        raise CheckpointError(
            f"{folder}: {problems[0]} (by {CHECKSUMS}). Restore it; if you changed it yourself, remove its line there"
        )


def _files(folder: Path) -> dict[str, File]:
    return {name: file for name, file in list_files(folder).items() if CHECKSUMS not in file.path.name}


def _signature(file: File) -> str:
    """The checksum to sign a file by: the MD5 that its bucket keeps of it, unread, or else BLAKE2b."""
    return digest(file.path, "blake2b") if file.md5 is None else MD5 + file.md5


def _is_signed(file: File, signature: str) -> bool:
    if not signature.startswith(MD5):
        return digest(file.path, "blake2b") == signature
    return (file.md5 or digest(file.path, "md5")) == signature.removeprefix(MD5)
