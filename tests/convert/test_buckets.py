"""Checkpoints in a bucket: converted, inspected and read there, each in the parts that are needed."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import numpy as np
import pytest

from convert.checkpoints import open_checkpoint, read_tensors
from convert.conversion import main
from convert.inspection import inspect
from convert.tensors import CheckpointError
from pi0.storage import as_path, list_files, upload
from tests.bucket import Bucket

GOLDEN = Path(__file__).parents[1] / "golden" / "pi0" / "checkpoint"


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PI0_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("exported") / "torch"
    main([str(GOLDEN), str(folder), "--to", "pi0_torch"])
    return folder


def parameters(source: str | Path, **options: bool) -> dict[str, bytes]:
    return {name: tensor.read(()).tobytes() for name, tensor in open_checkpoint(source, **options).ours.items()}


def names(folder: Path) -> set[str]:
    return {f.relative_to(folder).as_posix() for f in folder.rglob("*") if f.is_file()}


@pytest.mark.parametrize("to", ["pi0_torch", "pi0_jax"])
def test_converted_from_a_bucket_to_a_bucket(to: str, bucket: Bucket, cache: Path, capsys) -> None:
    upload(GOLDEN, as_path(f"{bucket.address}/base"))
    source, target = f"{bucket.address}/base", f"{bucket.address}/made"
    main([source, target, "--to", to])
    assert parameters(target, in_place=True) == parameters(GOLDEN)
    assert not any(n.endswith(".safetensors") or "params" in n for n in names(cache)), "weights were fetched"
    assert parameters(target) == parameters(GOLDEN)  # fetched
    with pytest.raises(SystemExit):
        main([source, target, "--to", to])
    assert "exists already" in capsys.readouterr().err
    main([source, target, "--to", "pi0_jax", "--overwrite"])
    assert not any(n.endswith(".safetensors") for n in list_files(as_path(target)))
    assert parameters(target, in_place=True) == parameters(GOLDEN)
    with pytest.raises(SystemExit):
        main([target, target, "--to", to, "--overwrite"])
    assert "lies in the source" in capsys.readouterr().err


@pytest.mark.slow
def test_s3(s3: str, exported: Path, capsys) -> None:
    """Both formats, written there and read there, and replaced."""
    for to, source in (("pi0_jax", str(exported)), ("pi0_torch", f"{s3}/pi0_jax")):
        main([source, f"{s3}/{to}", "--to", to])
        assert parameters(f"{s3}/{to}", in_place=True) == parameters(GOLDEN)
    main([f"{s3}/pi0_torch", f"{s3}/pi0_jax", "--to", "pi0_jax", "--overwrite"])
    assert parameters(f"{s3}/pi0_jax") == parameters(GOLDEN)  # fetched
    with pytest.raises(FileNotFoundError, match="no such file or folder"):
        open_checkpoint(f"{s3}/gone", in_place=True)


def test_the_folder_of_weights_itself(bucket: Bucket) -> None:
    upload(GOLDEN, as_path(f"{bucket.address}/base"))
    found = open_checkpoint(f"{bucket.address}/base/params", in_place=True)
    assert found.assets.norm_stats is None or found.assets.norm_stats
    assert {n: t.read(()).tobytes() for n, t in found.ours.items()} == parameters(GOLDEN)
    assert inspect(f"{bucket.address}/base/params").parameters == inspect(GOLDEN).parameters


def test_nothing_there(bucket: Bucket) -> None:
    for in_place in (True, False):
        with pytest.raises(FileNotFoundError, match="no such file or folder"):
            read_tensors(f"{bucket.address}/gone", in_place=in_place)


def test_a_part_is_all_that_is_read(bucket: Bucket, exported: Path) -> None:
    """Of a safetensors file its rows; of Orbax the chunks."""
    upload(exported, as_path(f"{bucket.address}/torch"))
    tensors = read_tensors(f"{bucket.address}/torch", in_place=True).tensors
    whole = read_tensors(exported).tensors
    for index in ((), (1,), (-1,), (slice(1, 3),), (slice(2, 0, -1),), (slice(0, 0),), (slice(None), 0)):
        for name, tensor in whole.items():
            if len(tensor.shape) > max(len(index) - 1, 0) and min(tensor.shape, default=0) > 2:
                np.testing.assert_array_equal(tensors[name].read(index), tensor.read(index), err_msg=f"{name} {index}")


def test_boxes_of_parameters(exported: Path) -> None:
    """`Tensor.part`, in every layout."""
    for source in (GOLDEN, exported):
        for name, tensor in open_checkpoint(source).ours.items():
            box = tuple(slice(size // 2, size) for size in tensor.shape)
            np.testing.assert_array_equal(tensor.part(box), tensor.read(())[box], err_msg=name)


def test_damaged_in_the_bucket(bucket: Bucket, tmp_path: Path) -> None:
    shutil.copytree(GOLDEN, tmp_path / "damaged")
    for file in (tmp_path / "damaged" / "params").rglob("d/*"):
        file.write_bytes(file.read_bytes()[:-10])
    upload(tmp_path / "damaged", as_path(f"{bucket.address}/damaged"))
    with pytest.raises(CheckpointError, match="cannot be"):
        parameters(f"{bucket.address}/damaged", in_place=True)


@pytest.mark.parametrize("skipped", [0, 2])  # of the requests: then it is known to be there
@pytest.mark.parametrize("answer", ["401", "403"])
def test_unreachable_is_not_damaged(skipped: int, answer: str, bucket: Bucket, exported: Path) -> None:
    upload(exported, as_path(f"{bucket.address}/torch"))
    seen: list[str] = []

    def refuse(method: str, path: str) -> str | None:
        seen.extend([path] if "model.safetensors" in path else [])
        return answer if len(seen) > skipped and seen[-1] == path else None

    named = re.compile(rf"cannot read {bucket.address}/torch.*made by the test", re.DOTALL)
    with bucket.fault(refuse), pytest.raises(ConnectionError, match=named):
        open_checkpoint(f"{bucket.address}/torch", in_place=True)
    assert len(seen) > skipped
