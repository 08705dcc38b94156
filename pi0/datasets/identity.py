"""What a dataset contains, whatever its path: a run goes on only with the data that it began with."""

from __future__ import annotations

import hashlib
from pathlib import Path

from pi0.fetch import fetch
from pi0.run_config import DataConfig
from pi0.storage import list_files

META = "meta"  # of LeRobot: the lengths, tasks and statistics of all episodes are there


def contents_of(config: DataConfig) -> str:
    """A hash of one dataset of a run, and of its files of subtasks or questions; the same after it was moved.

    Of a dataset with a folder `meta`, of all that is in this; of any other, of the names and sizes of its files.
    """
    digest = hashlib.blake2b(digest_size=16)
    if config.root and not config.questions:
        folder = fetch(config.root)
        meta = list_files(folder / META)
        for name, file in (meta or list_files(folder)).items():
            digest.update(f"{name}\0{file.size}\0".encode())
            if meta:
                digest.update(_digest(file.path).encode())
    for beside in (config.subtasks, config.questions):
        if beside:
            digest.update(_digest(fetch(beside)).encode())
    return digest.hexdigest()


def _digest(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "md5").hexdigest()
