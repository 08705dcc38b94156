"""Paths that are written to: below their root, whole or not at all."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath


def below(root: Path, name: str) -> Path:
    """The path `name` below `root`. Raises ValueError for a name that leads elsewhere: absolute, or with `..` in it."""
    parts = PurePosixPath(name).parts
    if not parts or name.startswith("/") or ".." in parts or "\0" in name:
        raise ValueError(f"{name!r} is not a path below {root}: it must be relative and without '..'")
    return root.joinpath(*parts)


def local_path(target: str | Path) -> Path:
    """A path of this machine to write to. Raises ValueError for an address such as gs://bucket/path."""
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]+:/", str(target)):  # a Path has lost the second slash
        raise ValueError(f"{target} cannot be written to: give a folder or file of this machine")
    return Path(target)


def write_text(file: Path, text: str) -> None:
    """Write a file under a temporary name, then rename it: a reader finds all of it or none of it."""
    temporary = file.with_name(f".{file.name}.{os.getpid()}.partial")
    file.parent.mkdir(parents=True, exist_ok=True)
    try:
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, file)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def new_folder(target: Path, overwrite: bool = False) -> Iterator[Path]:
    """A temporary folder that becomes `target` when the block succeeds, and is deleted when it does not.

    Raises FileExistsError where `target` exists and is not to be overwritten.
    """
    target = local_path(target)
    if target.exists() and not overwrite:
        raise FileExistsError(f"{target} exists already; choose another name or pass --overwrite")
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        yield temporary
        temporary.chmod(0o777 & ~_umask())
        if target.exists():
            shutil.rmtree(target)
        os.replace(temporary, target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
