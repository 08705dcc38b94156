"""Files and folders by address: a local path, a bucket, the Hugging Face Hub, or bundled with us."""

from __future__ import annotations

import logging
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Mapping
from concurrent.futures import CancelledError, ThreadPoolExecutor
from pathlib import Path

from tqdm import tqdm

from pi0.storage import (
    SCHEMES,
    TRANSFERS,
    File,
    as_path,
    below,
    digest,
    file_of,
    filesystem_of,
    list_files,
    read_range,
    requests,
)

logger = logging.getLogger(__name__)

_BUNDLED = Path(__file__).parent / "sample"
_COMPLETE = ".fetched"  # marks a cached folder that is complete
PIECE = 16 << 20  # bytes of a file that are downloaded at a time, in each of TRANSFERS threads
_HF_ADDRESS = re.compile(r"(?P<kind>datasets/)?(?P<repo>[^/@]+/[^/@]+)(@(?P<revision>[^/]+))?(/(?P<path>.*))?")


def fetch(source: str | Path, *, wanted: Callable[[str], bool] = lambda name: True, refresh: bool = False) -> Path:
    """The local path of a file or a folder, downloaded into a cache where it is not local.

    `source` is one of

    - a local path, which must exist;
    - `bundled://name`, a file or folder of `pi0/sample`;
    - `gs://bucket/path` or `s3://bucket/path`, cached under `cache_dir()`. A file arrives under a temporary name and
      is then renamed, so an interrupted folder goes on with the files that are missing. What has been fetched is
      never looked up again, unless `refresh`: then what differs is fetched anew. Of a folder, only the files whose
      names are `wanted`;
    - `hf://org/repo[@revision][/path]` or `hf://datasets/org/name[@revision][/path]`, cached by
      `huggingface_hub`.

    Raises FileNotFoundError if nothing is there, ConnectionError if the place cannot be read, OSError if the disk is
    too small, MissingExtraError without the packages that a bucket needs, and ValueError for any other address.
    """
    scheme, separator, address = str(source).partition("://")
    if not separator:
        path = Path(source).expanduser()
        if not path.exists():
            raise FileNotFoundError(f"no such file or folder: {path} (seen from {Path.cwd()})")
        return path
    if scheme == "bundled":
        return fetch(below(_BUNDLED, address))
    if scheme in SCHEMES:
        return _fetch_bucket(str(source), wanted, refresh)
    if scheme == "hf":
        return _fetch_hf(str(source), address.strip("/"))
    raise ValueError(
        f"cannot fetch {source}: give a local path, gs://bucket/path, s3://…, hf://org/repo/path or bundled://name"
    )


def fetched(source: str | Path) -> Path | None:
    """The local path of an address in a bucket that was fetched as a whole before; None of any other."""
    remote = as_path(str(source))
    scheme, _, address = str(remote).partition("://")
    target = below(cache_dir() / scheme, address)
    return target if target.is_file() or (target / _COMPLETE).exists() else None


def cache_dir() -> Path:
    """The folder of fetched files: $PI0_CACHE, or `~/.cache/pi0`."""
    return Path(os.environ.get("PI0_CACHE") or "~/.cache/pi0").expanduser()


def _fetch_bucket(source: str, wanted: Callable[[str], bool], refresh: bool) -> Path:
    remote = as_path(source)
    scheme, _, address = str(remote).partition("://")
    bucket, _, key = address.partition("/")
    if not key:
        raise ValueError(f"{source} names no file or folder: give {scheme}://bucket/path")
    root = cache_dir() / scheme / bucket
    target = below(root, key)
    if not refresh and (there := fetched(source)) is not None:
        return there
    found = _one_file(remote) or {f"{key}/{name}": file for name, file in list_files(remote).items()}
    if not found:
        raise FileNotFoundError(f"{source}: the bucket has no such file or folder. Check the spelling.")
    paths = {name: below(root, name) for name in found}  # all are checked before the first is written
    missing = {
        paths[name]: file
        for name, file in found.items()
        if wanted(name.removeprefix(f"{key}/")) and not (paths[name].exists() and _is_same(paths[name], file, refresh))
    }
    if missing:
        logger.info("fetching %s into %s", source, target)
        _download(source, missing)
    if not target.exists():  # nothing of the folder was wanted
        target.mkdir(parents=True)
    if target.is_dir() and all(path.exists() for path in paths.values()):
        (target / _COMPLETE).touch()
    return target


def _one_file(remote: Path) -> dict[str, File]:
    """The file at `remote` itself, by its key, if there is one."""
    name = str(remote).partition("://")[2]
    with requests(f"cannot read {remote}"):
        try:
            info = filesystem_of(remote).info(name)
        except FileNotFoundError:
            return {}
    return {name.partition("/")[2]: file_of(remote, info)} if info["type"] == "file" else {}


def _is_same(path: Path, file: File, refresh: bool) -> bool:
    """Whether a file in the cache is that of the bucket; unless `refresh`, every file is, once it is there."""
    if not refresh:
        return True
    if path.stat().st_size != file.size:
        return False
    return file.md5 is None or digest(path, "md5") == file.md5


def _download(source: str, files: Mapping[Path, File]) -> None:
    """Download files in pieces, some at a time; each gets its name when it is whole and has its checksum."""
    total = sum(file.size for file in files.values())
    folder = cache_dir()
    folder.mkdir(parents=True, exist_ok=True)
    if total > (free := shutil.disk_usage(folder).free):
        raise OSError(f"{source} has {total / 1e9:.1f} GB to fetch, and {folder} has {free / 1e9:.1f} GB left")
    failed: Exception | None = None
    with (
        tempfile.TemporaryDirectory(dir=folder, prefix="partial-") as partial,
        tqdm(total=total, desc=f"fetching {source}", unit="B", unit_scale=True, delay=2) as bar,
        ThreadPoolExecutor(TRANSFERS) as pool,
    ):
        arrived = {path: Path(partial, str(i)) for i, path in enumerate(files)}
        pieces = {}
        try:
            for path, file in files.items():
                arrived[path].touch()
                starts = range(0, file.size, PIECE)
                pieces[path] = [pool.submit(_download_piece, file, arrived[path], start) for start in starts]
            for path, its in pieces.items():
                try:
                    for piece in its:
                        bar.update(piece.result())
                    _finish(arrived[path], path, files[path])
                except CancelledError:
                    continue
                except Exception as error:  # what has been transferred already is kept
                    failed = failed or error
                    pool.shutdown(wait=False, cancel_futures=True)
        finally:
            pool.shutdown(cancel_futures=True)
    if failed is not None:
        raise failed


def _download_piece(file: File, arrived: Path, start: int) -> int:
    """Download the piece of a file that begins at `start`, and return its size."""
    stop = min(start + PIECE, file.size)
    content = read_range(file.path, start, stop)
    if len(content) != stop - start:
        raise ConnectionError(f"{file.path}: {len(content)} bytes came from {start} on, of {stop - start} asked for")
    with arrived.open("r+b") as stream:
        stream.seek(start)
        stream.write(content)
    return len(content)


def _finish(arrived: Path, path: Path, file: File) -> None:
    if file.md5 is not None and digest(arrived, "md5") != file.md5:
        raise ConnectionError(f"{file.path} changed while it was fetched, or was damaged on the way; try again")
    path.parent.mkdir(parents=True, exist_ok=True)
    arrived.replace(path)


def _fetch_hf(source: str, address: str) -> Path:
    import huggingface_hub
    from huggingface_hub import errors

    match = _HF_ADDRESS.fullmatch(address)
    if not match:
        raise ValueError(f"cannot read {source}: give hf://org/repo[@revision][/path]")
    path = match["path"] or ""
    if path:
        below(Path(), path)
    try:
        folder = huggingface_hub.snapshot_download(
            match["repo"],
            repo_type="dataset" if match["kind"] else "model",
            revision=match["revision"],
            allow_patterns=[path, f"{path}/*"] if path else None,
        )
    except (errors.RepositoryNotFoundError, errors.RevisionNotFoundError) as error:
        raise FileNotFoundError(
            f"{source}: the Hugging Face Hub has no such repository or revision, or it is private. "
            "Check the spelling, or run `hf auth login`."
        ) from error
    except (errors.LocalEntryNotFoundError, errors.HfHubHTTPError) as error:
        raise ConnectionError(f"cannot read {source}: {error}. Check the network.") from error
    target = Path(folder, path)
    if not target.exists():
        raise FileNotFoundError(
            f"{source}: the repository has no {path!r}. Check the spelling, and the network if it does."
        )
    return target
