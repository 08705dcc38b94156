from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
import tensorstore as ts

import pi0.fetch
from pi0.fetch import fetch
from pi0.storage import below, local_path, requests
from tests.bucket import Bucket, times

OBJECTS = {
    "models/base": b"a file that shares its name's beginning",
    "models/pi0/params/a": b"first",
    "models/pi0/params/d/b": b"second",
    "models/pi0/params/d/": b"",  # a placeholder, as some tools write for an empty folder
    "models/pi0/params0": b"not in the folder",
    "models/pi0_big/params/a": b"not in the folder either",
}


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PI0_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def shop(bucket: Bucket, cache: Path) -> Bucket:
    put(bucket, OBJECTS)
    bucket.requests.clear()
    return bucket


def put(bucket: Bucket, objects: dict[str, bytes]) -> None:
    name, _, key = bucket.address.removeprefix("gs://").partition("/")
    store = ts.KvStore.open({"driver": "gcs", "bucket": name, "path": f"{key}/"}).result()
    for name, content in objects.items():
        store[name] = content


def downloads(bucket: Bucket) -> list[str]:
    return [path for method, path in bucket.requests if method == "GET" and "alt=media" in path]


def files(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_local_file_and_folder(tmp_path: Path) -> None:
    assert fetch(tmp_path) == fetch(str(tmp_path)) == tmp_path
    with pytest.raises(FileNotFoundError, match=r"no such file or folder: .*gone"):
        fetch(tmp_path / "gone")


@pytest.mark.parametrize(
    "source", ["az://bucket/key", "https://host/file", "gs://bucket", "hf://org", "hf://org@main/x"]
)
def test_other_addresses_are_refused(source: str, bucket_server: object) -> None:
    with pytest.raises(ValueError, match=f"{source}.*give"):
        fetch(source)


@pytest.mark.parametrize(
    "source",
    ["gs://shop/../x", "gs://../x/y", "gs://shop/a/../../x", "bundled://../assets.py", "hf://org/repo/../x"],
)
def test_addresses_that_lead_out_of_their_root_are_refused(source: str, shop: Bucket) -> None:
    with pytest.raises(ValueError, match=r"without '\.\.'|no name of a bucket"):
        fetch(source)
    assert not shop.requests


@pytest.mark.parametrize("name", ["../outside", "models/pi0/../../../outside", "/outside", "models/pi0/params/\0"])
def test_names_that_lead_out_of_the_cache_are_refused(name: str, cache: Path) -> None:
    with pytest.raises(ValueError, match="is not a path below"):
        below(cache, name)


def test_objects_that_lead_out_of_the_cache_are_refused(shop: Bucket, cache: Path) -> None:
    """Before any file of the folder is written."""
    put(shop, {"models/pi0/../../../../../outside": b"not in the cache"})
    with pytest.raises(ValueError, match="is not a path below"):
        fetch(f"{shop.address}/models/pi0")
    assert not files(cache.parent)


@pytest.mark.parametrize("target", ["gs://bucket/run", "s3://bucket/run", Path("gs://bucket/run"), "file:///run"])
def test_addresses_that_cannot_be_written_to_are_refused(target: str | Path) -> None:
    with pytest.raises(ValueError, match="cannot be written to"):
        local_path(target)
    assert local_path("runs/a:b") == Path("runs/a:b")


def test_gs_file(shop: Bucket, cache: Path) -> None:
    path = fetch(f"{shop.address}/models/base")
    assert path == cache / "gs" / shop.address.removeprefix("gs://") / "models/base"
    assert path.read_bytes() == OBJECTS["models/base"]
    requests = len(shop.requests)
    assert fetch(f"{shop.address}/models/base") == path
    assert len(shop.requests) == requests, "asked again for a file that it had"
    assert [p.name for p in cache.iterdir()] == ["gs"], "left a temporary file behind"


def test_gs_folder(shop: Bucket) -> None:
    path = fetch(f"{shop.address}/models/pi0/params/")
    assert files(path) == {"a": b"first", "d/b": b"second", ".fetched": b""}
    requests = len(shop.requests)
    assert fetch(f"{shop.address}/models/pi0/params") == path
    assert len(shop.requests) == requests, "asked again for a folder that it had"


def test_gs_folder_in_part_and_again(shop: Bucket) -> None:
    address = f"{shop.address}/models/pi0"
    path = fetch(address, wanted=lambda name: not name.startswith("params/d"))
    assert files(path) == {"params/a": b"first", "params0": b"not in the folder"}
    put(shop, {"models/pi0/params/a": b"other"})
    assert files(fetch(address))["params/a"] == b"first"
    whole = {"params/a": b"other", "params/d/b": b"second", "params0": b"not in the folder", ".fetched": b""}
    assert files(fetch(address, refresh=True)) == whole


def test_gs_folder_goes_on_where_it_was_interrupted(shop: Bucket) -> None:
    lost = lambda method, path: "403" if "params%2Fd" in path and "alt=media" in path else None  # noqa: E731
    with shop.fault(lost), pytest.raises(ConnectionError, match=r"made by the test.*Check the network"):
        fetch(f"{shop.address}/models/pi0")
    path = fetch(f"{shop.address}/models/pi0")
    fetched = [path for path in downloads(shop) if "params%2Fd" not in path]
    assert len(fetched) == len(set(fetched)) == 2, "downloaded a file twice"
    assert files(path) == {
        "params/a": b"first",
        "params/d/b": b"second",
        "params0": b"not in the folder",
        ".fetched": b"",
    }


def test_gs_missing(shop: Bucket, cache: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"models/pi: .*no such file or folder"):
        fetch(f"{shop.address}/models/pi")
    assert not cache.exists()


def test_a_large_file_comes_in_pieces(shop: Bucket, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also when transfers are cut off, or the server is unavailable for a moment."""
    content = os.urandom(1_000_001)
    put(shop, {"large": content})
    monkeypatch.setattr(pi0.fetch, "PIECE", 100_000)
    cut, unavailable = times(1, "cut", "GET", "alt=media"), times(1, "503", "GET", "alt=media")
    with shop.fault(lambda *request: cut(*request) or unavailable(*request)):
        assert fetch(f"{shop.address}/large").read_bytes() == content
    assert len(downloads(shop)) == 11 + 2


def test_a_file_that_changes_meanwhile_is_not_kept(shop: Bucket, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put(shop, {"large": b"a" * 300})
    monkeypatch.setattr(pi0.fetch, "PIECE", 100)
    left = [2]

    def change(method: str, path: str) -> None:
        left[0] -= "alt=media" in path
        if not left[0]:
            left[0] = -1
            put(shop, {"large": b"b" * 300})

    with shop.fault(change), pytest.raises(ConnectionError, match="changed while it was fetched"):
        fetch(f"{shop.address}/large")
    assert not files(cache)


def test_more_than_the_disk_has_is_refused(shop: Bucket, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda folder: SimpleNamespace(free=20))
    with pytest.raises(OSError, match=r"to fetch, and .* left"):
        fetch(f"{shop.address}/models/base")
    assert not files(cache) and not downloads(shop)


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


def test_a_host_that_is_not_found_is_no_fault_of_the_disk():
    """Its error is an OSError with a number, as those of a full disk are: it names the address and what to do."""
    aiohttp = pytest.importorskip("aiohttp")
    key = SimpleNamespace(host="storage.googleapis.com", port=443, ssl=True)
    said = pytest.raises(ConnectionError, match=r"cannot read gs://bucket/file: .*Check the network")
    with said, requests("cannot read gs://bucket/file"):
        raise aiohttp.ClientConnectorDNSError(key, OSError(-2, "Name or service not known"))
    with pytest.raises(OSError, match="No space left") as full, requests("cannot read gs://bucket/file"):
        raise OSError(28, "No space left on device")
    assert not isinstance(full.value, ConnectionError)
