from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec

import pi0_jax
from convert.checkpoints import open_checkpoint
from pi0.parameters import parameters
from pi0.run_config import SHARDING, MeshConfig
from pi0.variants import get_variant
from pi0_jax.loading import parameters_of
from pi0_jax.training.sharding import (
    check_batch,
    local_rows,
    make_mesh,
    partition_specs,
    start_processes,
    state_shardings,
)
from pi0_jax.training.train import train
from tests.bucket import free_port
from tests.small_run import small_config

ROOT = Path(__file__).parents[3]
RULES = SHARDING


def specs(variant: str = "pi0", rules: dict[str, str] = RULES, **sizes: int) -> dict[str, PartitionSpec]:
    return partition_specs(get_variant(variant), rules, {"data": 1, "fsdp": 1, "tensor": 1} | sizes)


def test_the_rules_cut_the_released_model():
    """FSDP takes the largest axis that divides, tensor the heads and the MLP; one key/value head stays whole."""
    cut = specs(fsdp=8, tensor=4)
    assert cut["paligemma.embedding"] == PartitionSpec("fsdp", None)
    assert cut["paligemma.layers.attention.query.kernel"] == PartitionSpec(None, "fsdp", "tensor", None)
    assert cut["paligemma.layers.attention.key.kernel"] == PartitionSpec(None, "fsdp", None, None)
    assert cut["action_expert.layers.mlp.down.kernel"] == PartitionSpec(None, "tensor", "fsdp")
    assert cut["vision.layers.attention.query.kernel"] == PartitionSpec(None, "fsdp", "tensor", None)
    assert specs(fsdp=8, rules=RULES | {"paligemma/v": ""})["paligemma.embedding"] == PartitionSpec(None, "fsdp")
    shapes = parameters(get_variant("pi05"))
    whole = [name for name, spec in specs("pi05", fsdp=128).items() if "fsdp" not in spec]
    assert whole and max(np.prod(shapes[name].shape) for name in whole) < 2**20
    in_a_layer = {
        name: math.prod(n for letter, n in zip(p.axes, p.shape, strict=True) if letter != "l")
        for name, p in parameters(get_variant("pi0")).items()
    }
    assert {name for name, spec in cut.items() if "fsdp" not in spec} == {n for n, k in in_a_layer.items() if k < 2**14}


@pytest.mark.parametrize(
    ("sizes", "rules", "said"),
    [
        ({"tensor": 3}, RULES, r"mesh.tensor is 3, .* axis n = 16 of vision.*sharding\['vision/n'\] = ''"),
        ({"tensor": 16}, RULES, "axis n = 8 of paligemma"),
        ({"fsdp": 7}, RULES, "mesh.fsdp is 7, which divides none"),
        ({"fsdp": 256}, RULES, "mesh.fsdp is 256, .* of vision"),
        ({}, {"n": "heads"}, "a rule is one of data, fsdp, tensor"),
    ],
)
def test_what_does_not_divide_is_refused(sizes, rules, said: str):
    with pytest.raises(ValueError, match=said):
        specs(rules=rules, **sizes)


@pytest.mark.parametrize(
    "sizes", [{"data": 2, "fsdp": 1, "tensor": 1}, {"data": -1, "fsdp": -1, "tensor": 1}, {"fsdp": 2}, {"data": 0}]
)
def test_a_mesh_that_does_not_fit_is_refused(sizes):
    with pytest.raises(ValueError, match="mesh is"):
        make_mesh(MeshConfig(**sizes), jax.devices()[:1])


def test_a_batch_that_does_not_divide_is_refused(tmp_path):
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    check_batch(8, 4, mesh)
    config = small_config(batch_size=6, accumulate=4)
    with pytest.raises(ValueError, match="batch_size is 6; it must be a multiple of 4: accumulate 4 × mesh data 1"):
        train(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()
    assert list(local_rows(4, mesh)) == [0, 1, 2, 3]


def test_whatever_belongs_to_a_parameter_lies_as_it_does():
    """Adam's moments and the moving average have the parameter's sharding; Adam's counter is everywhere."""
    import optax

    model, mesh = get_variant("tiny"), make_mesh(MeshConfig(), jax.devices()[:1])
    params = {"paligemma": {"embedding": np.zeros((512, 32))}}
    state = {"params": params, "ema": params, "opt_state": optax.adamw(1e-3).init(params)}
    found = state_shardings(state, model, RULES, mesh)
    assert found["params"]["paligemma"]["embedding"].spec == PartitionSpec("fsdp", None)
    adam = found["opt_state"][0]
    assert adam.mu == adam.nu == found["ema"] == found["params"] and adam.count.spec == PartitionSpec()


@pytest.mark.parametrize("flags", [("127.0.0.1:1", None, None), ("127.0.0.1:1", 2, 2), (None, 2, 0)])
def test_half_of_the_flags_is_refused(flags):
    with pytest.raises(ValueError, match="go together"):
        start_processes(*flags)


STEPS = 5


def start(workdir: Path, mesh: tuple[int, int, int], devices: int, *flags: str) -> subprocess.Popen[str]:
    sizes = [f"--config.mesh.{axis}={n}" for axis, n in zip(("data", "fsdp", "tensor"), mesh, strict=True)]
    environment = os.environ | {
        "PYTHONPATH": str(ROOT),
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
        "JAX_PLATFORMS": "cpu",
        "JAX_DEFAULT_MATMUL_PRECISION": "highest",
    }
    script = "from pi0.training.command import main; main()"
    command = [sys.executable, "-c", script, "--config", "tests/pi0_jax/training/short_run.py"]
    command += ["--workdir", str(workdir), *sizes, *flags]
    return subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True)


def start_two(workdir: Path, *flags: str) -> list[subprocess.Popen[str]]:
    joining = ("--coordinator", f"127.0.0.1:{free_port()}", "--process-count", "2", "--process-index")
    return [start(workdir, (2, 4, 1), 4, *flags, *joining, str(index)) for index in range(2)]


def finish(*runs: subprocess.Popen[str]) -> None:
    try:
        for run in runs:
            errors = run.communicate(timeout=900)[1]
            assert run.returncode == 0, errors
    finally:
        for run in runs:
            run.kill()


def losses(workdir: Path) -> list[float]:
    rows = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
    return [row["loss"] for row in rows]


@pytest.fixture(scope="module")
def on_one_device(tmp_path_factory) -> Path:
    workdir = tmp_path_factory.mktemp("one_device")
    finish(start(workdir, (1, 1, 1), 1))
    return workdir


def check_equal(workdir: Path, reference: Path) -> None:
    """Float32 sums in another order: about 1e-7 in a loss, and in a parameter after five steps of at most 1e-4."""
    assert len(losses(workdir)) == STEPS
    np.testing.assert_allclose(losses(workdir), losses(reference), rtol=1e-5)
    ours, theirs = (parameters_of(pi0_jax.load(w / "checkpoints" / str(STEPS))) for w in (workdir, reference))
    for name, value in theirs.items():
        np.testing.assert_allclose(ours[name], value, rtol=0, atol=1e-5, err_msg=name)


@pytest.mark.slow  # each compiles the step for eight devices, which two cores play
@pytest.mark.parametrize("mesh", [(8, 1, 1), (1, 8, 1), (2, 2, 2)])
def test_every_mesh_gives_the_same_run(mesh: tuple[int, int, int], on_one_device: Path, tmp_path: Path):
    finish(start(tmp_path, mesh, 8))
    check_equal(tmp_path, on_one_device)


@pytest.mark.slow
def test_two_processes_give_the_same_run(on_one_device: Path, tmp_path: Path):
    """Each brings its own rows of every batch and writes its own part of the checkpoint; one writes the metrics."""
    finish(*start_two(tmp_path))
    check_equal(tmp_path, on_one_device)


@pytest.mark.slow
def test_two_processes_that_are_killed_go_on(tmp_path: Path):
    """SIGKILL of one takes the other with it; both started again end bit for bit where a run left alone ends."""
    flags = ("--config.steps=12", "--config.save_every=2")
    finish(*start_two(tmp_path / "whole", *flags))
    runs = start_two(tmp_path / "killed", *flags)
    while not (tmp_path / "killed" / "checkpoints" / "4").exists() and runs[0].poll() is None:
        time.sleep(0.01)
    for run in runs:
        run.kill()
        run.communicate()
    steps = [int(f.name) for f in (tmp_path / "killed" / "checkpoints").iterdir() if f.name.isdigit()]
    assert 4 <= max(steps) < 12, "the run was over before it was killed"
    finish(*start_two(tmp_path / "killed", *flags))
    for ema in (True, False):
        whole, killed = (open_checkpoint(tmp_path / name, step=12, ema=ema).ours for name in ("whole", "killed"))
        for name, tensor in whole.items():
            assert tensor.read(()).tobytes() == killed[name].read(()).tobytes(), name
