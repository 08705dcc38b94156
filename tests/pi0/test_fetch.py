from __future__ import annotations

from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import tensorstore as ts

import pi0.fetch
from pi0.fetch import fetch
from pi0.storage import below, local_path

OBJECTS = {
    "models/base": b"a file that shares its name's beginning",
    "models/pi0/params/a": b"first",
    "models/pi0/params/d/b": b"second",
    "models/pi0/params/d/": b"",  # a placeholder, as some tools write for an empty folder
    "models/pi0/params0": b"not in the folder",
    "models/pi0_big/params/a": b"not in the folder either",
}


class Bucket:
    """A bucket in memory that counts requests, and whose reads fail from the `reads_left`-th on."""

    def __init__(self) -> None:
        self.store = ts.KvStore.open("memory://").result()
        for key, value in OBJECTS.items():
            self.store[key] = value
        self.reads: list[str] = []
        self.lists = 0
        self.reads_left = 100

    def __getitem__(self, key: str) -> bytes:
        if not self.reads_left:
            raise ValueError("UNAVAILABLE: connection reset")
        self.reads_left -= 1
        self.reads.append(key)
        return self.store[key]

    def list(self, keys: ts.KvStore.KeyRange) -> Any:
        self.lists += 1
        return self.store.list(keys)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PI0_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def bucket(cache: Path, monkeypatch: pytest.MonkeyPatch) -> Bucket:
    bucket = Bucket()
    monkeypatch.setattr(pi0.fetch, "_open_bucket", {"shop": bucket}.__getitem__)
    return bucket


def files(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_local_file_and_folder(tmp_path: Path) -> None:
    assert fetch(tmp_path) == fetch(str(tmp_path)) == tmp_path
    with pytest.raises(FileNotFoundError, match=r"no such file or folder: .*gone"):
        fetch(tmp_path / "gone")


@pytest.mark.parametrize(
    "source", ["s3://bucket/key", "https://host/file", "gs://bucket", "hf://org", "hf://org@main/x"]
)
def test_other_addresses_are_refused(source: str) -> None:
    with pytest.raises(ValueError, match=f"{source}.*give"):
        fetch(source)


@pytest.mark.parametrize(
    "source",
    ["gs://shop/../x", "gs://../x/y", "gs://shop/a/../../x", "bundled://../assets.py", "hf://org/repo/../x"],
)
def test_addresses_that_lead_out_of_their_root_are_refused(source: str, bucket: Bucket) -> None:
    with pytest.raises(ValueError, match=r"without '\.\.'|no name of a bucket"):
        fetch(source)
    assert not bucket.reads


@pytest.mark.parametrize("name", ["../outside", "models/pi0/../../../outside", "/outside", "models/pi0/params/\0"])
def test_object_names_that_lead_out_of_the_cache_are_refused(name: str, bucket: Bucket, cache: Path) -> None:
    """Before any file of the folder is written."""
    with pytest.raises(ValueError, match="is not a path below"):
        below(cache, name)
    bucket.store["models/pi0/../../../../../outside"] = b"not in the cache"
    with pytest.raises(ValueError, match="is not a path below"):
        fetch("gs://shop/models/pi0")
    assert not files(cache.parent)


@pytest.mark.parametrize("target", ["gs://bucket/run", "s3://bucket/run", Path("gs://bucket/run"), "file:///run"])
def test_addresses_that_cannot_be_written_to_are_refused(target: str | Path) -> None:
    with pytest.raises(ValueError, match="cannot be written to"):
        local_path(target)
    assert local_path("runs/a:b") == Path("runs/a:b")


def test_gs_file(bucket: Bucket, cache: Path) -> None:
    path = fetch("gs://shop/models/base")
    assert path == cache / "gs/shop/models/base"
    assert path.read_bytes() == OBJECTS["models/base"]
    assert fetch("gs://shop/models/base") == path
    assert (bucket.lists, len(bucket.reads)) == (1, 1), "asked again for a file that it had"
    assert [p.name for p in cache.iterdir()] == ["gs"], "left a temporary file behind"


def test_gs_folder(bucket: Bucket, cache: Path) -> None:
    path = fetch("gs://shop/models/pi0/params/")
    assert files(path) == {"a": b"first", "d/b": b"second", ".fetched": b""}
    requests = bucket.lists, len(bucket.reads)
    assert fetch("gs://shop/models/pi0/params") == path
    assert (bucket.lists, len(bucket.reads)) == requests, "asked again for a folder that it had"


def test_gs_folder_goes_on_where_it_was_interrupted(bucket: Bucket) -> None:
    bucket.reads_left = 1
    with pytest.raises(ConnectionError, match=r"gs://shop/models/pi0.*connection reset.*Check the network"):
        fetch("gs://shop/models/pi0")
    bucket.reads_left = 100
    path = fetch("gs://shop/models/pi0")
    assert len(bucket.reads) == len(set(bucket.reads)) == 3, "downloaded a file twice"
    assert files(path) == {
        "params/a": b"first",
        "params/d/b": b"second",
        "params0": b"not in the folder",
        ".fetched": b"",
    }


def test_gs_missing(bucket: Bucket, cache: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"gs://shop/models/pi: .*no such file or folder"):
        fetch("gs://shop/models/pi")
    assert not cache.exists()


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """The calls to a Hub whose every repository has the files `config.json` and `params/a`."""
    snapshot = tmp_path / "snapshot"
    (snapshot / "params").mkdir(parents=True)
    (snapshot / "config.json").write_text("{}")
    (snapshot / "params" / "a").write_text("first")
    calls: list[dict[str, Any]] = []

    def snapshot_download(repo_id: str, **arguments: Any) -> str:
        calls.append({"repo_id": repo_id, **arguments})
        return str(snapshot)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    return calls


@pytest.mark.parametrize(
    ("source", "repo", "kind", "revision", "path"),
    [
        ("hf://org/name", "org/name", "model", None, ""),
        ("hf://org/name@v1.0", "org/name", "model", "v1.0", ""),
        ("hf://org/name@v1.0/params/", "org/name", "model", "v1.0", "params"),
        ("hf://org/name/params/a", "org/name", "model", None, "params/a"),
        ("hf://datasets/org/name", "org/name", "dataset", None, ""),
        ("hf://datasets/org/name@main/config.json", "org/name", "dataset", "main", "config.json"),
    ],
)
def test_hf(hub: list[dict[str, Any]], source: str, repo: str, kind: str, revision: str, path: str) -> None:
    assert fetch(source).relative_to(fetch("hf://any/thing")) == Path(path)
    patterns = [path, f"{path}/*"] if path else None
    assert hub[0] == {"repo_id": repo, "repo_type": kind, "revision": revision, "allow_patterns": patterns}


def test_hf_missing_path(hub: list[dict[str, Any]]) -> None:
    with pytest.raises(FileNotFoundError, match=r"hf://org/name/gone: the repository has no 'gone'"):
        fetch("hf://org/name/gone")


def test_hf_unreachable(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def snapshot_download(*_: Any, **__: Any) -> str:
        raise huggingface_hub.errors.LocalEntryNotFoundError("no connection")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    with pytest.raises(ConnectionError, match=r"hf://org/name: no connection\. Check the network"):
        fetch("hf://org/name")
