"""A run that changes frameworks: its state is converted, and training goes on."""

from __future__ import annotations

import dataclasses
import functools
import json
import re
from pathlib import Path

import jax
import numpy as np
import pytest

from convert.checkpoints import open_checkpoint
from convert.conversion import main
from convert.runs import convert_run
from convert.training_state import FRAMEWORKS, in_layout, read_state
from pi0.parameters import LayoutError
from pi0.run_config import OptimizerConfig, RunConfig
from tests.small_run import small_config

# The schedule is that of the whole run, however many steps of it one framework does. Eps is above rounding: Adam makes
# steps of a gradient that is rounding alone (key biases), and these differ.
OPTIMIZER = {"peak_lr": 1e-4, "warmup_steps": 5, "decay_steps": 60, "eps": 1e-6}


def run_config(steps: int, **changes) -> RunConfig:
    every = {"log_every": 1, "eval_every": 0, "save_every": 20}
    return small_config(batch_size=4, steps=steps, optimizer=OPTIMIZER, **every, **changes)


def train(framework: str, config: RunConfig, workdir: Path) -> list[float]:
    """Train, and return the loss of each step of the run so far."""
    if framework == "jax":
        from pi0_jax.training.train import train

        with jax.default_matmul_precision("highest"):
            train(config, workdir)
    else:
        from pi0_torch.training.train import train

        train(config, workdir)
    rows = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
    return [row["loss"] for row in rows if "loss" in row]


@pytest.fixture(scope="module")
def in_torch(tmp_path_factory) -> Path:
    """A short run in PyTorch."""
    workdir = tmp_path_factory.mktemp("torch")
    train("torch", run_config(6), workdir)
    return workdir


def state_of(run: Path) -> dict[str, bytes]:
    """All tensors of a run's newest checkpoint, by our names."""
    checkpoint = open_checkpoint(run)
    state = read_state(checkpoint).in_layout(checkpoint.assets.model, checkpoint.layout, FRAMEWORKS["pi0_jax"])
    tensors = {"count": np.int64(state.count).tobytes()}
    tensors |= {f"weights/{name}": tensor.read(()).tobytes() for name, tensor in checkpoint.ours.items()}
    groups = state.groups.items()
    return tensors | {f"{g}/{name}": tensor.read(()).tobytes() for g, part in groups for name, tensor in part.items()}


def test_there_and_back(in_torch, tmp_path):
    """Byte for byte, with what a run's folder has, and each framework says how to go on with the other's run."""
    main([str(in_torch), str(tmp_path / "jax"), "--to", "pi0_jax", "--with-training-state"])
    convert_run(tmp_path / "jax", tmp_path / "back", to="pi0_torch")
    assert state_of(tmp_path / "back") == state_of(tmp_path / "jax") == state_of(in_torch)
    for name in ("config.json", "data.json", "metrics.jsonl"):
        assert (tmp_path / "back" / name).read_text() == (in_torch / name).read_text()
    for framework, other, run in (("jax", "torch", in_torch), ("torch", "jax", tmp_path / "jax")):
        command = f"pi0-convert {run} NEW --to pi0_{framework} --with-training-state"
        with pytest.raises(ValueError, match=f"has a run in {other}.*{re.escape(command)}"):
            train(framework, run_config(7), run)


def test_what_cannot_be_converted_is_refused(in_torch, tmp_path, capsys):
    for options, said in (
        (["--to", "openpi_jax"], "openpi_jax has no training"),
        (["--to", "pi0_jax", "--dtype", "bfloat16"], "takes no dtype: a run goes on as it is"),
    ):
        with pytest.raises(SystemExit):
            main([str(in_torch), str(tmp_path / "x"), *options, "--with-training-state"])
        assert said in capsys.readouterr().err
    with pytest.raises(ValueError, match="has no train_state: it is no checkpoint of a training run"):
        convert_run("tests/written_before/export", tmp_path / "x", to="pi0_jax")
    with pytest.raises(ValueError, match="in a bucket; copy the run to this machine"):
        convert_run("gs://bucket/run", tmp_path / "x", to="pi0_jax")
    assert not list(tmp_path.iterdir())
    checkpoint = open_checkpoint(in_torch)
    trained = read_state(checkpoint).groups["params"]
    part = {name: tensor for name, tensor in trained.items() if name != "paligemma.layers.0.mlp.up.weight"}
    with pytest.raises(LayoutError, match=r"lacks \['paligemma.layers.0.mlp.up.weight'\]"):
        in_layout(checkpoint.assets.model, part, checkpoint.layout, FRAMEWORKS["pi0_jax"])


@pytest.mark.parametrize(
    "changes", [{}, pytest.param({"optimizer": {"name": "sgd"}, "ema_decay": None}, marks=pytest.mark.slow)]
)
def test_sixty_steps(changes, tmp_path):
    """20 in JAX, 20 in PyTorch and 20 in JAX again: losses and parameters of 60 in JAX, to 1e-4."""
    configs = [run_config(steps) for steps in (20, 40, 60)]
    if changes:
        sgd = OptimizerConfig("sgd", peak_lr=1e-3, warmup_steps=5, decay_steps=60)
        configs = [dataclasses.replace(config, optimizer=sgd, ema_decay=None) for config in configs]
    alone = train("jax", configs[2], tmp_path / "alone")
    train("jax", configs[0], tmp_path / "first")
    convert_run(tmp_path / "first", tmp_path / "second", to="pi0_torch")
    train("torch", configs[1], tmp_path / "second")
    convert_run(tmp_path / "second", tmp_path / "third", to="pi0_jax")
    changed = train("jax", configs[2], tmp_path / "third")
    assert len(changed) == len(alone) == 60
    np.testing.assert_allclose(changed, alone, rtol=1e-4)
    for ema in (True, False):
        ours, theirs = (open_checkpoint(tmp_path / run, ema=ema).ours for run in ("alone", "third"))
        whole = functools.reduce(np.hypot, (np.linalg.norm(t.read(()).ravel()) for t in ours.values()))
        for name, tensor in ours.items():
            apart = np.linalg.norm((tensor.read(()) - theirs[name].read(())).ravel())
            assert apart <= 1e-4 * max(np.linalg.norm(tensor.read(()).ravel()), 1e-4 * whole), name
