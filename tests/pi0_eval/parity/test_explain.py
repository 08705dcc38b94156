"""Planted faults are found at the operation that they are in."""

from __future__ import annotations

import contextlib
from functools import cache
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest

from convert.checkpoints import Checkpoint
from convert.layouts.registry import LAYOUTS
from convert.tensors import Tensor
from pi0.assets import Assets
from pi0.recording import record, section
from pi0.variants import get_variant
from pi0_eval.parity import explain as module
from pi0_eval.parity.compare import errors
from pi0_eval.parity.explain import explain, operations
from pi0_eval.parity.frameworks import Results
from pi0_eval.parity.inputs import Inputs
from pi0_eval.parity.report import PROOF, Report, Row
from pi0_eval.parity.sides import Side
from pi0_torch.models.vision_language import VisionLanguageModel
from tests.faults.forward import jax_code, torch_code
from tests.faults.mutation import Mutation
from tests.faults.weights import weight_mutations
from tests.pairs import random_weights
from tests.pi0_eval.parity.test_compare import random_checkpoint, write

FAULTS = {
    "tiny_pi05": {
        "exact GELU, vision": "vision layer 0: GELU",
        "exact GELU, Gemma": "layer 0: GELU",
        "softmax in float32, Gemma": "layer 0: softmax",
        "no RoPE": "layer 0: RoPE of query",
        "RMS norm in float32": "layer 0: attention norm of prefix",
        "no residual": "layer 0: attention residual",
    },
    "tiny_lora": {
        "LoRA twice": "layer 0: query",  # the records within are of the half
        "paligemma.layers.attention.key.lora.b permuted": "layer 0: LoRA of key",
        "action_expert.layers.mlp.down.lora.a a millionth larger": "layer 0: LoRA of MLP down (2)",
        "cache in float32": "sampling, layer 0 in step 1: logits",
        "one Euler step fewer": "sampling, velocity: Euler step",
    },
    "tiny_pi0_fast": {
        "gate and up swapped": "layer 0: MLP down",
        "paligemma.layers.attention.out.kernel rounded to bfloat16": "layer 0: out projection",
        "logits in float32": "out: vocabulary logits",
        "mask off by one": "sampling, layer 0: mask",  # which the loss does not see
    },
}
CASES = [
    mutation
    for variant, faults in FAULTS.items()
    for make in (weight_mutations, torch_code, jax_code)
    for mutation in make(variant)
    if mutation.name in faults and (variant == "tiny_pi05" or mutation.framework == "torch")
]


def run(framework: str, variant: str, mutation: Mutation | None = None) -> Results:
    config = get_variant(variant, remat="none")
    weights = random_weights(config)
    if mutation is not None:
        weights = mutation.weights(weights)
    tensors = {name: Tensor.of(value) for name, value in weights.items()}
    checkpoint = Checkpoint(Path("memory"), LAYOUTS["pi0_jax"], Assets(config), tensors)
    inputs = Inputs.random(config, batch=3, seed=1)
    return operations(checkpoint, config, inputs, Side(framework, dtype="float64"), 2)


correct = cache(run)


SLOW = [pytest.param(variant, marks=pytest.mark.slow) for variant in ("tiny", "tiny_lora")]  # JAX, uncompiled


@pytest.mark.parametrize("variant", ["tiny_pi05", "tiny_pi0_fast", *SLOW])
def test_correct_pairs_have_the_same_operations(variant: str):
    ours, theirs = correct("jax", variant), correct("torch", variant)
    assert list(ours.stages) == list(theirs.stages)
    assert max(errors(ours, theirs, "float64").values()) <= PROOF


@pytest.mark.parametrize("mutation", CASES, ids=str)
def test_a_fault_is_found_at_its_operation(mutation: Mutation):
    crossed = mutation.variant != "tiny_lora" and mutation.framework == "torch"
    other = correct("jax" if crossed else "torch", mutation.variant)
    with contextlib.ExitStack() as stack:
        for target, name, value in mutation.patches:
            stack.enter_context(patch.object(target, name, value))
        found = run(mutation.framework, mutation.variant, mutation)
    first = next(name for name, error in errors(other, found, "float64").items() if not error <= PROOF)
    assert first == FAULTS[mutation.variant][mutation.name]


@pytest.mark.parametrize("variant", FAULTS)
def test_padding_is_not_compared(variant: str):
    """Masked tokens of other values, in all layers, change no operation; a token that is there does."""
    embed = VisionLanguageModel.embed_prefix

    def embedded(there: bool, value: float):
        def prefix(self, observation, stages=None):
            tokens, valid = embed(self, observation, stages)
            return tokens + value * (valid == there)[..., None], valid

        return patch.object(VisionLanguageModel, "embed_prefix", prefix)

    expected = correct("torch", variant)
    with embedded(False, 10.0):
        assert max(errors(expected, run("torch", variant), "float64").values()) <= PROOF
    with embedded(True, 1e-6):
        found = errors(expected, run("torch", variant), "float64")
    assert next(name for name, error in found.items() if error > PROOF).startswith("layer 0: attention norm")


def test_sides_run_as_they_say(tmp_path):
    """In their dtypes, attention and device, and in float64 on the CPU; but uncompiled, which alone shows values."""
    seen = []

    def spy(checkpoint, config, inputs, num_steps, gradients, side):
        assert config.runtime.dtype == side.dtype
        seen.append(str(side))
        section("velocity")
        record("loss", np.full(3, 2.0 if side.framework == "torch" else 1.0))

    folder = write(random_checkpoint(get_variant("tiny")), tmp_path / "checkpoint", "pi0_torch")
    failed = Report("A", "B", "float32", [Row("loss", 1.0, 0.0, 0.0, 1.0, 0.0)], None, None)
    sides = {"side_a": Side("jax", attention="xla", device="cpu", compiled=True), "side_b": Side(dtype="bfloat16")}
    with patch.object(module, "FRAMEWORKS", {"jax": spy, "torch": spy}):
        said = explain(folder, folder, failed, **sides)
    assert said.startswith("the first operation that parts is velocity: loss (")
    assert said.endswith("most at [0]: A 1.0, B 2.0")
    assert seen == [
        "jax:plain:float64:uncompiled",
        "torch:plain:float64:uncompiled",
        "jax:plain:xla:float32:cpu:uncompiled",
        "torch:plain:bfloat16:uncompiled",
    ]
