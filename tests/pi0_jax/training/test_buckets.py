"""A run whose folder, base checkpoint and compilation cache are in a bucket."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import pi0_jax.training.lock
from convert.checkpoints import open_checkpoint
from pi0.storage import as_path, delete, list_files, write_text
from pi0_jax.training.lock import lock
from pi0_jax.training.train import train
from pi0_jax.training.workdir import completed
from tests.bucket import Bucket
from tests.pi0_jax.training.test_train import small_config


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


def test_a_lock_in_a_bucket(bucket: Bucket, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.setattr(pi0_jax.training.lock, "RENEW", 0.2)
    monkeypatch.setattr(pi0_jax.training.lock, "EXPIRY", 2.0)
    workdir = as_path(bucket.address)
    held = lock(workdir)
    with pytest.raises(ValueError, match=r"in use by another run \(process \d+ on .*\); wait"):
        lock(workdir)
    held.check()
    held.close()
    assert not (workdir / ".lock").exists()
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
