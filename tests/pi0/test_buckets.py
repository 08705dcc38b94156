"""Paths in a bucket: the same functions as for a path of this machine, and what they promise, under faults too."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from pi0.storage import as_path, delete, is_bucket, list_files, move, new_folder, upload, write_text
from tests.bucket import Bucket, times

OURS = {"marker": ("weights",), "files": ("part-*",)}


def contents(folder: Path) -> dict[str, str]:
    return {name: file.path.read_text() for name, file in list_files(folder).items()}


@pytest.fixture(params=["bucket", "s3", "tmp_path"])
def root(request: pytest.FixtureRequest) -> Path:
    """A folder that is not there, in a bucket or on this machine."""
    where = request.getfixturevalue(request.param)
    return as_path(f"{where.address if request.param == 'bucket' else where}/root")


def test_one_type_of_path(root: Path) -> None:
    file = root / "folder" / "file.json"
    assert not file.exists() and not root.is_dir() and list_files(root) == {}
    write_text(file, "π")
    write_text(file, "π0")
    assert file.read_text(encoding="utf-8") == "π0" and file.is_file() and root.is_dir()
    with file.open("rb") as stream:
        assert stream.read(2) == "π".encode()
    assert [entry.name for entry in root.iterdir()] == ["folder"]
    assert [(name, one.size) for name, one in list_files(root).items()] == [("folder/file.json", 3)]
    move(root / "folder", root / "moved")
    assert contents(root) == {"moved/file.json": "π0"}
    delete(root)
    delete(root)
    assert not root.exists()
    assert is_bucket(root) == ("://" in str(root)) and not is_bucket(as_path("where"))


@pytest.mark.parametrize(
    "address", ["gs://pi0-tests/../x", "gs:/bucket/x", "gs://B/x", "http://host/x", Path("gs://bucket/x"), "gs://b/a\0"]
)
def test_other_addresses_are_refused(address: str | Path, bucket_server: object) -> None:
    with pytest.raises(ValueError, match=r"neither a path of this machine|no name of a bucket|without '\.\.'"):
        as_path(address)


def test_a_bucket_needs_an_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"gcsfs: pip install 'pi0\[gcs\]'"):
        as_path("gs://bucket/x")


def test_what_another_process_writes_is_seen(bucket: Bucket) -> None:
    import tensorstore as ts

    folder = as_path(bucket.address)
    assert not (folder / "file").exists() and list_files(folder) == {}
    name, _, key = bucket.address.removeprefix("gs://").partition("/")
    ts.KvStore.open({"driver": "gcs", "bucket": name, "path": f"{key}/"}).result()["file"] = b"text"
    assert (folder / "file").exists() and contents(folder) == {"file": "text"}


def test_a_new_folder_is_known_by_its_last_file(bucket: Bucket) -> None:
    target = as_path(f"{bucket.address}/target")
    with new_folder(target, **OURS) as folder:
        for name in ("a", "part-1", "weights", "z"):
            (folder / name).write_text(name)
    written = [path for method, path in bucket.requests if method == "POST" and "upload" in path]
    assert len(written) == 4 and contents(target)["weights"] == "weights"
    with pytest.raises(FileExistsError, match="exists already"), new_folder(target, **OURS):
        pass
    with pytest.raises(FileExistsError, match="other files: a, z"), new_folder(target, True, **OURS):
        pass


def test_the_old_folder_stays_until_the_new_one_is_there(bucket: Bucket) -> None:
    target = as_path(f"{bucket.address}/target")
    for name in ("weights", "part-2"):
        write_text(target / name, "old")
    with bucket.fault(lambda method, path: "403" if "/upload/" in path else None):
        with pytest.raises(ConnectionError, match="made by the test"), new_folder(target, True, **OURS) as folder:
            (folder / "weights").write_text("new")
        assert contents(target.parent) == {"target/part-2": "old", "target/weights": "old"}
    with new_folder(target, True, **OURS) as folder:
        (folder / "weights").write_text("new")
    assert contents(target.parent) == {"target/weights": "new"}


def test_lost_access_in_the_middle_leaves_nothing(bucket: Bucket, tmp_path: Path) -> None:
    for i in range(5):
        (tmp_path / f"part-{i}").write_text("text")
    (tmp_path / "weights").write_text("text")
    left = [3]

    def fault(method: str, path: str) -> str | None:
        left[0] -= "/upload/" in path
        return "403" if "/upload/" in path and left[0] < 0 else None

    target = as_path(f"{bucket.address}/target")
    with bucket.fault(fault), pytest.raises(ConnectionError, match="cannot write"), new_folder(target, **OURS) as made:
        upload(tmp_path, made)
    assert not target.exists()


@pytest.mark.parametrize("fault", ["503", "slow"])
def test_requests_are_repeated(fault: str, bucket: Bucket) -> None:
    file = as_path(bucket.address) / "file"
    with bucket.fault(times(1, fault, "POST", "/upload/")):
        write_text(file, "text")
    with bucket.fault(times(1, fault, "GET", "file")):
        assert file.read_text() == "text"


def test_a_large_file_is_uploaded_in_pieces(bucket: Bucket, tmp_path: Path) -> None:
    content = os.urandom(6 << 20)
    (tmp_path / "weights").write_bytes(content)
    upload(tmp_path, as_path(bucket.address))
    assert (as_path(bucket.address) / "weights").read_bytes() == content
    assert any(method in ("PUT", "POST") and "resumable" in path for method, path in bucket.requests)
