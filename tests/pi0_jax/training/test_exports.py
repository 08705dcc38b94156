"""Checkpoints that are exported and compared beside training: what is logged and marked, and what a stop leaves."""

from __future__ import annotations

import json
import logging
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from convert.checkpoints import open_checkpoint
from convert.inspection import inspect
from pi0.storage import as_path, list_files
from pi0.training.metrics import Metrics
from pi0_jax.training import exports
from pi0_jax.training.checkpoints import Checkpoints, damage
from pi0_jax.training.exports import Exports
from pi0_jax.training.train import train
from tests.bucket import Bucket
from tests.small_run import small_config

# The program, with a conversion that makes one kernel of step 4 a thousandth larger.
FAULTY = """
import convert.conversion as conversion
import numpy as np
from convert.tensors import Tensor
from pi0_jax.training.prove import main

write = conversion.write_checkpoint

def write_wrong(checkpoint, folder, layout):
    if checkpoint.assets.step == 4:
        name = "paligemma.layers.mlp.up.kernel"
        checkpoint.ours[name] = Tensor.of(checkpoint.ours[name].read(()) * np.float32(1.001))
    write(checkpoint, folder, layout)

conversion.write_checkpoint = write_wrong
conversion.verify_equal = lambda a, b: None
main()
"""
# One that only writes a report: {} of the step's folder name.
REPORT = """
import json, pathlib, sys
folder = pathlib.Path(sys.argv[2])
folder.mkdir(parents=True, exist_ok=True)
report = {"passed": True, "share": 0.5, "first_failure": None}
(folder / "parity.json").write_text(json.dumps(report))
"""
REFUSED = "import sys; sys.exit('export: the disk is full')"
ENDLESS = """
import pathlib, sys, time
from pi0_jax.training import prove

def convert(checkpoint, export, **options):
    folder = pathlib.Path(export).parent / ".begun"
    folder.mkdir(parents=True)
    try:
        time.sleep(600)
    finally:
        folder.rmdir()

prove.convert = convert
prove.main()
"""


def programs(monkeypatch: pytest.MonkeyPatch, script: str) -> None:
    monkeypatch.setattr(exports, "PROGRAM", (sys.executable, "-c", script))


def rows(workdir: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def compared(workdir: Path) -> list[tuple[float, float]]:
    """Step and verdict of each comparison that is logged."""
    return [(row["step"], row["parity/passed"]) for row in rows(workdir) if "parity/passed" in row]


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> tuple[Path, dict[str, float], str]:
    """A run of four steps that exports two checkpoints, the second wrongly: its folder, metrics and output."""
    workdir, said = tmp_path_factory.mktemp("run"), []
    with pytest.MonkeyPatch.context() as patch:
        programs(patch, FAULTY)
        patch.setattr(exports.tqdm, "write", said.append)
        metrics = train(small_config(eval_every=0, keep_checkpoints=1, export_every=2), workdir)
    return workdir, metrics, "\n".join(said)


def test_what_is_logged(run):
    workdir, metrics, said = run
    assert compared(workdir) == [(2, 1.0), (4, 0.0)]
    good, bad = (row for row in rows(workdir) if "parity/passed" in row)
    assert 0 < good["parity/share"] <= 1 < bad["parity/share"] and good["parity/seconds"] > 0
    assert metrics["parity/passed"] == 0 and "loss" in metrics
    assert "checkpoint 2 is equal to its export" in said and "checkpoint 4 is NOT equal to its export" in said


def test_a_checkpoint_that_fails_is_marked(run, caplog):
    """And its export; both are whole and intact, and all that was exported stays."""
    workdir, _, _ = run
    for kind in ("checkpoints", "exports"):
        assert sorted(f.name for f in (workdir / kind).iterdir()) == ["2", "4"]
        report = json.loads((workdir / kind / "4" / "parity.json").read_text())
        assert not report["passed"] and report["first_failure"] == "prefix layer 0" and len(report["stages"]) > 10
        (note,) = inspect(workdir / kind / "4").notes
        assert "FAILED" in note and "prefix layer 0" in note and not inspect(workdir / kind / "2").notes
        with caplog.at_level(logging.WARNING):
            caplog.clear()
            open_checkpoint(workdir / kind / "2")
            assert not caplog.records
            open_checkpoint(workdir / kind / "4")
            assert "FAILED its comparison" in caplog.text
    assert damage(workdir / "checkpoints" / "4") is None


def leave(workdir: Path, config, wait: Callable[[Exports], object] = lambda made: made.wait(lambda: False)) -> None:
    """Go on with a finished run: its exports alone."""
    checkpoints = Checkpoints(workdir / "checkpoints", 9)
    with (
        Metrics(workdir, config.steps, {}, total_steps=config.steps) as metrics,
        Exports(workdir, config, checkpoints, metrics) as made,
    ):
        wait(made)
    checkpoints.close()


@pytest.fixture
def folders(tmp_path: Path):
    """The folder of a run with three complete checkpoints that are never opened, and its config."""
    for step in (2, 3, 4):
        (tmp_path / "checkpoints" / str(step)).mkdir(parents=True)
    return tmp_path, small_config(save_every=1, export_every=2)


def test_what_was_not_done_is_done_once(folders, monkeypatch):
    workdir, config = folders
    programs(monkeypatch, REPORT)
    (workdir / "exports" / ".2.partial").mkdir(parents=True)
    (workdir / "checkpoints" / "2" / "parity.json").write_text('{"passed": false, "share": 3.0}')  # but not logged
    (workdir / "checkpoints" / "4" / "parity.json").write_text('{"passed": ')
    leave(workdir, config)
    assert compared(workdir) == [(2, 0.0), (4, 1.0)]
    assert [f.name for f in (workdir / "exports").iterdir()] == ["4"]
    for _ in range(2):
        leave(workdir, config)
    assert compared(workdir) == [(2, 0.0), (4, 1.0)]


def test_what_cannot_be_compared_is_said_and_tried_again(folders, monkeypatch, capsys):
    """An older report is not taken for the new one."""
    workdir, config = folders
    (workdir / "exports" / "4").mkdir(parents=True)
    (workdir / "exports" / "4" / "parity.json").write_text('{"passed": true, "share": 0.1}')
    programs(monkeypatch, REFUSED)
    leave(workdir, config)
    out = capsys.readouterr().out
    assert "checkpoint 4 was NOT compared with its export: export: the disk is full" in out
    assert not compared_files(workdir) and not (workdir / "metrics.jsonl").exists()
    programs(monkeypatch, REPORT)
    leave(workdir, config)
    assert compared(workdir) == [(2, 1.0), (4, 1.0)]


def compared_files(workdir: Path) -> list[Path]:
    return sorted(workdir.rglob("parity.json"))


def test_a_stop_ends_it_and_leaves_nothing(folders, monkeypatch):
    """The program cleans up after itself, as it does where its parent is killed: its standard input ends."""
    workdir, config = folders
    programs(monkeypatch, ENDLESS)

    def until_begun(made: Exports) -> None:
        deadline = time.perf_counter() + 120
        while not (workdir / "exports" / ".begun").exists() and time.perf_counter() < deadline:
            time.sleep(0.05)
        assert (workdir / "exports" / ".begun").exists()

    started = time.perf_counter()
    leave(workdir, config, until_begun)
    assert time.perf_counter() - started < 300 and not list((workdir / "exports").iterdir())
    assert not compared_files(workdir)


@pytest.mark.slow
def test_a_run_in_a_bucket(bucket: Bucket, tmp_path, monkeypatch):
    """Exported, compared and marked there; what was fetched for it is deleted."""
    cache = tmp_path / "cache"
    monkeypatch.setenv("PI0_CACHE", str(cache))
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    workdir = as_path(f"{bucket.address}/run")
    train(small_config(steps=2, eval_every=0, export_every=2), workdir)
    names = {f"{kind}/2/parity.json" for kind in ("checkpoints", "exports")} | {"exports/2/model.safetensors"}
    assert names <= set(list_files(workdir)) and compared(workdir) == [(2, 1.0)]
    train(small_config(steps=2, eval_every=0, export_every=2), workdir)
    assert compared(workdir) == [(2, 1.0)]
    assert not [f for f in tmp_path.iterdir() if f != cache] and not list(cache.rglob("*.safetensors"))


def test_needs_pytorch_by_name_before_anything_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr("pi0.plugins.importlib.util.find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"this needs torch: pip install 'pi0\[torch\]'"):
        train(small_config(export_every=2), tmp_path / "run")
    assert not (tmp_path / "run").exists()
