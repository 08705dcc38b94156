"""Runs of one process and of two: data, FSDP, and a checkpoint of two that one goes on from."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from convert.checkpoints import open_checkpoint
from pi0.run_config import MeshConfig, RunConfig
from pi0_torch.training.sharding import check_batch, check_config, make_mesh, start_processes
from pi0_torch.training.train import train
from tests.pi0_jax.training.short_run import get_config

ROOT = Path(__file__).parents[3]
STEPS = 5
# The runs of its first argument, one after the other, in a process of two; each is a folder, its mesh and its steps.
RUN = """
import json, sys
import torch
from pi0_torch.training.sharding import start_processes
from pi0_torch.training.train import Preempted, train
from tests.pi0_torch.training.test_sharding import config_of
torch.set_num_threads(1)
device = start_processes(sys.argv[2], 2, int(sys.argv[3]), "cpu")
for workdir, mesh, steps in json.loads(sys.argv[1]):
    try:
        train(config_of(mesh, steps), workdir, device=device)
    except Preempted as stop:
        sys.exit(stop.exit_code)
"""


def config_of(mesh: dict[str, int], steps: int = STEPS) -> RunConfig:
    config = get_config()
    config.optimizer.decay_steps = STEPS + 1
    config.update({"mesh": mesh, "steps": steps, "save_every": 3})
    return RunConfig.from_dict(config.to_dict())


def start_two(runs: Sequence[tuple[Path, dict[str, int], int]]) -> list[subprocess.Popen[str]]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    listed = json.dumps([(str(workdir), mesh, steps) for workdir, mesh, steps in runs])
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", RUN, listed, address]
    pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True, "cwd": ROOT, "env": environment}
    return [subprocess.Popen([*command, str(index)], **pipes) for index in range(2)]


def finish(processes: list[subprocess.Popen[str]], code: int = 0) -> None:
    try:
        for process in processes:
            errors = process.communicate(timeout=600)[1]
            assert process.returncode == code, errors
    finally:
        for process in processes:
            process.kill()


def losses(workdir: Path) -> list[float]:
    rows = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
    return [row["loss"] for row in rows]


def parameters(workdir: Path) -> dict[str, np.ndarray]:
    """Those that were trained and their moving average."""
    sets = {ema: open_checkpoint(workdir, step=STEPS, ema=ema).ours for ema in (True, False)}
    return {f"{ema} {name}": tensor.read(()) for ema, ours in sets.items() for name, tensor in ours.items()}


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> Path:
    workdir = tmp_path_factory.mktemp("alone")
    train(config_of({}), workdir, device="cpu")
    return workdir


def test_two_processes_give_the_same_run(alone, tmp_path):
    """Losses to 1e-6 and parameters: float32 sums in another order. One goes on from the checkpoint of two."""
    meshes = {"data": {"data": 2}, "fsdp": {"fsdp": 2}, "first": {"data": 1, "fsdp": -1}}
    runs = [(tmp_path / name, mesh, 3 if name == "first" else STEPS) for name, mesh in meshes.items()]
    finish(start_two(runs))
    train(config_of({}), tmp_path / "first", device="cpu")
    wanted = parameters(alone)
    for workdir, _, _ in runs:
        assert len(losses(workdir)) == STEPS
        np.testing.assert_allclose(losses(workdir), losses(alone), rtol=1e-6)
        for name, value in parameters(workdir).items():
            np.testing.assert_allclose(value, wanted[name], rtol=0, atol=1e-6, err_msg=name)
        stored, own = (w / "checkpoints" / str(STEPS) / "model.safetensors" for w in (workdir, alone))
        assert stored.stat().st_size == own.stat().st_size, "the layout depends on the number of processes"


@pytest.mark.slow
def test_two_processes_that_are_killed_go_on(tmp_path):
    """Bit for bit; and where one of them is asked to stop, both do, after the same step."""
    whole, killed, stopped = (tmp_path / name for name in ("whole", "killed", "stopped"))
    run = {"fsdp": 2}
    finish(start_two([(whole, run, STEPS)]))
    for workdir, number, code in ((killed, signal.SIGKILL, -9), (stopped, signal.SIGTERM, 143)):
        processes = start_two([(workdir, run, STEPS)])
        deadline = time.perf_counter() + 120
        while not (workdir / "checkpoints" / "3").exists() and time.perf_counter() < deadline:
            time.sleep(0.002)
        for process in processes if number == signal.SIGKILL else processes[1:]:
            process.send_signal(number)
        finish(processes, code)
        finish(start_two([(workdir, run, STEPS)]))
        for name, value in parameters(whole).items():
            np.testing.assert_array_equal(parameters(workdir)[name], value, err_msg=name)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"export_every": 300, "save_every": 300}, "export_every compares checkpoints of JAX"),
        ({"sharding": {"n": "fsdp"}}, "sharding has rules for JAX's mesh"),
        ({"remat": "offload"}, "remat is offload, which is JAX's"),
        ({"attention": "xla"}, "attention is xla, which is JAX's"),
    ],
)
def test_what_only_jax_has_is_refused(changes, said: str, tmp_path):
    runtime = {name: changes.pop(name) for name in ("remat", "attention") if name in changes}
    config = config_of({})
    config = dataclasses.replace(config, model=config.model.with_runtime(**runtime), **changes)
    with pytest.raises(ValueError, match=said):
        check_config(config)
    with pytest.raises(ValueError, match=said):
        train(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_meshes_that_do_not_fit_are_refused(monkeypatch):
    cpu = torch.device("cpu")
    assert make_mesh(MeshConfig(), cpu) is None
    with pytest.raises(ValueError, match="does not fit 1 processes"):
        make_mesh(MeshConfig(fsdp=2), cpu)
    monkeypatch.setattr("pi0_torch.training.sharding.process_count", lambda: 4)
    with pytest.raises(ValueError, match=r"mesh.tensor is 2; in PyTorch it must be 1"):
        make_mesh(MeshConfig(tensor=2), cpu)
    with pytest.raises(ValueError, match="must be a multiple of 8: accumulate 2 × 4 processes"):
        check_batch(12, 2)


@pytest.mark.parametrize("flags", [("127.0.0.1:1", 2, None), (None, None, 0), ("127.0.0.1:1", 2, 2)])
def test_flags_of_processes_go_together(flags):
    with pytest.raises(ValueError, match="go together"):
        start_processes(*flags)
