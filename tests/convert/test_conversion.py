from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from convert.checkpoints import Checkpoint, open_checkpoint, write_checkpoint
from convert.conversion import convert, main
from convert.layouts.registry import LAYOUTS
from convert.lora import merge_lora
from convert.tensors import CheckpointError, Tensor
from pi0.assets import Assets
from pi0.parameters import LayoutError, parameters
from pi0.storage import new_folder
from pi0.variants import get_variant
from tests.convert.test_checkpoints import OF_PI0
from tests.golden_case import LORA, GoldenCase


def random_checkpoint(variant: str = "tiny") -> Checkpoint:
    config, rng = get_variant(variant), np.random.default_rng(0)
    ours = {n: Tensor.of(rng.normal(size=p.shape).astype(np.float32)) for n, p in parameters(config).items()}
    return Checkpoint(Path("memory"), LAYOUTS["pi0_jax"], Assets(config), ours)


def write(checkpoint: Checkpoint, folder: Path, layout: str = "pi0_jax") -> Path:
    with new_folder(folder) as temporary:
        write_checkpoint(checkpoint, temporary, layout)
    return folder


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    return write(random_checkpoint(), tmp_path_factory.mktemp("source") / "tiny")


def values(checkpoint: Checkpoint) -> dict[str, np.ndarray]:
    return {name: tensor.read(()) for name, tensor in checkpoint.ours.items()}


def test_bfloat16_rounds_once(source, tmp_path):
    found = values(convert(source, tmp_path / "out", to="pi0_torch", dtype="bfloat16"))
    for name, value in values(open_checkpoint(source)).items():
        np.testing.assert_array_equal(found[name], value.astype(ml_dtypes.bfloat16))


def test_float32_of_bfloat16_is_exact(source, tmp_path):
    convert(source, tmp_path / "half", to="pi0_torch", dtype="bfloat16")
    half = values(open_checkpoint(tmp_path / "half"))
    for name, value in values(convert(tmp_path / "half", tmp_path / "out", to="openpi_jax", dtype="float32")).items():
        assert value.dtype == np.float32
        np.testing.assert_array_equal(value, half[name].astype(np.float32))


@pytest.mark.parametrize("action_dim", [4, 10])
def test_action_dims_are_cut_or_padded(action_dim: int, source, tmp_path):
    said: list[str] = []
    options = {"action_dim": action_dim, "action_horizon": 9, "log": said.append}
    result = convert(source, tmp_path / "out", to="pi0_torch", **options)
    assert (result.assets.model.action_dim, result.assets.model.action_horizon) == (action_dim, 9)
    assert "7 -> " in said[0] and ("padded" if action_dim > 7 else "truncated") in said[0] and "5 -> 9" in said[1]
    both = min(action_dim, 7)
    found, before = values(result), values(open_checkpoint(source))
    assert found["action_out_proj.kernel"].shape == (20, action_dim)
    np.testing.assert_array_equal(found["action_out_proj.kernel"][:, :both], before["action_out_proj.kernel"][:, :both])
    assert not found["action_in_proj.kernel"][both:].any() and not found["action_out_proj.bias"][both:].any()
    np.testing.assert_array_equal(found["paligemma.embedding"], before["paligemma.embedding"])


def test_dtypes_of_other_libraries(tmp_path):
    source = write(random_checkpoint(), tmp_path / "source")
    result = convert(source, tmp_path / "out", to="pi0_torch", dtype=np.dtype(ml_dtypes.bfloat16))
    assert {tensor.dtype.name for tensor in result.ours.values()} == {"bfloat16"}
    with pytest.raises(ValueError, match=r"dtype is .*float16.*; it must be one of"):
        convert(source, tmp_path / "half", to="pi0_torch", dtype=np.float16)
    assert not (tmp_path / "half").exists()


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("name", ["state_proj.bias", "paligemma.layers.mlp.up.kernel"])
def test_values_that_are_not_finite_are_refused_by_name(bad: float, name: str, tmp_path, capsys):
    checkpoint = random_checkpoint()
    array = checkpoint.ours[name].read(()).copy()
    array.flat[3] = bad
    checkpoint.ours[name] = Tensor.of(array)
    folder = write(checkpoint, tmp_path / "bad")
    with pytest.raises(SystemExit) as stop:
        main([str(folder), str(tmp_path / "out"), "--to", "pi0_torch"])
    assert stop.value.code == 1 and f"{name} has NaN or infinite values" in capsys.readouterr().err
    assert [f.name for f in tmp_path.iterdir()] == ["bad"]


# ---- LoRA


def test_lora_keeps_its_place_in_every_layout_that_has_one(tmp_path):
    case = GoldenCase(LORA)
    source = open_checkpoint(case.checkpoint, case.config("float32"))
    for layout in ("pi0_torch", "pi0_jax", "openpi_jax"):
        convert(case.checkpoint, tmp_path / layout, to=layout, config=case.config("float32"))
        for name, value in values(open_checkpoint(tmp_path / layout)).items():
            np.testing.assert_array_equal(value, source.ours[name].read(()), err_msg=name)


def test_merged_lora_is_the_sum(tmp_path):
    """In float64, by hand: per head, except for the output projection, whose heads openpi sums in either factor."""
    folder = write(random_checkpoint("tiny_lora"), tmp_path / "lora")
    before, after = open_checkpoint(folder), convert(folder, tmp_path / "out", to="pi0_torch", lora="merge")
    assert after.assets.model == get_variant("tiny")
    x = {name: value.astype(np.float64) for name, value in values(before).items()}
    expert = "paligemma.layers"  # alpha / rank = 2
    for part, equation, scale in (
        ("attention.query", "ldnr,lnrh->ldnh", 2),
        ("attention.value", "ldkr,lkrh->ldkh", 2),
        ("attention.out", "lnhr,lmrd->lnhd", 2),
        ("mlp.gate", "ldr,lrm->ldm", 1),
        ("mlp.down", "lmr,lrd->lmd", 1),
    ):
        stem = f"{expert}.{part}"
        update = np.einsum(equation, x[f"{stem}.lora.a"], x[f"{stem}.lora.b"])
        expected = x[f"{stem}.kernel"] + scale * update
        # float32 sums of a few products of order one.
        np.testing.assert_allclose(after.ours[f"{stem}.kernel"].read(()), expected, rtol=1e-5, atol=1e-5)


def test_merging_does_not_round(tmp_path):
    """The result is float32, also of a bfloat16 base; the conversion's dtype rounds it once."""
    checkpoint = random_checkpoint("tiny_lora")
    halves = {n: Tensor.of(t.read(()).astype(ml_dtypes.bfloat16)) for n, t in checkpoint.ours.items()}
    _, merged = merge_lora(checkpoint.assets.model, halves)
    wide = {n: Tensor.of(t.read(()).astype(np.float32)) for n, t in halves.items()}
    _, exact = merge_lora(checkpoint.assets.model, wide)
    name = "action_expert.layers.mlp.up.kernel"
    assert merged[name].dtype == merged[name].read(()).dtype == np.float32
    np.testing.assert_array_equal(merged[name].read(()), exact[name].read(()))
    assert np.any(merged[name].read(()) != merged[name].read(()).astype(ml_dtypes.bfloat16))
    for part in (1, slice(1, 3)):
        np.testing.assert_array_equal(merged[name].read((part,)), merged[name].read(())[part])


def test_pi0_fast_changes_as_the_others_do(tmp_path):
    """LoRA is merged; no parameter depends on the action dim."""
    source, said = write(random_checkpoint("tiny_pi0_fast_lora"), tmp_path / "lora"), []
    result = convert(source, tmp_path / "out", to="lerobot", lora="merge", action_dim=9, log=said.append)
    assert said[:2] == ["LoRA of paligemma merged in float32", "action_dim 7 -> 9: no parameter depends on it"]
    assert result.assets.model == get_variant("tiny_pi0_fast", action_dim=9)


def test_lora_is_not_dropped(source, tmp_path):
    with pytest.raises(LayoutError, match="no LoRA"):
        convert(source, tmp_path / "out", to="pi0_torch", lora="merge")
    lora = write(random_checkpoint("tiny_lora"), tmp_path / "lora")
    plain = get_variant("tiny")
    with pytest.raises(LayoutError, match=r"unknown .*lora/a"):  # read as a model without: unknown tensors
        convert(lora, tmp_path / "out", to="pi0_torch", config=plain)
    without = {name for name in OF_PI0 if not LAYOUTS[name].has_lora}
    for layout in without:
        with pytest.raises(LayoutError, match="--lora merge"):
            convert(lora, tmp_path / "out", to=layout)
    assert [f.name for f in tmp_path.iterdir()] == ["lora"]


# ---- training runs


@pytest.fixture
def run(tmp_path) -> Path:
    """Two steps of a run; the state of the second has other weights than its moving average."""
    from pi0_jax.loading import unflatten
    from pi0_jax.training.checkpoints import Checkpoints

    ema = values(random_checkpoint())
    checkpoints = Checkpoints(tmp_path / "run" / "checkpoints", keep=2)
    for step in (10, 9 + 20):
        weights = {name: value + np.float32(step) for name, value in ema.items()}
        state = {"params": unflatten(weights), "ema": unflatten(ema), "opt_state": {"count": np.int32(step)}}
        checkpoints.save(step, unflatten(ema), state, Assets(get_variant("tiny")))
    checkpoints.close()
    return tmp_path / "run"


def test_a_run_s_newest_step_or_the_one_asked_for(run, tmp_path):
    assert convert(run, tmp_path / "a", to="pi0_torch").assets.step == 29
    assert convert(run, tmp_path / "b", to="pi0_torch", step=10).assets.step == 10
    with pytest.raises(CheckpointError, match=r"no checkpoint of step 11; it has \[10, 29\]"):
        convert(run, tmp_path / "c", to="pi0_torch", step=11)


def test_with_and_without_the_moving_average(run, source, tmp_path):
    average, trained = (
        convert(run, tmp_path / "a", to="pi0_torch"),
        convert(run, tmp_path / "b", to="pi0_torch", ema=False),
    )
    np.testing.assert_array_equal(
        trained.ours["state_proj.bias"].read(()), average.ours["state_proj.bias"].read(()) + np.float32(29)
    )
    with pytest.raises(CheckpointError, match="train_state"):
        convert(source, tmp_path / "c", to="pi0_torch", ema=False)


def test_verification_is_asked_for_by_size(source, tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr("convert.conversion.verify_equal", lambda a, b: calls.append(1))
    convert(source, tmp_path / "a", to="pi0_torch")
    convert(source, tmp_path / "b", to="pi0_torch", verify=False)
    monkeypatch.setattr("convert.conversion.VERIFIED_SIZE", 10)
    convert(source, tmp_path / "c", to="pi0_torch")
    assert len(calls) == 1


def test_unknown_dtype(source, tmp_path):
    with pytest.raises(ValueError, match="float16"):
        convert(source, tmp_path / "out", to="pi0_torch", dtype="float16")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("layout", [name for name in OF_PI0 if LAYOUTS[name].format == "safetensors"])
def test_a_flat_layout_without_a_config_is_told_its_model(layout: str, tmp_path, capsys):
    folder = write(random_checkpoint(), tmp_path / "x", layout)
    (folder / ("" if layout == "pi0_torch" else "assets") / "config.json").unlink()
    with pytest.raises(SystemExit):
        main([str(folder), str(tmp_path / "out"), "--to", "pi0_jax"])
    assert "--model pi0" in capsys.readouterr().err
    (tmp_path / "model.json").write_text(json.dumps(get_variant("tiny").to_dict()))
    for model in ("tiny", str(tmp_path / "model.json")):
        main([str(folder), str(tmp_path / "out"), "--to", "pi0_jax", "--model", model, "--overwrite"])
        assert open_checkpoint(tmp_path / "out").assets.model == get_variant("tiny")
    with pytest.raises(SystemExit):
        main([str(folder), str(tmp_path / "out2"), "--to", "pi0_jax", "--model", "pi1"])
    assert "pi1" in capsys.readouterr().err


@pytest.mark.parametrize("layout", ["pi0_torch", "pi0_jax"])
def test_a_disk_that_fills(layout: str, source, tmp_path):
    """Real writes that the system refuses, here for their size: one line that says so, exit code 1, nothing left."""
    command = f"""
import resource
from convert.conversion import main
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
main([{str(source)!r}, {str(tmp_path / "out")!r}, "--to", "{layout}"])
"""
    done = subprocess.run([sys.executable, "-c", command], capture_output=True, text=True)
    assert done.returncode == 1 and len(done.stderr.splitlines()) == 1, done.stderr
    assert done.stderr.startswith("pi0-convert: ") and "File too large" in done.stderr
    assert not list(tmp_path.iterdir())
