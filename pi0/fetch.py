"""Files and folders by address: a local path, Google Cloud Storage, the Hugging Face Hub, or bundled with us."""

from __future__ import annotations

import contextlib
import logging
import os
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from tqdm import tqdm

from pi0.storage import below

if TYPE_CHECKING:
    import tensorstore as ts

logger = logging.getLogger(__name__)

_BUNDLED = Path(__file__).parent / "sample"
_COMPLETE = ".fetched"  # marks a cached folder that is complete
_GS_BUCKET = re.compile(r"[a-z0-9][a-z0-9._-]+")
_HF_ADDRESS = re.compile(r"(?P<kind>datasets/)?(?P<repo>[^/@]+/[^/@]+)(@(?P<revision>[^/]+))?(/(?P<path>.*))?")


def fetch(source: str | Path) -> Path:
    """The local path of a file or a folder, downloaded into a cache where it is not local.

    `source` is one of

    - a local path, which must exist;
    - `bundled://name`, a file or folder of `pi0/sample`;
    - `gs://bucket/path`, cached under `cache_dir()`. A file arrives under a temporary name and is then
      renamed, so an interrupted folder goes on with the files that are missing. What has been fetched is
      never looked up again; delete it from the cache to fetch it anew;
    - `hf://org/repo[@revision][/path]` or `hf://datasets/org/name[@revision][/path]`, cached by
      `huggingface_hub`.

    Raises FileNotFoundError if nothing is there, ConnectionError if the place cannot be read, and
    ValueError for any other kind of address.
    """
    scheme, separator, address = str(source).partition("://")
    if not separator:
        path = Path(source).expanduser()
        if not path.exists():
            raise FileNotFoundError(f"no such file or folder: {path} (seen from {Path.cwd()})")
        return path
    if scheme == "bundled":
        return fetch(below(_BUNDLED, address))
    if scheme == "gs":
        return _fetch_gs(str(source), address.strip("/"))
    if scheme == "hf":
        return _fetch_hf(str(source), address.strip("/"))
    raise ValueError(
        f"cannot fetch {source}: give a local path, gs://bucket/path, hf://org/repo/path or bundled://name"
    )


def cache_dir() -> Path:
    """The folder of fetched files: $PI0_CACHE, or `~/.cache/pi0`."""
    return Path(os.environ.get("PI0_CACHE") or "~/.cache/pi0").expanduser()


def _fetch_gs(source: str, address: str) -> Path:
    bucket, _, key = address.partition("/")
    if not key:
        raise ValueError(f"{source} names no file or folder: give gs://bucket/path")
    if not _GS_BUCKET.fullmatch(bucket):
        raise ValueError(f"{source}: {bucket!r} is no name of a bucket; give gs://bucket/path")
    folder = cache_dir() / "gs" / bucket
    target = below(folder, key)
    if target.is_file() or (target / _COMPLETE).exists():
        return target
    logger.info("fetching %s into %s", source, target)
    with _requests(source):
        store = _open_bucket(bucket)
        keys = _keys(store, key)
    files = {name: below(folder, name) for name in keys}  # all are checked before the first is written
    with _requests(source):
        for name in tqdm(keys, desc=f"fetching {source}", unit="file", disable=len(keys) < 2):
            _download(store, name, files[name])
    if not keys:
        raise FileNotFoundError(f"{source}: the bucket has no such file or folder. Check the spelling.")
    if target.is_dir():
        (target / _COMPLETE).touch()
    return target


@contextlib.contextmanager
def _requests(source: str) -> Iterator[None]:
    """Raise ConnectionError for a request that fails, of which tensorstore makes a ValueError."""
    try:
        yield
    except ValueError as error:
        raise ConnectionError(
            f"cannot read {source}: {error}. Check the network and, for a private bucket, run "
            "`gcloud auth application-default login`."
        ) from error


def _open_bucket(bucket: str) -> ts.KvStore:
    import tensorstore as ts

    # tensorstore's own 32 retries would keep a machine without a network waiting for a quarter of an hour
    context = {"gcs_request_retries": {"max_retries": 4}}
    return ts.KvStore.open({"driver": "gcs", "bucket": bucket, "context": context}).result()


def _keys(store: ts.KvStore, key: str) -> list[str]:
    """The object `key` itself if there is one, otherwise all objects under `key/`."""
    import tensorstore as ts

    file = ts.KvStore.KeyRange(key, key + "\0")
    folder = ts.KvStore.KeyRange(f"{key}/", f"{key}0")  # "0" is the character after "/"
    found = store.list(file).result() or store.list(folder).result()
    return sorted(name.decode() for name in found if not name.endswith(b"/"))


def _download(store: ts.KvStore, key: str, target: Path) -> None:
    if target.exists():
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache_dir(), prefix="partial-") as partial:
        arrived = Path(partial, "file")
        arrived.write_bytes(store[key])
        arrived.replace(target)


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
