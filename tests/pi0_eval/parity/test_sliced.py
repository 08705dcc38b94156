"""Layer by layer: the same stages and verdict as the whole comparison, and faults found in the layer they are in."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest

from convert.checkpoints import Checkpoint
from convert.tensors import Index, Tensor
from pi0.variants import get_variant
from pi0_eval.parity import sliced
from pi0_eval.parity.command import main
from pi0_eval.parity.compare import compare, judge
from pi0_eval.parity.inputs import Inputs
from pi0_eval.parity.report import Report
from pi0_eval.parity.sides import Side, SideError
from tests.faults.forward import torch_code
from tests.pi0_eval.parity.test_compare import random_checkpoint, write

SLOW = [pytest.param(variant, marks=pytest.mark.slow) for variant in ("tiny_pi05", "tiny_lora")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Callable[[str, str], Path]:
    """A random checkpoint of a variant in a layout."""
    root = tmp_path_factory.mktemp("sliced")

    def make(variant: str, layout: str) -> Path:
        path = root / f"{variant}-{layout}"
        return path if path.exists() else write(random_checkpoint(get_variant(variant)), path, layout)

    return make


def stages(report: Report) -> list[str]:
    return [row.stage for row in report.rows]


@pytest.mark.parametrize("variant", ["tiny", "tiny_pi0_fast", *SLOW])
def test_the_whole_comparisons_stages(variant: str, folder):
    """JAX against PyTorch, one function. The whole comparison is of PyTorch with itself: it compiles nothing."""
    jax, torch = folder(variant, "pi0_jax"), folder(variant, "pi0_torch")
    whole = compare(torch, torch, num_steps=2)
    report = compare(jax, torch, num_steps=2, sliced=True)
    assert report.passed, report.table()
    assert stages(report) == [s for s in stages(whole) if s.split(",")[0] not in report.left_out]
    assert set(stages(whole)) - set(stages(report)) == {
        "gradients, all",
        "gradients, worst parameter",
        *(["first logits", "decoded logits", "tokens"] if variant == "tiny_pi0_fast" else []),
    }


def test_bfloat16_against_float32(folder):
    report = compare(folder("tiny", "pi0_torch"), folder("tiny", "pi0_torch"), side_b="bfloat16", sliced=True)
    assert report.passed, report.table()
    assert all(row.error_b > 1e-4 for row in report.rows if row.stage.startswith("prefix layer"))


def test_logits_in_parts_of_the_vocabulary(folder, monkeypatch):
    checkpoint = folder("tiny_pi0_fast", "pi0_torch")
    rows = {row.stage: row for row in compare(checkpoint, checkpoint, dtype="bfloat16", sliced=True).rows}
    monkeypatch.setattr(sliced, "ROWS", 100)
    parts = {row.stage: row for row in compare(checkpoint, checkpoint, dtype="bfloat16", sliced=True).rows}
    size = get_variant("tiny_pi0_fast").vocab_size
    assert [s for s in parts if "logits " in s] == [f"logits from {i} on" for i in range(0, size, 100)]
    assert parts["loss"] == rows["loss"]


@pytest.mark.parametrize(
    ("variant", "parameter", "layer", "out"),
    [
        ("tiny", "vision.layers.mlp.up.kernel", 0, {"vision layer 0"}),
        ("tiny", "paligemma.embedding", None, {"prefix tokens"}),
        ("tiny", "paligemma.layers.attention.key.kernel", 1, {"prefix layer 1", "suffix layer 1", "actions"}),
        ("tiny", "action_expert.layers.mlp.down.kernel", 1, {"suffix layer 1", "actions"}),
        ("tiny", "action_out_proj.bias", None, {"velocity", "loss", "actions"}),
        ("tiny_pi05", "time_mlp_in.bias", None, None),
        ("tiny_lora", "paligemma.layers.mlp.gate.lora.b", 2, {"prefix layer 2", "prefix out"}),
        ("tiny_pi0_fast", "paligemma.layers.mlp.gate.kernel", 1, {"prefix layer 1"}),
        ("tiny_pi0_fast", "paligemma.final_norm.scale", None, {"pre-logits"}),
    ],
)
def test_a_wrong_weight_is_out_where_it_is_and_nowhere_else(variant, parameter, layer, out, folder, tmp_path):
    """1 % in one layer of one parameter. What is computed from A's recorded input is right again."""
    checkpoint = random_checkpoint(get_variant(variant))
    value = checkpoint.ours[parameter].read(()).copy()
    value[slice(None) if layer is None else layer] *= np.float32(1.01)
    checkpoint.ours[parameter] = Tensor.of(value)
    other = write(checkpoint, tmp_path / "other", "pi0_torch")
    report = compare(folder(variant, "pi0_torch"), other, num_steps=2, sliced=True)
    found = {row.stage for row in report.rows if not row.passed}
    if out is None:  # in the condition of every layer of the action expert
        out = {s for s in stages(report) if s.startswith("suffix ")} - {"suffix tokens"} | {
            "velocity",
            "loss",
            "actions",
        }
    assert found == out


FAULTS = {"exact GELU, vision": "vision layer 0", "no RoPE": "prefix layer 0", "cache of another row": "actions"}


@pytest.mark.parametrize(
    "mutation",
    [
        pytest.param(m, id=str(m), marks=[] if variant == "tiny" and m.name in FAULTS else pytest.mark.slow)
        for variant in ("tiny", "tiny_pi05", "tiny_pi0_fast", "tiny_lora")
        for m in torch_code(variant)
    ],
)
def test_a_fault_in_the_code_is_found_where_it_is(mutation):
    """Those of `tests.faults` in PyTorch's code, but for the tokens that are not compared."""
    checkpoint = random_checkpoint(get_variant(mutation.variant))
    inputs = Inputs.random(checkpoint.assets.model, batch=3, seed=1)
    sides = [Side("jax", dtype="float32"), Side("torch", dtype="float32")]
    with contextlib.ExitStack() as stack:
        for target, name, value in mutation.patches:
            stack.enter_context(patch.object(target, name, value))
        found = list(sliced.slices([checkpoint] * 2, checkpoint.assets.model, inputs, sides, 3, lambda line: None))
    rows = [row for four in found for row in judge(*four)]
    first = next((row.stage for row in rows if not row.proved), None)
    assert first in (mutation.first if mutation.first not in ((), ("first logits",)) else (None,))


def test_a_layer_at_a_time_is_read():
    """Of the vision tower and PaliGemma, once in each dtype."""
    read: dict[str, list[tuple[int, ...]]] = {}

    def watched(name: str, tensor: Tensor) -> Tensor:
        def see(index: Index) -> np.ndarray:
            value = tensor.read(index)
            read.setdefault(name, []).append(value.shape)
            return value

        return dataclasses.replace(tensor, read=see)

    checkpoint = random_checkpoint(get_variant("tiny"))
    config = checkpoint.assets.model
    ours = {name: watched(name, tensor) for name, tensor in checkpoint.ours.items()}
    sides = [Side("torch", dtype="float32"), Side("torch", dtype="bfloat16")]
    both = [Checkpoint(Path("memory"), checkpoint.layout, checkpoint.assets, c) for c in (ours, checkpoint.ours)]
    for _ in sliced.slices(both, config, Inputs.random(config), sides, 2, lambda line: None):
        pass
    for name, shapes in read.items():
        if name.startswith(("vision.layers", "paligemma.layers")):
            assert shapes == [(1, *checkpoint.ours[name].shape[1:])] * 2 * checkpoint.ours[name].shape[0], name


def test_masks_of_other_tokens_are_infinitely_far_apart(folder):
    """A model that attends to a camera that is not there has other prefix tokens: out, and no exception."""
    from pi0_torch.models.vision_language import VisionLanguageModel

    embed = VisionLanguageModel.embed_prefix

    def all_there(self, observation, stages=None):
        tokens, valid = embed(self, observation, stages)
        return tokens, valid | True

    with patch.object(VisionLanguageModel, "embed_prefix", all_there):
        report = compare(folder("tiny", "pi0_jax"), folder("tiny", "pi0_torch"), num_steps=2, sliced=True)
    assert report.first_failure.stage == "prefix tokens" and report.first_failure.proof == np.inf


def test_the_command(folder, tmp_path, capsys):
    checkpoint = str(folder("tiny", "pi0_torch"))
    options = {f"--{kind}": tmp_path / kind for kind in ("json", "junit", "html", "badge")}
    outputs = [word for option, file in options.items() for word in (option, str(file))]
    with pytest.raises(SystemExit) as stop:
        main([checkpoint, checkpoint, "--sliced", "--quick", *outputs])
    out, err = capsys.readouterr()
    assert stop.value.code == 0 and "not compared: gradients" in out and "layer 2: torch:plain:float64" in err
    values = json.loads(options["--json"].read_text())
    assert values["passed"] and values["left_out"] == ["gradients"] and values["stages"][-1]["stage"] == "actions"
    assert all(file.exists() for file in options.values())


@pytest.mark.parametrize("arguments", [["--side-b", "torch:sampler"], ["--matrix"], ["--explain"]])
def test_what_needs_all_weights_is_refused(arguments: list[str], folder, capsys):
    checkpoint = str(folder("tiny", "pi0_torch"))
    with pytest.raises(SystemExit) as stop:
        main([checkpoint, checkpoint, "--sliced", *arguments])
    assert stop.value.code == 2 and "weights" in capsys.readouterr().err
    with pytest.raises(SideError, match="plain models"):
        compare(checkpoint, checkpoint, side_a="torch:sampler", sliced=True)
