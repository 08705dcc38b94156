"""A run whose folder, base checkpoint and compilation cache are in a bucket."""

from __future__ import annotations

import dataclasses
import json
import re
import time
from pathlib import Path

import pytest

import pi0.training.lock
from convert.checkpoints import open_checkpoint
from convert.checksums import CHECKSUMS
from pi0.storage import as_path, delete, delete_version, list_files, version, write_text
from pi0.training.lock import EXPIRY, lock
from pi0.training.workdir import completed
from pi0_jax.training.checkpoints import damage
from pi0_jax.training.train import train
from tests.bucket import Bucket, times
from tests.small_run import small_config


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PI0_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def steps_of(workdir: Path) -> list[int]:
    return [json.loads(line)["step"] for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def test_a_run_in_a_bucket(bucket: Bucket, tmp_path: Path, monkeypatch, capsys) -> None:
    """Trained, resumed past a damaged checkpoint, replaced; the same parameters as on a disk."""
    monkeypatch.chdir(tmp_path)
    address = f"{bucket.address}/run"
    workdir = as_path(address)
    train(small_config(steps=2, eval_every=0), address)
    assert [folder.name for folder in completed(workdir)] == ["2"]
    train(small_config(eval_every=0), address)
    names = list_files(workdir)
    step = "checkpoints/4"
    assert {"config.json", "data.json", f"{step}/commit_success.txt", f"{step}/checksums.json"} <= set(names)
    assert any(name.startswith("tensorboard/") for name in names) and any(n.startswith("images/") for n in names)
    assert ".lock" not in names and steps_of(workdir) == [1, 2, 3, 4]
    train(small_config(eval_every=0), tmp_path / "disk")
    wanted = {n: t.read(()).tobytes() for n, t in open_checkpoint(tmp_path / "disk").ours.items()}
    assert {n: t.read(()).tobytes() for n, t in open_checkpoint(address, in_place=True).ours.items()} == wanted

    largest = max((f for n, f in names.items() if n.startswith("checkpoints/4/train_state/")), key=lambda f: f.size)
    with largest.path.open("rb") as stream:
        content = stream.read()
    with largest.path.open("wb") as stream:
        stream.write(content[:-1] + bytes([content[-1] ^ 1]))
    train(small_config(eval_every=0), address)
    assert "checkpoint 4 is damaged and put aside as damaged-4" in capsys.readouterr().out
    names = list_files(workdir)
    assert "checkpoints/damaged-4/checksums.json" in names and [f.name for f in completed(workdir)] == ["2", "4"]
    assert steps_of(workdir) == [1, 2, 3, 4]
    assert {n: t.read(()).tobytes() for n, t in open_checkpoint(address, in_place=True).ours.items()} == wanted

    train(small_config(steps=2, seed=1, eval_every=0), address, overwrite=True)
    assert [folder.name for folder in completed(workdir)] == ["2"] and not (workdir / ".replaced").exists()
    assert sorted(folder.name for folder in tmp_path.iterdir()) == ["cache", "disk"]


def parameters(address: str | Path) -> dict[str, bytes]:
    ours = open_checkpoint(address, ema=False, in_place=True).ours
    return {name: tensor.read(()).tobytes() for name, tensor in ours.items()}


def test_lost_access_while_a_checkpoint_is_written(bucket: Bucket, capsys) -> None:
    """The error names the place and what is left, which is whole; what cannot be read is not taken for damaged."""
    workdir, step = as_path(f"{bucket.address}/run"), "checkpoints%2F2"
    refused = [False]

    def lose_access(method: str, path: str) -> str | None:
        refused[0] |= method == "POST" and "/upload/" in path and step in path.replace("/2", "%2F2")
        return "403" if refused[0] else None

    config = small_config(steps=3, save_every=1, eval_every=0)
    written = rf"cannot be written; the newest one is that of step 1, .*no access to {workdir}.*made by the test"
    with bucket.fault(lose_access), pytest.raises(OSError, match=re.compile(written, re.DOTALL)):
        train(config, workdir)
    assert refused[0] and f"{workdir} is left to the next run to tidy up" in capsys.readouterr().out
    assert [folder.name for folder in completed(workdir)] == ["1"]
    first = workdir / "checkpoints" / "1"
    assert damage(first) is None
    begin = time.monotonic()
    with (
        bucket.fault(lambda method, path: "401" if "train_state" in path else None),
        pytest.raises(ConnectionError, match=rf"{first}.*made by the test"),
    ):
        train(config, workdir)
    assert time.monotonic() < begin + EXPIRY, "it waited for the lock that it had left itself"
    delete(first / CHECKSUMS)  # then all of it is read
    for part in ("config.json", "d%2F", "manifest.ocdbt"):
        fault = bucket.fault(lambda method, path, part=part: "403" if part in path.replace("/d/", "%2Fd%2F") else None)
        with fault, pytest.raises(ConnectionError, match="made by the test"):
            damage(first)
    assert [folder.name for folder in completed(workdir)] == ["1"]


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["503", "slow", "cut", "lost"])
def test_a_run_goes_on_under_faults(fault: str, bucket: Bucket, tmp_path: Path) -> None:
    """503 for 20 seconds; each first transfer slow, cut off, or done and not answered: in writing, and in reading."""
    config, workdir = small_config(eval_every=0), as_path(f"{bucket.address}/run")
    train(config, tmp_path / "disk")
    for steps in (2, 4):
        seen: set[tuple[str, str]] = set()
        begun: list[float] = []

        def decide(method: str, path: str, seen=seen, begun=begun) -> str | None:
            if "checkpoints" not in path:
                return None
            begun.append(time.monotonic())
            if fault == "503":
                return fault if begun[-1] < begun[0] + 20 else None
            request = method, re.sub(r"\btensorstore=\w+", "", path)  # a number of each attempt
            first = request not in seen
            seen.add(request)
            return fault if first else None

        with bucket.fault(decide):
            train(dataclasses.replace(config, steps=steps), workdir)
        assert begun
    assert [folder.name for folder in completed(workdir)] == ["2", "4"]
    assert not [name for name in list_files(workdir) if "damaged" in name]
    assert parameters(workdir) == parameters(tmp_path / "disk")


def test_a_lock_in_a_bucket(bucket: Bucket, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.setattr(pi0.training.lock, "RENEW", 0.2)
    monkeypatch.setattr(pi0.training.lock, "EXPIRY", 2.0)
    workdir = as_path(bucket.address)
    held = lock(workdir)
    with pytest.raises(ValueError, match=r"in use by another run \(process \d+ on .*\); wait"):
        lock(workdir)
    held.check()
    held.close()
    assert not (workdir / ".lock").exists() and "locked by" in capsys.readouterr().out
    with bucket.fault(times(1, "lost", "POST", "/upload/")):
        lock(workdir).close()
    assert "locked by" not in capsys.readouterr().out  # by itself
    write_text(workdir / ".lock", json.dumps({"process": 1, "host": "elsewhere", "run": "x"}))
    held = lock(workdir)  # that was not renewed
    assert "locked by process 1 on elsewhere: watching" in capsys.readouterr().out
    write_text(workdir / ".lock", json.dumps({"process": 2, "host": "elsewhere", "run": "y"}))
    held._thread.join()
    with pytest.raises(ValueError, match=r"taken over by another run .process 2 on elsewhere"):
        held.check()
    held.close()
    assert (workdir / ".lock").exists()
    delete(workdir)


def test_a_lock_that_was_written_meanwhile_is_not_deleted(bucket: Bucket) -> None:
    """The server of the tests ignores the condition of a deletion: it is seen in the request, and 412 answered here."""
    file = as_path(bucket.address) / ".lock"
    write_text(file, "of another run")
    seen = version(file)
    write_text(file, "of another run, renewed")
    assert version(file) != seen
    with bucket.fault(lambda method, path: "412" if f"ifGenerationMatch={seen}" in path else None):
        delete_version(file, seen)
    assert [method for method, path in bucket.requests if f"ifGenerationMatch={seen}" in path] == ["DELETE"]
    assert file.read_text() == "of another run, renewed"
    delete_version(file, version(file))
    assert not file.exists()
