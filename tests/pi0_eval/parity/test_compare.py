from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

from convert.checkpoints import Checkpoint, write_checkpoint
from convert.layouts.registry import LAYOUTS
from convert.tensors import Tensor
from pi0.assets import Assets
from pi0.config import GemmaConfig, ModelConfig
from pi0.parameters import parameters
from pi0.storage import new_folder
from pi0.variants import SO400M, get_variant
from pi0_eval.parity.command import main
from pi0_eval.parity.compare import assert_parity, compare, errors, judge
from pi0_eval.parity.frameworks import FRAMEWORKS as RUN
from pi0_eval.parity.frameworks import Results, exact_matmuls
from pi0_eval.parity.html import to_html
from pi0_eval.parity.inputs import Inputs, ParityError
from pi0_eval.parity.report import PROOF
from tests.faults.rounding import other_bits
from tests.pairs import near_initial


def random_parameters(config: ModelConfig, seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {n: near_initial(n, p, rng) for n, p in parameters(config).items()}


def random_checkpoint(config: ModelConfig, seed: int = 0) -> Checkpoint:
    ours = {n: Tensor.of(array) for n, array in random_parameters(config, seed).items()}
    return Checkpoint(Path("memory"), LAYOUTS["pi0_jax"], Assets(config), ours)


def write(checkpoint: Checkpoint, folder: Path, layout: str) -> Path:
    with new_folder(folder) as temporary:
        write_checkpoint(checkpoint, temporary, layout)
    return folder


@pytest.fixture(scope="module")
def pair(tmp_path_factory) -> tuple[Path, Path]:
    """The same tiny model in JAX and in PyTorch."""
    checkpoint, root = random_checkpoint(get_variant("tiny")), tmp_path_factory.mktemp("pair")
    return write(checkpoint, root / "jax", "pi0_jax"), write(checkpoint, root / "torch", "pi0_torch")


# ---- the frameworks agree


@pytest.mark.parametrize("kind", ["pi0", "pi05"])
def test_float32(kind: str):
    """18 layers. One function in float64; in float32 actions to 3e-6 and gradients to 1e-5 relative L2: rounding, no
    more than openpi's own two implementations differ by (2.2e-6 and 2.6e-6)."""
    gemma = GemmaConfig(width=64, depth=18, mlp_dim=128, num_heads=4, num_kv_heads=1, head_dim=16)
    config = dataclasses.replace(
        get_variant("tiny", kind=kind, max_token_len=16),
        paligemma=gemma,
        action_expert=dataclasses.replace(gemma, width=32, mlp_dim=64),
    )
    checkpoint, inputs = random_checkpoint(config), Inputs.random(config, batch=3)
    with exact_matmuls():
        results = [run(checkpoint, config, inputs, 10, True) for run in RUN.values()]
        exact = [run(checkpoint, config.with_runtime(dtype="float64"), inputs, 10, True) for run in RUN.values()]
    found = errors(*results)
    assert found["actions"] <= 3e-6
    assert max(found.values()) <= 1e-5
    assert max(errors(*exact, "float64").values()) <= PROOF
    assert all(row.passed for row in judge(*exact, *results))


@pytest.fixture(scope="module", params=[pytest.param("pi0", marks=pytest.mark.slow), "pi05"])
def deep(request) -> dict[tuple[str, str], Results]:
    """A model of realistic depth, So400m vision tower and 18 layers, in both frameworks and dtypes."""
    gemma = GemmaConfig(width=64, depth=18, mlp_dim=128, num_heads=4, num_kv_heads=1, head_dim=16)
    config = ModelConfig(
        kind=request.param,
        vision=SO400M,
        paligemma=gemma,
        action_expert=dataclasses.replace(gemma, width=32, mlp_dim=64),
        vocab_size=512,
        image_resolution=(56, 56),
        image_keys=("base_0_rgb",),
        action_dim=8,
        action_horizon=10,
        max_token_len=16,
    )
    checkpoint, inputs = random_checkpoint(config), Inputs.random(config, batch=6, seed=1)
    with exact_matmuls():
        return {
            (framework, dtype): run(checkpoint, config.with_runtime(dtype=dtype), inputs, 10, False)
            for framework, run in RUN.items()
            for dtype in ("float32", "bfloat16")
        }


def test_bfloat16_at_realistic_depth(deep: dict[tuple[str, str], Results]):
    """No further from each other than the larger of their own distances from float32, in what the model gives."""
    apart = errors(deep["jax", "bfloat16"], deep["torch", "bfloat16"])
    own = [errors(deep[f, "float32"], deep[f, "bfloat16"]) for f in RUN]
    for stage in ("velocity", "loss", "actions"):
        assert apart[stage] <= max(o[stage] for o in own), stage
    float32 = errors(deep["jax", "float32"], deep["torch", "float32"])
    assert float32["actions"] <= 3e-6


@pytest.mark.parametrize("variant", ["tiny", "tiny_lora"])
def test_bfloat16_rounds_at_the_same_places(variant: str):
    """Shallow, with the roundings that XLA may leave out kept: all but a few values are the same to the bit.

    Where float32 sums differ in their last bit, about one value in 2^15 falls on the other side of a rounding, and
    one such value changes a row a little; a rounding too many or too few changes a quarter to all of the values of
    every token, as `tests/mutations.py` finds at each place.
    """
    config = get_variant(variant, dtype="bfloat16", remat="none")
    checkpoint, inputs = random_checkpoint(config), Inputs.random(config, batch=4)
    with exact_matmuls():
        a, b = (run(checkpoint, config, inputs, 1, False) for run in RUN.values())
    assert other_bits(a, b) is None


@pytest.fixture(scope="module")
def fast_pair(tmp_path_factory) -> tuple[Path, Path]:
    """The same tiny π0-FAST in JAX and in PyTorch."""
    checkpoint, root = random_checkpoint(get_variant("tiny_pi0_fast")), tmp_path_factory.mktemp("fast")
    return write(checkpoint, root / "jax", "pi0_jax"), write(checkpoint, root / "torch", "pi0_torch")


def test_fast(fast_pair):
    """The same tokens, and everything before them; its own gradients too, the tied embedding's among them."""
    report = assert_parity(*fast_pair, num_steps=6, batch=3)
    names = [row.stage for row in report.rows]
    assert names[-8:-3] == ["pre-logits", "logits", "loss", "gradients, all", "gradients, worst parameter"]
    assert names[-3:] == ["first logits", "decoded logits", "tokens"]
    assert report.rows[-1].proof == 0 and "Sampled actions" not in to_html(report)


def test_fast_in_bfloat16(fast_pair):
    report = assert_parity(*fast_pair, dtype="bfloat16", batch=3, num_steps=1, gradients=False)
    assert report.rows[-1].stage == "tokens"  # in bfloat16 a near tie may fall either way, in float64 it may not


def test_subtasks(tmp_path):
    """A policy that writes subtasks: the recipe's losses and gradients, the subtask, actions after it; samplers too."""
    assets = Assets(get_variant("tiny_pi05"), subtasks=True)
    checkpoint = dataclasses.replace(random_checkpoint(assets.model), assets=assets)
    folder = write(checkpoint, tmp_path / "subtasks", "pi0_torch")
    names = [row.stage for row in assert_parity(folder, folder, framework_b="jax", num_steps=3).rows]
    assert names[-8:-6] == ["fast loss", "flow loss"] and names[-9] == "text loss"
    assert names[-4:] == ["first logits", "subtask logits", "subtask", "actions"]
    report = assert_parity(folder, folder, side_b="torch:sampler", num_steps=3, gradients=False)
    assert [row.stage for row in report.rows] == ["first logits", "subtask", "actions"]


def test_actions_after_another_subtask_have_no_error():
    """Both sides in bfloat16 write another subtask than in float64, which says nothing of the actions after it."""
    rng = np.random.default_rng(0)

    def results(token: int, actions: np.ndarray) -> Results:
        texts = np.array([[5, 7], [5, token]])
        return Results({"subtask logits": rng.normal(size=(2, 2, 9)) * 0, "subtask": texts, "actions": actions}, {})

    exact = rng.normal(size=(2, 300, 4))
    a, b = exact * (1 + 1e-3), exact * (1 - 1e-3)
    b[1] += 0.01
    rows = {
        r.stage: r for r in judge(results(7, exact), results(7, exact), results(8, a), results(8, b), *["bfloat16"] * 2)
    }
    assert rows["actions"].passed and rows["actions"].apart == pytest.approx(2e-3, rel=0.01)  # of the first row
    assert not judge(results(7, exact), results(7, exact), results(7, a), results(7, b), *["bfloat16"] * 2)[-1].passed


def test_other_tokens_are_seen(fast_pair, tmp_path):
    """One token's embedding a little longer: it is the likeliest now, which the loss may not see."""
    checkpoint = random_checkpoint(get_variant("tiny_pi0_fast"))
    name = "paligemma.embedding"
    embedding = checkpoint.ours[name].read(()).copy()
    embedding[7] *= 30
    checkpoint.ours[name] = Tensor.of(embedding)
    other = write(checkpoint, tmp_path / "other", "pi0_torch")
    rows = {row.stage: row for row in compare(fast_pair[1], other, gradients=False, num_steps=6).rows}
    assert not rows["tokens"].passed and rows["tokens"].proof > 0.5


# ---- the tool


def test_report(pair):
    report = assert_parity(*pair, num_steps=3)
    names = [row.stage for row in report.rows]
    assert names[:3] == ["vision layer 0", "vision layer 1", "image tokens"]
    assert names[-3:] == ["gradients, all", "gradients, worst parameter", "actions"]
    assert {"prefix layer 2", "suffix layer 2", "velocity", "loss"} <= set(names)
    assert "PASSED" in report.table()


def test_either_framework_runs_either_layout(pair):
    assert_parity(pair[0], pair[1], framework_a="torch", framework_b="jax", num_steps=2, gradients=False)


def test_bfloat16_tolerances_are_the_models_own(pair):
    report = compare(*pair, dtype="bfloat16", num_steps=3)
    assert report.passed, report.table()
    assert 1e-4 < next(row.allowed for row in report.rows if row.stage == "velocity") < 0.1


@pytest.mark.parametrize(
    ("parameter", "stage", "operation"),
    [
        ("vision.layers.mlp.up.kernel", "vision layer 0", "vision layer 0: MLP up"),
        ("paligemma.layers.mlp.down.kernel", "prefix layer 0", "layer 0: MLP down"),
        ("action_expert.layers.attention.value.kernel", "suffix layer 0", "layer 0: value (2)"),
        ("action_out_proj.bias", "velocity", "velocity: action_out_proj"),
    ],
)
def test_the_first_stage_that_differs_is_named(parameter: str, stage: str, operation: str, pair, tmp_path, capsys):
    """A change of 1 % in one parameter; the command exits with 1 and says where, in words and in JSON."""
    checkpoint = random_checkpoint(get_variant("tiny"))
    checkpoint.ours[parameter] = Tensor.of(checkpoint.ours[parameter].read(()) * np.float32(1.01))
    other, report = write(checkpoint, tmp_path / "other", "pi0_torch"), tmp_path / "report.json"
    with pytest.raises(SystemExit) as stop:
        main([str(pair[1]), str(other), "--json", str(report), "--steps", "1", "--no-gradients", "--explain"])
    assert stop.value.code == 1
    out = capsys.readouterr().out
    assert f"first stage that parts is {stage} " in out and f"first operation that parts is {operation} (" in out
    values = json.loads(report.read_text())
    assert (values["passed"], values["first_failure"]) == (False, stage)


def test_nan_fails(pair, tmp_path):
    checkpoint = random_checkpoint(get_variant("tiny"))
    checkpoint.ours["action_out_proj.bias"] = Tensor.of(np.full(7, np.nan, np.float32))
    other = write(checkpoint, tmp_path / "other", "pi0_torch")
    assert compare(pair[1], other, gradients=False, num_steps=1).first_failure.stage == "velocity"


def test_given_inputs(pair, tmp_path):
    config = get_variant("tiny")
    inputs = Inputs.random(config, batch=1, seed=5)
    arrays = inputs.observation.to_dict() | {"actions": inputs.actions, "noise": inputs.noise, "time": inputs.time}
    np.savez(tmp_path / "inputs.npz", **arrays)
    loaded = Inputs.load(tmp_path / "inputs.npz", config)
    np.testing.assert_array_equal(loaded.noise, inputs.noise)
    np.savez(tmp_path / "short.npz", **inputs.observation.to_dict())
    with pytest.raises(ParityError, match="noise"):
        Inputs.load(tmp_path / "short.npz", config)


def test_different_models_are_not_compared(pair, tmp_path, capsys):
    other = write(random_checkpoint(get_variant("tiny", action_dim=9)), tmp_path / "other", "pi0_torch")
    with pytest.raises(SystemExit) as stop:
        main([str(pair[0]), str(other)])
    assert stop.value.code == 2 and "action_dim: 7 against 9" in capsys.readouterr().err
