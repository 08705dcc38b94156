"""Paths that are read and written: below their root, whole or not at all, and nothing replaced but what is ours."""

from __future__ import annotations

import contextlib
import fnmatch
import os
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path, PurePosixPath


def below(root: Path, name: str) -> Path:
    """The path `name` below `root`, which must not leave it by symbolic links either.

    The snapshots of huggingface_hub's cache are links to the `blobs` of the same repository, which are allowed. Raises
    ValueError for a name that leads elsewhere: absolute, with `..` in it, or through a link.
    """
    parts = PurePosixPath(name).parts if isinstance(name, str) else ()
    if not parts or name.startswith("/") or ".." in parts or "\0" in name:
        raise ValueError(f"{name!r} is not a path below {root}: it must be relative and without '..'")
    path = root.joinpath(*parts)
    require_below(root, path)
    return path


def require_below(root: Path, path: Path) -> None:
    """Raise ValueError where a path below `root` is, or goes through, a symbolic link that leaves `root`."""
    try:
        target, base = path.resolve(), root.resolve()
    except (OSError, RuntimeError, UnicodeError) as error:  # a loop of links, a name that is too long or no text
        raise ValueError(f"{path} cannot be resolved: {error}") from error
    if target == base or base in target.parents:
        return
    for repository in (base, *base.parents):
        if repository.parent.name == "snapshots" and "--" in repository.parent.parent.name:
            if repository.parent.parent / "blobs" in target.parents:
                return
            break
    raise ValueError(f"{path} is a link to {target}, outside of {root}; put the file itself there")


def require_files_below(root: Path) -> None:
    """Raise ValueError where the folder `root` has a symbolic link that leaves it, a pipe or a device."""
    for folder, folders, files in os.walk(root):
        for path in (Path(folder, name) for name in (*folders, *files)):
            if path.is_symlink():
                require_below(root, path)
            if path.exists() and not (path.is_file() or path.is_dir()):
                raise ValueError(f"{path} is not a regular file")


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


def require_replaceable(
    target: Path,
    overwrite: bool,
    *,
    marker: Sequence[str] = (),
    files: Sequence[str] = (),
    sources: Iterable[Path] = (),
) -> None:
    """Raise FileExistsError unless a folder may be written to `target`, which is new, or ours to `overwrite`.

    Ours is an empty one, or one with a file of `marker` and else nothing but `files` (patterns of names). It neither
    is, contains nor lies in one of `sources`, from which it is made.
    """
    where = target.resolve()
    for source in map(Path.resolve, sources):
        if overwrite and (where == source or where in source.parents or source in where.parents):
            raise FileExistsError(f"{target} is, contains or lies in the source {source}; choose another folder")
    if not os.path.lexists(where):
        return
    if not where.is_dir():
        raise FileExistsError(f"{target} exists already and is not a folder; choose another name")
    if not overwrite:
        raise FileExistsError(f"{target} exists already; choose another name or pass --overwrite")
    names = sorted(entry.name for entry in where.iterdir())
    allowed = (*marker, *files)
    other = [name for name in names if not any(fnmatch.fnmatchcase(name, pattern) for pattern in allowed)]
    if names and (other or not any((where / name).exists() for name in marker)):
        problem = f"it has other files: {', '.join(other[:5])}" if other else f"it has no {' or '.join(marker)}"
        raise FileExistsError(f"{target} is not what --overwrite may replace: {problem}; choose another folder")


@contextlib.contextmanager
def new_folder(
    target: Path,
    overwrite: bool = False,
    *,
    marker: Sequence[str] = (),
    files: Sequence[str] = (),
    sources: Iterable[Path] = (),
) -> Iterator[Path]:
    """A temporary folder that becomes `target` when the block succeeds, and is deleted when it does not.

    A folder that is there is moved aside, and deleted once the new one is in its place. A link to a folder stays one.
    Raises FileExistsError as `require_replaceable`, which the arguments are for.
    """
    require_replaceable(local_path(target), overwrite, marker=marker, files=files, sources=sources)
    target = local_path(target).resolve()
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        yield temporary
        temporary.chmod(0o777 & ~_umask())
        with moved_aside(target):
            os.replace(temporary, target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextlib.contextmanager
def moved_aside(target: Path) -> Iterator[None]:
    """What is at `target`, if anything, moved aside: deleted when the block succeeds, put back when it does not."""
    aside = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".replaced", dir=target.parent))
    old = aside / target.name
    if target.exists():
        os.replace(target, old)
    try:
        yield
    except BaseException:
        if old.exists():
            os.replace(old, target)
        aside.rmdir()
        raise
    shutil.rmtree(aside)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
