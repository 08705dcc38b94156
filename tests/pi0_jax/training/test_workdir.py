"""A run's folder: of one run at a time, and nothing in it is lost by a start that fails."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import pytest
from etils import epath

from pi0.assets import Assets
from pi0.datasets.identity import contents_of
from pi0.training.lock import lock
from pi0.training.workdir import RunFolder, check_workdir, recorded_config
from pi0_jax.training.checkpoints import CHECKSUMS, Checkpoints, damage
from pi0_jax.training.train import train
from tests.bucket import free_port
from tests.small_run import small_config

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """A run of two steps."""
    workdir = tmp_path_factory.mktemp("finished")
    train(small_config(steps=2, eval_every=0), workdir)
    return workdir


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    import shutil

    return Path(shutil.copytree(finished, tmp_path / "run"))


def contents(folder: Path) -> dict[str, bytes]:
    files = (f for f in folder.rglob("*") if f.is_file() and f.name != ".lock")
    return {str(f.relative_to(folder)): f.read_bytes() for f in files}


def diverging(**changes):
    return small_config(optimizer={"peak_lr": 1e30, "warmup_steps": 1, "clip_norm": 1e30}, eval_every=0, **changes)


def test_two_runs_at_once(tmp_path: Path) -> None:
    held = lock(tmp_path)
    with pytest.raises(ValueError, match=rf"in use by another run \(process {os.getpid()} on .*\); wait"):
        lock(tmp_path)
    held.close()
    lock(tmp_path).close()


def test_the_lock_of_a_process_that_was_killed(tmp_path: Path) -> None:
    script = "import sys, time; from pathlib import Path; from pi0.training.lock import lock; "
    script += "held = lock(Path(sys.argv[1])); print('locked', flush=True); time.sleep(100)"
    other = subprocess.Popen([sys.executable, "-c", script, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert other.stdout.readline() == "locked\n"
    with pytest.raises(ValueError, match=f"process {other.pid} on"):
        RunFolder(tmp_path, small_config()).__enter__()
    assert [f.name for f in tmp_path.iterdir()] == [".lock"]
    other.kill()
    other.wait()
    with RunFolder(tmp_path, small_config()):
        assert (tmp_path / "config.json").exists()


def test_a_bucket_that_checkpoints_are_not_written_to() -> None:
    with pytest.raises(ValueError, match=r"s3://bucket/run: checkpoints are written to .* and to gs:// alone"):
        check_workdir(epath.Path("s3://bucket/run"), small_config())


def test_a_failed_start_blocks_nothing(tmp_path: Path) -> None:
    workdir = tmp_path / "run"
    with pytest.raises((ValueError, OSError), match="nowhere"):
        train(small_config(base_checkpoint=str(tmp_path / "nowhere")), workdir)
    assert recorded_config(workdir) is None
    with RunFolder(workdir, small_config(batch_size=4)):
        assert json.loads((workdir / "config.json").read_text())["batch_size"] == 4


@pytest.mark.parametrize("text", ['{"batch', "", "[]", "\xff"])
def test_a_torn_config_is_told_by_the_checkpoint(text: str, run: Path) -> None:
    (run / "config.json").write_bytes(text.encode("latin-1"))
    assert recorded_config(run) == small_config(steps=2, eval_every=0)
    with pytest.raises(ValueError, match="batch_size was 8 and is 4"):
        train(small_config(batch_size=4), run)


def test_a_config_that_was_changed_is_not_believed(run: Path) -> None:
    """The checkpoints say what they were trained with, and are signed."""
    (run / "config.json").write_text(json.dumps(small_config(batch_size=4).to_dict()))
    with pytest.raises(ValueError, match="batch_size was 8 and is 4"):
        train(small_config(batch_size=4), run)


@pytest.mark.parametrize("overwrite", [True, False])
def test_folders_of_something_else(overwrite: bool, tmp_path: Path) -> None:
    export, lerobot = tmp_path / "export", tmp_path / "lerobot"
    export.mkdir()
    (export / "config.json").write_text('{"format": "pi0"}')
    (export / "model.safetensors").write_text("weights of weeks")
    (lerobot / "checkpoints" / "020000").mkdir(parents=True)
    before = contents(tmp_path)
    for folder in (export, lerobot):
        with pytest.raises(ValueError, match="is not a run's folder"):
            train(small_config(), folder, overwrite=overwrite)
    assert contents(tmp_path) == before


@pytest.mark.parametrize(
    "changes", [{"data": {"root": "/no/such/dataset"}}, {"base_checkpoint": "/no/such/checkpoint"}, {"diverging": True}]
)
def test_overwrite_deletes_nothing_for_a_run_that_cannot_start(changes: dict, run: Path) -> None:
    (run / "notes.md").write_text("mine")
    before = contents(run)
    config = diverging(save_every=2) if "diverging" in changes else small_config(**changes)
    with pytest.raises((ValueError, OSError, FloatingPointError)):
        train(config, run, overwrite=True)
    after = contents(run)
    after.pop("non_finite.json", None)
    assert after == before


def test_overwrite_replaces_the_run_and_nothing_else(run: Path) -> None:
    (run / "notes.md").write_text("mine")
    train(small_config(steps=3, batch_size=4, eval_every=0, save_every=1), run, overwrite=True)
    assert sorted(f.name for f in (run / "checkpoints").iterdir()) == ["2", "3"]
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert rows[0]["step"] == 1 and recorded_config(run).batch_size == 4
    assert (run / "notes.md").exists() and not (run / ".replaced").exists()


HOST = """
import sys
from pathlib import Path
import jax
from pi0.training.workdir import RunFolder, recorded_config
from pi0_jax.training.sharding import barrier, start_processes
coordinator, index, run = sys.argv[1:]
start_processes(coordinator, 2, int(index))
config = recorded_config(Path(run))
jax.devices()  # otherwise JAX waits for the other process when it is first used
print("started", flush=True)
sys.stdin.readline()
with RunFolder(Path(run), config, overwrite=True, index=jax.process_index(), barrier=barrier):
    print("begun", flush=True)
    sys.stdin.readline()
"""


@pytest.mark.slow
def test_overwrite_waits_for_all_hosts(run: Path) -> None:
    """A host that is late finds the old run as it was, and nothing is replaced without it."""
    before = contents(run)
    pipes: Any = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    environment = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", HOST, f"127.0.0.1:{free_port()}"]
    hosts = [subprocess.Popen([*command, str(i), str(run)], env=environment, **pipes) for i in range(2)]
    try:
        assert [host.stdout.readline() for host in hosts] == ["started\n"] * 2
        say(hosts[0])
        time.sleep(2)
        assert contents(run) == before and hosts[0].poll() is None
        say(hosts[1])
        assert [host.stdout.readline() for host in hosts] == ["begun\n"] * 2
        assert not (run / "checkpoints").exists() and (run / ".replaced" / "checkpoints").exists()
        for host in hosts:
            say(host)
        assert [host.wait(60) for host in hosts] == [0, 0]
    finally:
        for host in hosts:
            host.kill()
            host.communicate()
    assert contents(run) == before, "a run that ends without a checkpoint replaces nothing"


def say(host: subprocess.Popen[str]) -> None:
    assert host.stdin is not None
    host.stdin.write("\n")
    host.stdin.flush()


def test_a_run_that_was_killed_while_it_replaced_another(run: Path) -> None:
    before = contents(run)
    folder = RunFolder(run, small_config(batch_size=4), overwrite=True)
    folder.__enter__()
    folder._lock.close()  # as by SIGKILL
    assert not (run / "checkpoints").exists()
    with pytest.raises(ValueError, match="batch_size was 8 and is 4"):
        train(small_config(batch_size=4), run)
    assert contents(run) == before


def test_diverged_parameters_are_not_saved(tmp_path: Path) -> None:
    """Between two lines of the log, too; the checkpoints before stay."""
    train(small_config(steps=2, eval_every=0, save_every=1), tmp_path)
    config = diverging(steps=9, log_every=100, save_every=1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pi0.training.workdir.FREE", ("steps", "log_every", "save_every", "eval_every", "optimizer"))
        with pytest.raises(FloatingPointError, match=r"step \d is not finite, and nothing was saved"):
            train(config, tmp_path)
    steps = sorted(int(f.name) for f in (tmp_path / "checkpoints").iterdir() if f.name.isdigit())
    assert steps and all(damage(tmp_path / "checkpoints" / str(step)) is None for step in steps)
    for step in steps:
        from convert.checkpoints import open_checkpoint

        tensors = open_checkpoint(tmp_path, step=step).ours.values()
        assert all(jnp.isfinite(tensor.read(())).all() for tensor in tensors)


def test_a_diverged_checkpoint_of_an_older_version_is_put_aside(tmp_path: Path, capsys) -> None:
    checkpoints = Checkpoints(tmp_path, keep=5)
    state = {"params": {"a": jnp.ones(3)}, "frozen": {}, "ema": None}
    bad = {**state, "params": {"a": jnp.array([1.0, jnp.nan, 1.0])}}
    for step, tree in ((1, state), (2, bad)):
        checkpoints.save(step, tree["params"], tree, Assets(small_config().model), {"validation_loss": jnp.nan})
    checkpoints.close()
    step, restored = Checkpoints(tmp_path, keep=5).restore_newest(state)
    assert step == 1 and restored["params"]["a"].tolist() == [1, 1, 1]
    assert "checkpoint 2 is damaged and put aside as damaged-2: it has NaN" in capsys.readouterr().out


def test_checksums_that_were_lost_or_emptied(run: Path, capsys) -> None:
    step = run / "checkpoints" / "2"
    for text, said in (("{}", "was it emptied"), ("[1]", "holds list"), ('{"a": 3}', "is no table")):
        (step / CHECKSUMS).write_text(text)
        assert damage(step) and CHECKSUMS in damage(step) and said
    (step / CHECKSUMS).unlink()
    assert damage(step) is None
    train(small_config(steps=2, eval_every=0), run)
    assert (
        "checkpoint 2 has no checksums.json: all of its arrays were read; it is signed again" in capsys.readouterr().out
    )
    assert (step / CHECKSUMS).exists()
    (step / "params" / "d" / "more").write_text("of somebody else")
    assert damage(step) == "params/d/more is not listed in checksums.json"


def test_what_may_change_when_a_run_goes_on(run: Path, tmp_path: Path) -> None:
    """What changes no batch: also the place of the data, but not what is in it."""
    import shutil

    data = Path(shutil.copytree(ROOT / "pi0" / "sample" / "metaworld_v30", tmp_path / "moved"))
    config = small_config(steps=2, eval_every=0)
    same = {"cache": "memory", "root": str(data), "workers": 0}
    remat = "none" if config.model.runtime.remat != "none" else "full"
    runtime = dataclasses.replace(config.model.runtime, remat=remat)
    moved = dataclasses.replace(
        config,
        accumulate=2,
        data=dataclasses.replace(config.data, **same),
        model=dataclasses.replace(config.model, runtime=runtime),
    )
    contents = [contents_of(source) for source in config.data.sources]
    assert contents == [contents_of(source) for source in moved.data.sources]
    with RunFolder(run, moved, contents=contents):
        pass
    (data / "meta" / "info.json").write_text((data / "meta" / "info.json").read_text() + " ")
    other = [contents_of(source) for source in moved.data.sources]
    with pytest.raises(ValueError, match=r"other data: .*moved is not what it was when the run began"):
        RunFolder(run, moved, contents=other).__enter__()
    (run / "data.json").unlink()  # of a run that was begun by an earlier version
    with pytest.raises(ValueError, match=r"another config: data.root was"):
        RunFolder(run, moved, contents=contents).__enter__()


def test_metrics_of_steps_that_are_done_again_are_replaced(run: Path) -> None:
    """Also lines that were cut off."""
    file = run / "metrics.jsonl"
    before = file.read_text()
    file.write_text(before + json.dumps({"step": 3, "loss": 1.0}) + "\n" + '{"step": 3, "lo')
    train(small_config(steps=3, eval_every=0), run)
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert file.read_text().startswith(before) and [row["step"] for row in rows] == [1, 2, 3]
    assert rows[-1]["loss"] != 1.0
