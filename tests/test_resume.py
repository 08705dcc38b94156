"""Runs that are killed, in processes of their own, and go on: every parameter of the end is that of a run left alone.

One parent of each framework imports everything and forks the runs, before a thread has started.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from convert.checkpoints import open_checkpoint

STEPS = 30
IMPORTS = {
    "jax": "import jax, optax, orbax.checkpoint\nfrom pi0_jax.training.train import Preempted, train",
    "torch": "import torch\nfrom pi0_torch.training.train import Preempted, train\ntorch.set_num_threads(1)",
}
PARTIAL = {"jax": "*tmp*", "torch": ".[0-9]*"}  # a checkpoint that is being written
RUN = f"""
import json, os, signal, sys, threading, time
from tests.small_run import small_config

def run(workdir):
    changes = {{"keep_checkpoints": 3, "batch_size": 2}}
    config = small_config(steps={STEPS}, save_every=3, eval_every=0, log_every=1000, **changes)
    train(config, workdir)

for line in sys.stdin:
    order = json.loads(line)
    child = os.fork()
    if not child:
        log = os.open(order["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1), os.dup2(log, 2)
        code = 1
        try:
            run(order["workdir"])
            code = 0
        except Preempted as stop:
            code = stop.exit_code
        except BaseException:
            import traceback
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            os._exit(code)
    print(child, flush=True)
    print(os.waitpid(child, 0)[1], flush=True)
"""


class Runs:
    """Starts training processes, one at a time."""

    def __init__(self, folder: Path, framework: str):
        environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1]), "JAX_PLATFORMS": "cpu"}
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self.log, self.partial = folder / "log", PARTIAL[framework]
        self._parent = subprocess.Popen([sys.executable, "-c", IMPORTS[framework] + RUN], env=environment, **pipes)

    def start(self, workdir: Path) -> int:
        """The process id of a run that has begun."""
        self._parent.stdin.write(json.dumps({"workdir": str(workdir), "log": str(self.log)}) + "\n")
        self._parent.stdin.flush()
        return int(self._parent.stdout.readline())

    def wait(self) -> int:
        """Until it ends; its exit code, or minus the signal that ended it."""
        return os.waitstatus_to_exitcode(int(self._parent.stdout.readline()))

    def close(self) -> None:
        self._parent.stdin.close()
        self._parent.wait()


@pytest.fixture(scope="module", params=["jax", "torch"])
def runs(tmp_path_factory, request):
    runs = Runs(tmp_path_factory.mktemp("log"), request.param)
    yield runs
    runs.close()


@pytest.fixture(scope="module")
def whole(runs, tmp_path_factory) -> tuple[dict[str, bytes], float, Path]:
    """The parameters of a run left alone, how long it took, and its folder."""
    workdir = tmp_path_factory.mktemp("whole")
    for _ in range(2):  # the second time everything is compiled
        shutil.rmtree(workdir)
        start = time.perf_counter()
        runs.start(workdir)
        assert runs.wait() == 0, runs.log.read_text()
    return parameters(workdir), time.perf_counter() - start, workdir


def parameters(workdir: Path) -> dict[str, bytes]:
    """Those that were trained and their moving average, of the last step."""
    assert open_checkpoint(workdir, step=STEPS).assets.step == STEPS
    sets = {ema: open_checkpoint(workdir, step=STEPS, ema=ema).ours for ema in (True, False)}
    return {f"{ema} {name}": tensor.read(()).tobytes() for ema, ours in sets.items() for name, tensor in ours.items()}


@pytest.mark.parametrize("kills", [3, pytest.param(10, marks=pytest.mark.slow)])
def test_killed_at_any_moment(kills: int, runs, whole, tmp_path):
    """SIGKILL, at moments spread over the time from the first step to the end, in writing checkpoints too."""
    wanted, seconds, _ = whole
    rng, writing = random.Random(kills), 0
    for _ in range(kills):
        process = runs.start(tmp_path)
        steps = tmp_path / "checkpoints"
        begun = time.perf_counter()
        while not steps.exists() and time.perf_counter() < begun + 60:
            time.sleep(0.01)
        time.sleep(rng.uniform(0, seconds / 2))
        os.kill(process, signal.SIGKILL)
        writing += any(steps.glob(runs.partial))
        assert runs.wait() in (0, -signal.SIGKILL)
    runs.start(tmp_path)
    assert runs.wait() == 0, runs.log.read_text()
    assert parameters(tmp_path) == wanted


def test_killed_while_a_checkpoint_is_written(runs, whole, tmp_path):
    process = runs.start(tmp_path)
    deadline = time.perf_counter() + 120
    while not list((tmp_path / "checkpoints").glob(runs.partial)) and time.perf_counter() < deadline:
        time.sleep(0.001)
    os.kill(process, signal.SIGKILL)
    assert runs.wait() == -signal.SIGKILL
    assert list((tmp_path / "checkpoints").glob(runs.partial)), "the checkpoint was complete before the signal came"
    runs.start(tmp_path)
    assert runs.wait() == 0, runs.log.read_text()
    assert parameters(tmp_path) == whole[0]


def test_asked_to_stop(runs, whole, tmp_path):
    """SIGTERM, a preemption's notice: it saves where it is, and goes on from there."""
    process = runs.start(tmp_path)
    deadline = time.perf_counter() + 120
    while not (tmp_path / "checkpoints" / "3").exists() and time.perf_counter() < deadline:
        time.sleep(0.005)
    os.kill(process, signal.SIGTERM)
    assert runs.wait() == 143
    steps = sorted(int(f.name) for f in (tmp_path / "checkpoints").iterdir() if f.name.isdigit())
    assert 3 < steps[-1] < STEPS, "the run was over before the signal came"
    runs.start(tmp_path)
    assert runs.wait() == 0, runs.log.read_text()
    assert parameters(tmp_path) == whole[0]


@pytest.mark.parametrize(("damage", "signed"), [("truncated", True), ("truncated", False), ("changed", True)])
def test_a_damaged_newest_checkpoint(damage: str, signed: bool, runs, whole, tmp_path):
    """It is put aside, and the one before it is taken."""
    shutil.copytree(whole[2], tmp_path, dirs_exist_ok=True)
    step = tmp_path / "checkpoints" / str(STEPS)
    assert (step / "checksums.json").exists()
    if not signed:
        (step / "checksums.json").unlink()
    file = max((f for f in (step / "train_state").rglob("*") if f.is_file()), key=lambda f: f.stat().st_size)
    content = bytearray(file.read_bytes())
    if damage == "truncated":
        file.write_bytes(content[: len(content) // 2])
    else:
        content[len(content) // 2] ^= 1
        file.write_bytes(content)
    runs.start(tmp_path)
    assert runs.wait() == 0, runs.log.read_text()
    assert (tmp_path / "checkpoints" / f"damaged-{STEPS}").exists()
    assert f"checkpoint {STEPS} is damaged" in runs.log.read_text()
    assert parameters(tmp_path) == whole[0]
