"""What a dataset contains, whatever its path: a run goes on only with the data that it began with."""

from __future__ import annotations

import hashlib
from pathlib import Path

from pi0.datasets.registry import find_format
from pi0.fetch import fetch
from pi0.run_config import DataConfig
from pi0.storage import digest, list_files

META = "meta"  # of LeRobot: the lengths, tasks and statistics of all episodes are there; and of "arrayrecord"


def contents_of(config: DataConfig) -> str:
    """A hash of one dataset of a run, and of its files of subtasks or questions; the same after it was moved."""
    found = hashlib.blake2b(digest_size=16)
    if config.root and not config.questions:
        _add_folder(found, find_format(config.format).locate(config.root))
    for beside in (config.subtasks, config.questions):
        if beside:
            found.update(digest(fetch(beside), "md5").encode())
    return found.hexdigest()


def contents_of_folder(folder: Path) -> str:
    """A hash of the recordings in a folder.

    Of a dataset with a folder `meta`, of all that is in this; of any other, of the names and sizes of its files.
    """
    found = hashlib.blake2b(digest_size=16)
    _add_folder(found, folder)
    return found.hexdigest()


def _add_folder(found: hashlib.blake2b, folder: Path) -> None:
    meta = list_files(folder / META)
    for name, file in (meta or list_files(folder)).items():
        found.update(f"{name}\0{file.size}\0".encode())
        if meta:
            found.update(digest(file.path, "md5").encode())
