"""Paths that are read and written: below their root, whole or not at all, and nothing replaced but what is ours.

`as_path` makes a path of an address: `pathlib.Path` of this machine or, for `gs://bucket/key` and `s3://bucket/key`,
`etils.epath.Path` with the same methods (not `resolve`, `rglob` and links), over fsspec. Both are annotated as `Path`.
What a bucket does otherwise is here: a folder is the common beginning of names, so there is nothing to make and
nothing to rename. A file there is whole or absent; a folder is whole once its last file, which readers look for, is.
"""

from __future__ import annotations

import base64
import contextlib
import dataclasses
import fnmatch
import hashlib
import logging
import os
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePath, PurePosixPath
from typing import Any

from pi0.plugins import require_extra

SCHEMES = {"gs": ("gcs", "gcsfs"), "s3": ("s3", "s3fs")}  # of buckets: fsspec's protocol, and the package that has it
TRANSFERS = 8  # files or pieces of files that are transferred at a time
_ADDRESS = re.compile(r"(?P<scheme>[A-Za-z][A-Za-z0-9+.-]+):/(?P<slash>/?)(?P<rest>.*)", re.DOTALL)
_BUCKET = re.compile(r"[a-z0-9][a-z0-9._-]+")
NO_REQUEST = (LookupError, TypeError, NameError, AttributeError, AssertionError, ArithmeticError, ImportError)
# Tensorstore raises ValueError for requests that fail too, with details at the end of its message.
_TENSORSTORE, _DETAILS = re.compile(r"http_response_code|CURL error|retry attempts"), re.compile(r" \[[a-z_ ]+=")


def as_path(source: str | PurePath) -> Path:
    """The path of this machine or in a bucket that `source` names.

    Raises ValueError for any other address, also one that `pathlib.Path` took the second slash of, and for a name with
    `..`; MissingExtraError without the packages that a bucket needs.
    """
    match = _ADDRESS.match(str(source))
    if match is None:
        return Path(source)
    scheme = match["scheme"]
    if scheme not in SCHEMES or not match["slash"]:
        raise ValueError(f"{source} is neither a path of this machine nor an address such as gs://bucket/path")
    bucket, _, key = match["rest"].partition("/")
    if not _BUCKET.fullmatch(bucket):
        raise ValueError(f"{source}: {bucket!r} is no name of a bucket; give {scheme}://bucket/path")
    if ".." in key.split("/") or "\0" in key:
        raise ValueError(f"{source} is not a path below its bucket: it must be without '..'")
    filesystem(scheme)
    from etils import epath

    path: Any = epath.Path(str(source).rstrip("/"))
    return path


def filesystem(scheme: str) -> Any:
    """The fsspec file system of buckets of a `scheme` in SCHEMES. Raises MissingExtraError.

    It keeps no listings: what other processes write is seen at once.
    """
    protocol, package = SCHEMES[scheme]
    require_extra("gcs" if scheme == "gs" else scheme, "etils", "fsspec", package)
    import fsspec

    fsspec.config.conf.setdefault(protocol, {}).setdefault("use_listings_cache", False)
    logging.getLogger(package).setLevel(logging.CRITICAL)  # it logs tracebacks of what it raises
    options = {"finalize_on_close": True} if scheme == "gs" else {}  # as epath opens it: then it is the same one
    return fsspec.filesystem(protocol, **options)


def is_bucket(path: PurePath) -> bool:
    """Whether a path is in a bucket."""
    return not isinstance(path, Path)


def filesystem_of(path: Path) -> Any:
    """The fsspec file system of a path in a bucket."""
    return filesystem(str(path).partition("://")[0])


@contextlib.contextmanager
def requests(what: str) -> Iterator[None]:
    """Raise ConnectionError for a request to a bucket that fails after its retries, whatever its client raises.

    FileNotFoundError, FileExistsError, and errors that are of no request, stay what they are.
    """
    try:
        yield
    except (FileNotFoundError, FileExistsError, ConnectionError, *NO_REQUEST):
        raise
    except Exception as error:
        if isinstance(error, OSError) and error.errno is not None and type(error).__module__ == "builtins":  # of a disk
            raise
        text = str(error).strip() or type(error).__name__
        if isinstance(error, ValueError) and not _TENSORSTORE.search(text):
            raise
        login = "aws configure" if "s3://" in what else "gcloud auth application-default login"
        raise ConnectionError(
            f"{what}: {_DETAILS.split(text)[0]}. Check the network and, for a private bucket, `{login}` and the "
            "permissions of that account."
        ) from error


def below(root: Path, name: str) -> Path:
    """The path `name` below `root`, which must not leave it by symbolic links either.

    The snapshots of huggingface_hub's cache are links to the `blobs` of the same repository, which are allowed. Raises
    ValueError for a name that leads elsewhere: absolute, with `..` in it, or through a link.
    """
    parts = PurePosixPath(name).parts if isinstance(name, str) else ()
    if not parts or name.startswith("/") or ".." in parts or "\0" in name:
        raise ValueError(f"{name!r} is not a path below {root}: it must be relative and without '..'")
    path = root.joinpath(*parts)
    if not is_bucket(path):
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
    if _ADDRESS.match(str(target)):
        raise ValueError(f"{target} cannot be written to: give a folder or file of this machine")
    return Path(target)


def resolved(path: Path) -> Path:
    """The path from the root on, without links; one in a bucket as it is."""
    return path if is_bucket(path) else path.resolve()


@dataclasses.dataclass(frozen=True)
class File:
    """A file below a folder: its path, its size in bytes, and its MD5 in hex where a bucket tells it unread."""

    path: Path
    size: int
    md5: str | None = None


def list_files(folder: Path) -> dict[str, File]:
    """All files below a folder, by their names relative to it, sorted; in a bucket by one listing."""
    if not is_bucket(folder):
        found = ((f.relative_to(folder).as_posix(), f) for f in sorted(folder.rglob("*")) if f.is_file())
        return {name: File(file, file.stat().st_size) for name, file in found}
    files: dict[str, File] = {}
    root = str(folder).partition("://")[2].rstrip("/") + "/"
    with requests(f"cannot list {folder}"):
        found_files = filesystem_of(folder).find(root, detail=True)
    for name, info in sorted(found_files.items()):
        relative = name.removeprefix(root)
        if relative and not name.endswith("/"):  # a placeholder, as some tools write for an empty folder
            files[relative] = file_of(below(folder, relative), info)  # the bucket may be a stranger's
    return files


def file_of(path: Path, info: dict[str, Any]) -> File:
    """A file in a bucket of which fsspec says `info`."""
    return File(path, info["size"], base64.b64decode(info["md5Hash"]).hex() if info.get("md5Hash") else None)


def file_size(file: Path) -> int:
    """The size of a file in bytes."""
    with requests(f"cannot read {file}"):
        return filesystem_of(file).size(str(file)) if is_bucket(file) else file.stat().st_size


def read_range(file: Path, start: int, stop: int) -> bytes:
    """The bytes of a file from `start` to before `stop`, without those that it does not have."""
    if is_bucket(file):
        with requests(f"cannot read {file}"):
            return filesystem_of(file).cat_file(str(file), start=start, end=stop) if stop > start else b""
    with file.open("rb") as stream:
        stream.seek(start)
        return stream.read(stop - start)


def is_folder(path: Path) -> bool:
    """Whether there is a folder, which in a bucket has at least one file."""
    with requests(f"cannot read {path}"):
        return path.is_dir()


def write_text(file: Path, text: str) -> None:
    """Write a file as a whole: a reader finds all of it or none of it. Folders are made where they are missing."""
    if is_bucket(file):
        with requests(f"cannot write {file}"):
            filesystem_of(file).pipe_file(str(file), text.encode())
        return
    with new_file(file) as temporary:
        temporary.write_text(text, encoding="utf-8")


def create_text(file: Path, text: str) -> None:
    """Write a file where there is none. Raises FileExistsError, of two processes in one of them."""
    if is_bucket(file):
        with requests(f"cannot write {file}"):
            filesystem_of(file).pipe_file(str(file), text.encode(), mode="create")
    else:
        with file.open("x", encoding="utf-8") as stream:
            stream.write(text)


def version(file: Path) -> str | None:
    """What changes whenever a file in a bucket is written; None where there is none."""
    with requests(f"cannot read {file}"):
        try:
            info = filesystem_of(file).info(str(file))
        except FileNotFoundError:
            return None
    return str(info.get("generation") or info.get("ETag"))


def delete_version(file: Path, version: str) -> None:
    """Delete a file in a bucket unless it was written since it had this `version`, as far as the bucket can tell."""
    scheme, _, address = str(file).partition("://")
    fs = filesystem(scheme)
    with requests(f"cannot delete {file}"), contextlib.suppress(FileNotFoundError, FileExistsError):
        if scheme == "gs":
            fs.call("DELETE", "b/{}/o/{}", *address.split("/", 1), ifGenerationMatch=version)
        else:
            fs.rm_file(address)


def digest(file: Path, algorithm: str) -> str:
    """A checksum of a file in hex, by an algorithm of `hashlib`."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, algorithm).hexdigest()


@contextlib.contextmanager
def new_file(file: Path) -> Iterator[Path]:
    """A temporary file of this machine that becomes `file` when the block succeeds, and is deleted when it does not."""
    if is_bucket(file):
        with tempfile.TemporaryDirectory(prefix="pi0-") as folder:
            yield Path(folder, file.name)
            upload(Path(folder), file.parent)
        return
    temporary = file.with_name(f".{os.getpid()}.partial.{file.name}")  # with the suffix, which says a plot's format
    file.parent.mkdir(parents=True, exist_ok=True)
    try:
        yield temporary
        os.replace(temporary, file)
    finally:
        temporary.unlink(missing_ok=True)


def delete(path: Path) -> None:
    """Delete a file, or a folder with everything in it; nothing where there is none."""
    if is_bucket(path):
        with requests(f"cannot delete {path}"), contextlib.suppress(FileNotFoundError):
            filesystem_of(path).rm(str(path), recursive=True)
    elif path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def move(source: Path, target: Path, *, last: Sequence[str] = ()) -> None:
    """Move a file or a folder to a place where there is none: renamed, or in a bucket copied there and then deleted.

    The server makes the copies. Of a folder in a bucket, files whose names match a pattern of `last`, by which readers
    know it, are copied last and deleted first. What was interrupted goes on when it is called again.
    """
    if not is_bucket(source):
        os.replace(source, target)
        return
    fs = filesystem_of(source)
    with requests(f"cannot move {source} to {target}"):
        names = [*list_files(source)] or [""]
        for some in _in_order(names, last):
            with ThreadPoolExecutor(TRANSFERS) as pool:
                list(pool.map(lambda name: fs.cp_file(str(source / name), str(target / name)), some))
    for name in _in_order(names, last)[1]:
        delete(source / name)
    delete(source)


def _in_order(names: Iterable[str], last: Sequence[str]) -> tuple[list[str], list[str]]:
    """The names that match no pattern of `last`, and those that do."""
    ends = {name for name in names if any(fnmatch.fnmatchcase(name, pattern) for pattern in last)}
    return sorted({*names} - ends), sorted(ends)


def upload(folder: Path, target: Path, *, last: Sequence[str] = ()) -> None:
    """Write all files of a folder of this machine below `target`, in parallel and in pieces.

    Those whose names match a pattern of `last` come after all others are there.
    """
    for names in _in_order(list_files(folder), last):
        upload_files(folder, target, names)


def upload_files(folder: Path, target: Path, names: Iterable[str]) -> None:
    """Write the files of these names, relative to a folder of this machine, below `target`."""

    def write(name: str) -> None:
        if is_bucket(target):
            with requests(f"cannot write {target / name}"):
                filesystem_of(target).put_file(str(folder / name), str(target / name))
        else:
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(folder / name, target / name)

    with ThreadPoolExecutor(TRANSFERS) as pool:
        list(pool.map(write, names))


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
    where = resolved(target)
    for source in map(resolved, sources):
        if overwrite and (where == source or where in source.parents or source in where.parents):
            raise FileExistsError(f"{target} is, contains or lies in the source {source}; choose another folder")
    with requests(f"cannot read {where}"):
        there = where.exists() if is_bucket(where) else os.path.lexists(where)
    if not there:
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
    For a bucket it is written below $TMPDIR and then uploaded, the files of `marker` last. Raises FileExistsError as
    `require_replaceable`, which the arguments are for.
    """
    target = as_path(target)
    require_replaceable(target, overwrite, marker=marker, files=files, sources=sources)
    if is_bucket(target):
        with tempfile.TemporaryDirectory(prefix="pi0-") as made:
            yield Path(made)
            _place(Path(made), target, [pattern for name in marker for pattern in (name, f"{name}/_METADATA")])
        return
    target = target.resolve()
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        yield temporary
        temporary.chmod(0o777 & ~_umask())
        with moved_aside(target):
            os.replace(temporary, target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _place(made: Path, target: Path, last: Sequence[str]) -> None:
    """Upload a folder in place of what is at `target`, which is deleted once all of the new one is in the bucket."""
    old = list_files(target)
    where = target.parent / f".{target.name}.{os.urandom(4).hex()}" if old else target
    try:
        upload(made, where, last=last)
    except BaseException:
        with contextlib.suppress(OSError):
            delete(where)
        raise
    if old:
        delete(target)
        move(where, target, last=last)


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
