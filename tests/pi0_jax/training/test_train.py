from __future__ import annotations

import dataclasses
import json
import re
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import jax
import numpy as np
import pytest

import pi0_jax
from configs.metaworld_demo import get_config
from convert.checkpoints import open_checkpoint
from pi0.experiments import read_config
from pi0.run_config import RunConfig
from pi0.training.command import main
from pi0.training.draws import Drawn
from pi0.variants import get_variant
from pi0_eval.parity.compare import assert_parity
from pi0_eval.parity.inputs import Inputs
from pi0_jax.loading import parameters_of, unflatten
from pi0_jax.training.optimizer import make_optimizer, make_schedule
from pi0_jax.training.train import train, train_step
from tests.pi0_eval.parity.test_compare import random_parameters
from tests.small_run import small_config


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("run")
    return train(small_config(), workdir), workdir


def test_a_run_leaves_what_it_should(run):
    metrics, workdir = run
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 4, 4]
    assert {"loss", "grad_norm", "param_norm", "learning_rate", "samples_per_second"} <= rows[0].keys()
    assert np.isfinite(metrics["loss"]) and np.isfinite(metrics["validation_loss"])
    assert list((workdir / "tensorboard").iterdir())
    assert sorted(f.name for f in (workdir / "checkpoints").iterdir()) == ["2", "4"]
    assert json.loads((workdir / "config.json").read_text())["model"]["kind"] == "pi0"


def test_rlds(tmp_path):
    """Two steps on frames that are kept by filters, with one of three instructions each."""
    config = get_config("tiny")
    root = str(Path(__file__).parents[2] / "datasets" / "rlds" / "rlds_array_record")
    config.data.update({"root": root, "format": "rlds", "robot": "droid", "asset_id": "droid", "cache": ""})
    config.data.update({"validation_episodes": [], "filters": {"success_only": True, "idle": 0.0}})
    config.model.action_dim = 8
    config.optimizer.warmup_steps = 1
    config.update({"batch_size": 4, "steps": 2, "log_every": 1, "eval_every": 0, "save_every": 2})
    assert np.isfinite(train(RunConfig.from_dict(config.to_dict()), tmp_path)["loss"])


def test_a_checkpoint_carries_everything(run):
    checkpoint = open_checkpoint(run[1] / "checkpoints" / "4")
    assets = checkpoint.assets
    assert checkpoint.layout.name == "pi0_jax" and assets.model == get_variant("tiny")
    assert (assets.step, assets.robot, assets.normalization) == (4, "metaworld", "zscore")
    assert set(assets.norm_stats) == {"state", "actions"} and assets.tokenizer["sha256"]


def test_a_checkpoint_exports(run, tmp_path):
    from convert.conversion import convert

    convert(run[1] / "checkpoints" / "4", tmp_path / "torch", to="pi0_torch")
    assert_parity(run[1] / "checkpoints" / "4", tmp_path / "torch", num_steps=2, gradients=False)


def test_a_run_goes_on_where_it_stopped(run, tmp_path):
    """Stopped after 2 of 4 steps and started again: the same parameters, bit for bit."""
    first = small_config(steps=2)
    with pytest.MonkeyPatch.context() as patch:
        # The schedule belongs to the whole run, not to the part of it that was done.
        patch.setattr("pi0_jax.training.train.make_schedule", lambda config, steps: make_schedule(config, 4))
        train(first, tmp_path)
    train(small_config(), tmp_path)
    again, straight = (pi0_jax.load(folder / "checkpoints" / "4") for folder in (tmp_path, run[1]))
    for name, value in parameters_of(straight).items():
        np.testing.assert_array_equal(parameters_of(again)[name], value, err_msg=name)


def test_training_changes_every_parameter_that_can_matter(run):
    start, end = (pi0_jax.load(run[1] / "checkpoints" / step) for step in ("2", "4"))
    after = parameters_of(end)
    same = {name for name, value in parameters_of(start).items() if np.array_equal(value, after[name])}
    # The prefix's final norm reaches no loss, and weight decay leaves its zeros zero.
    assert same <= {"paligemma.final_norm.scale"}


def test_pi0_fast_learns_what_is_to_be_predicted():
    """The same step as the others': 30 of them on one batch bring the cross-entropy from chance to under a third."""
    model, config = get_variant("tiny_pi0_fast", remat="none"), get_config("tiny_pi0_fast")
    config.update({"model": model.to_dict(), "optimizer": {"warmup_steps": 1, "peak_lr": 0.02}})
    config = RunConfig.from_dict(config.to_dict())
    optimizer = make_optimizer(config.optimizer, make_schedule(config.optimizer, 30))
    params, inputs = unflatten(random_parameters(model)), Inputs.random(model, batch=4)
    state = {"params": params, "frozen": {}, "ema": None, "opt_state": optimizer.init(params)}
    step = jax.jit(partial(train_step, config, optimizer))
    losses = []
    for _ in range(30):
        state, scalars = step(state, (inputs.observation, inputs.actions, Drawn()))
        losses.append(float(scalars["loss"]))
    assert 0.5 * np.log(model.vocab_size) < losses[0] < 2 * np.log(model.vocab_size)
    assert losses[-1] < losses[0] / 3


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"batch_size": 100_000}, "batch_size"),
        ({"data": {"validation_episodes": list(range(16))}}, "validation episodes"),
        ({"data": {"robot": "toaster"}}, "toaster"),
        ({"data": {"root": "nowhere"}}, "nowhere"),
        ({"optimizer": {"warmup_steps": 9}}, "warmup_steps"),
        ({"model": {"kind": "pi1"}}, "kind"),
        ({"model": {"action_dim": 3}}, "robot_action_dim 4"),
    ],
)
def test_bad_configs_are_refused_before_anything_is_written(changes, said: str, tmp_path):
    with pytest.raises((ValueError, FileNotFoundError), match=said):
        train(small_config(**changes), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_the_command_line(tmp_path, capsys):
    config = read_config(
        "configs/metaworld_demo.py:tiny_pi05", ["--config.batch_size=3", "--config.model.runtime.num_steps=7"]
    )
    assert (config.batch_size, config.model.runtime.num_steps, config.model.kind) == (3, 7, "pi05")
    for arguments in (["--config.no_such=1"], ["--colour=red"]):
        with pytest.raises(SystemExit) as stop:
            main(["--config", "configs/metaworld_demo.py", "--workdir", str(tmp_path / "run"), *arguments])
        assert stop.value.code == 1 and arguments[0].split("=")[0].split(".")[-1].strip("-") in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["pi0_metaworld:pi0_small"], "pi0_metaworld takes no argument; it got 'pi0_small'"),
        (["pi0_metawold"], "unknown experiment 'pi0_metawold'; experiments are debug, .*pi0_metaworld"),
        (["debug:big"], "tiny_pi0_fast"),
        (["debug", "--config.modle.x=1"], r"the config has unknown fields \['modle'\]; known fields are .*'model'"),
        (
            ["debug", "--config.model.runtime.x=1"],
            r"model.runtime has unknown fields \['x'\]; known fields are \['attention'",
        ),
        (["debug", "--wrokdir=x"], "unknown argument --wrokdir=x; known are .*--workdir.* and --config.FIELD=VALUE"),
        (["debug", "--config.steps=many"], "steps is 'many'; it must be a whole number"),
    ],
)
def test_mistakes_end_with_one_line(arguments, said: str, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--workdir", str(tmp_path / "run"), "--config", *arguments])
    error = capsys.readouterr().err
    assert stop.value.code == 1 and error.count("\n") == 1 and re.search(f"^pi0-train: .*{said}", error)
    assert not (tmp_path / "run").exists()


def test_help_loads_no_training_code():
    lines = "import sys", "from pi0.training.command import main", "try: main(['--help'])"
    script = "\n".join([*lines, "finally: assert not {'flax', 'grain', 'optax', 'orbax'} & set(sys.modules)"])
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert result.returncode == 0 and "--config" in result.stdout, result.stderr


def test_a_run_of_version_0_1_is_resumed(tmp_path):
    """Its config is flat; a step more is trained from its checkpoint, as its own config says."""
    before = Path(__file__).parents[2] / "written_before" / "run"
    shutil.copytree(before, tmp_path, dirs_exist_ok=True)
    config = RunConfig.from_dict(json.loads((before / "config.json").read_text()))
    with pytest.raises(ValueError, match="batch_size was 4 and is 8"):
        train(dataclasses.replace(config, batch_size=8), tmp_path)
    metrics = train(dataclasses.replace(config, steps=3), tmp_path)
    assert np.isfinite(metrics["loss"]) and open_checkpoint(tmp_path).assets.step == 3
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["step"] == 3
