from __future__ import annotations

import dataclasses
import functools
import json
from pathlib import Path

import numpy as np
import pytest
import torch

import pi0_torch
from convert.checkpoints import open_checkpoint
from pi0.run_config import RunConfig
from pi0.training.command import main
from pi0.variants import get_variant
from pi0_eval.parity.frameworks import exact_matmuls
from pi0_eval.parity.training import random_batches
from pi0_torch.loading import map_tensors
from pi0_torch.training.checkpoints import VALIDATION, Checkpoints, damage
from pi0_torch.training.optimizer import make_optimizer, make_schedule
from pi0_torch.training.train import Root, inference_params, init_state, train
from pi0_torch.training.validation import action_metrics
from tests.small_run import small_config

CPU = torch.device("cpu")
OPTIMIZER = make_optimizer(small_config().optimizer, make_schedule(small_config().optimizer, 4))


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> tuple[dict[str, float], Path]:
    workdir = tmp_path_factory.mktemp("run")
    return train(small_config(), workdir, device="cpu"), workdir


def test_a_run_leaves_what_it_should(run):
    metrics, workdir = run
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 4, 4]
    assert {"loss", "grad_norm", "param_norm", "kernel_norm", "learning_rate", "samples_per_second"} <= rows[0].keys()
    assert {"validation_loss", "action_mse", "action_mae/3", "action_loss/0"} <= rows[3].keys()
    assert np.isfinite(metrics["loss"]) and np.isfinite(metrics["validation_loss"])
    assert list((workdir / "tensorboard").iterdir())
    assert sorted(f.name for f in (workdir / "images").iterdir()) == ["actions_4.png", "cameras_0.png"]
    assert sorted(f.name for f in (workdir / "checkpoints").iterdir()) == ["2", "4"]
    assert json.loads((workdir / "config.json").read_text())["model"]["kind"] == "pi0"


def test_a_checkpoint_carries_everything(run):
    checkpoint = open_checkpoint(run[1])
    assets = checkpoint.assets
    assert checkpoint.layout.name == "pi0_torch" and assets.model == get_variant("tiny")
    assert (assets.step, assets.robot, assets.normalization) == (4, "metaworld", "zscore")
    assert set(assets.norm_stats) == {"state", "actions"} and assets.tokenizer["sha256"]
    average, trained = (open_checkpoint(run[1], ema=ema).ours["vision.head.kernel"].read(()) for ema in (True, False))
    assert np.abs(average - trained).max() > 0
    weights = pi0_torch.load(run[1]).state_dict()["vision.head.weight"]
    np.testing.assert_array_equal(weights.numpy(), average.T)


def test_training_changes_every_parameter_that_can_matter(run):
    start, end = (pi0_torch.load(run[1] / "checkpoints" / step).state_dict() for step in ("2", "4"))
    same = {name for name, value in start.items() if torch.equal(value, end[name])}
    # What of the prefix is after the last layer's attention reaches no loss, and weight decay leaves zeros zero.
    assert same <= {"paligemma.final_norm.scale", "paligemma.layers.2.mlp_norm.scale"}


def test_evaluation_uses_the_moving_average_and_changes_nothing():
    root, state = init_state(small_config(), OPTIMIZER, None, CPU)
    for i, part in enumerate(("params", "ema")):
        for tensor in state[part].values():
            tensor.fill_(i + 0.1)
    with inference_params(state, root):
        assert all((p == np.float32(1.1)).all() for p in root.parameters())
    assert all((p == np.float32(0.1)).all() for p in root.parameters())
    assert all((x == np.float32(1.1)).all() for x in state["ema"].values())


def test_which_checkpoints_stay(run, tmp_path):
    """The newest two, the best of those with a validation, and every fourth."""
    root, state = init_state(small_config(), OPTIMIZER, None, CPU)
    for tensor in state["params"].values():
        tensor.zero_()
    assets, folder = open_checkpoint(run[1]).assets, tmp_path / "checkpoints"
    checkpoints = Checkpoints(folder, 2, keep_best=True, keep_every=(4, 0))
    for step, loss in ((1, 3.0), (2, 1.0), (3, 2.0), (4, None), (5, float("nan")), (6, 2.5), (7, None)):
        metrics = {} if loss is None else {"validation_loss": loss}
        checkpoints.save(step, state, root.parameter_of(), assets, metrics)
    checkpoints.save(7, state, root.parameter_of(), assets)  # which exists
    checkpoints.close()
    assert sorted(f.name for f in folder.iterdir()) == ["2", "4", "6", "7"]
    assert checkpoints.latest_step == 7 and not (folder / "7" / VALIDATION).exists()
    assert all(damage(folder / step) is None for step in "2467")
    state["params"]["vision.head.bias"][0] = np.nan
    checkpoints = Checkpoints(folder, 9)
    checkpoints.save(8, state, root.parameter_of(), assets)
    checkpoints.close()
    assert damage(folder / "8") == "it has NaN or infinite values; the run had diverged"


def test_a_checkpoint_that_cannot_be_written_is_an_error(run, tmp_path):
    root, state = init_state(small_config(), OPTIMIZER, None, CPU)
    (tmp_path / "checkpoints").mkdir()
    checkpoints = Checkpoints(tmp_path / "checkpoints", 2)
    assets = dataclasses.replace(open_checkpoint(run[1]).assets, asset_id="../x")
    checkpoints.save(1, state, root.parameter_of(), assets)
    with pytest.raises((OSError, ValueError)):
        checkpoints.close()
    assert not list((tmp_path / "checkpoints").iterdir())


def test_masters_are_float32_whatever_the_model_computes_in():
    config = small_config()
    config = dataclasses.replace(config, model=config.model.with_runtime(dtype="bfloat16"), freeze="^vision")
    for params, frozen in (("float32", "bfloat16"), ("bfloat16", "float32")):
        changed = dataclasses.replace(config, param_dtype=params, frozen_dtype=frozen)
        root, state = init_state(changed, OPTIMIZER, None, CPU)
        moments = state["opt_state"]["mu"]
        trained = {str(x.dtype) for part in (state["params"], state["ema"], moments) for x in part.values()}
        assert trained == {f"torch.{params}"} and moments.keys() == state["params"].keys()
        assert {str(x.dtype) for x in state["frozen"].values()} == {f"torch.{frozen}"}
        assert {n for n, p in root.parameter_of().items() if not p.requires_grad} == state["frozen"].keys()


@pytest.mark.slow
def test_metrics_of_sampled_actions_are_those_of_jax():
    """The same scalars and actions of a batch, to float32 rounding."""
    import jax.numpy as jnp

    from convert.tensors import Tensor
    from pi0_jax.loading import unflatten
    from pi0_jax.training import validation
    from tests.pi0_eval.parity.test_compare import random_parameters

    model = get_variant("tiny", remat="none")
    ours = {name: np.asarray(value) for name, value in random_parameters(model).items()}
    (batch,) = random_batches(RunConfig(model, small_config().data), 1, 4, 0)
    layout = open_checkpoint("tests/written_before/export").layout
    tensors = layout.from_ours(model, {name: Tensor.of(value) for name, value in ours.items()})
    torch_model = pi0_torch.loading.with_parameters(
        model, {name: pi0_torch.loading.to_torch(tensor.read(())) for name, tensor in tensors.items()}
    )
    with exact_matmuls():
        wanted, actions = validation.action_metrics(
            model, 4, unflatten({n: jnp.asarray(x) for n, x in ours.items()}), batch
        )
        found, sampled = Root(torch_model)(action_metrics, 4, map_tensors(torch.as_tensor, batch))
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        np.testing.assert_allclose(float(found[name]), float(value), rtol=1e-4, err_msg=name)
    np.testing.assert_allclose(sampled.numpy(), actions, rtol=0, atol=1e-4)


@pytest.mark.slow
def test_a_compiled_run(run, tmp_path, monkeypatch):
    """Its graphs, which are run as they are: compiled code is PyTorch's. The loss is that of the plain run."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    metrics = train(small_config(eval_every=0), tmp_path, device="cpu", compile=True)
    np.testing.assert_allclose(metrics["loss"], run[0]["loss"], rtol=1e-5)


def test_the_command(tmp_path, capsys):
    arguments = ["--config", "debug", "--workdir", str(tmp_path / "run"), "--framework", "torch", "--device", "cpu"]
    main([*arguments, "--config.steps=3", "--config.eval_every=0", "--profile"])
    assert sorted(f.name for f in (tmp_path / "run" / "checkpoints").iterdir()) == ["3"]
    for wrong, said in (
        (["--compilation-cache", "x"], "--compilation-cache is not of --framework torch"),
        (["--config.mesh.tensor=2"], "does not fit 1 processes"),
        (["--device", "toaster"], "device is 'toaster'"),
        (["--config.steps=4", "--config.batch_size=8"], "batch_size was 4 and is 8"),
    ):
        with pytest.raises(SystemExit):
            main([*arguments, *wrong])
        assert said in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main([*arguments[:4], "--framework", "jax", "--compile"])
    assert "--compile is not of --framework jax" in capsys.readouterr().err
