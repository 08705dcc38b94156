"""What PyTorch's loader accepts, what it refuses, and what it imports."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import pi0_torch
from pi0.config import ConfigError
from pi0_torch.loading import abstract_model
from tests.golden_case import GoldenCase

ROOT = Path(__file__).parents[2]
CASE = GoldenCase("pi0")

SCRIPT = """
import sys
import numpy as np
import pi0_torch
from pi0.variants import get_variant
from pi0_torch.loading import abstract_model

image = np.zeros((48, 64, 3), np.uint8)
frame = dict(corner=image, wrist=image, state=np.zeros(4), prompt="open the drawer")
for use_sampler in (False, True):
    pi0_torch.Policy.from_pretrained("tests/written_before/export", use_sampler=use_sampler).infer(frame)
for name in ("tiny_lora", "tiny_pi05", "tiny_pi0_fast"):
    abstract_model(get_variant(name))
print(*{"torch._dynamo", "torch._inductor", "triton"} & set(sys.modules))
"""


def test_no_compiler_is_imported():
    """Not by loading, acting or the sampler: Triton takes seconds, and crashes MuJoCo's OSMesa after it."""
    result = subprocess.run([sys.executable, "-c", SCRIPT], cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0 and result.stdout.split() == [], result.stdout + result.stderr


@pytest.mark.parametrize("dtype", [torch.bfloat16, "bfloat16"])
def test_dtypes_of_pytorch(dtype: Any):
    model = pi0_torch.load(CASE.checkpoint, config=CASE.config("float32"), dtype=dtype, param_dtype=dtype)
    assert model.config.runtime.dtype == "bfloat16" and {p.dtype for p in model.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("dtype", [torch.float16, "fp16", "int8", torch.int8, np.float64, 16])
def test_other_dtypes_are_refused_by_name(dtype: Any):
    for name in ("dtype", "param_dtype"):
        with pytest.raises(ConfigError, match=f"^{name} is .*must be one of float32, bfloat16"):
            pi0_torch.load(CASE.checkpoint, config=CASE.config("float32"), **{name: dtype})


@pytest.mark.parametrize("device", ["cudaa", "cuda:99", "", 3.5, "tpu"])
def test_devices_that_are_not_there(device: Any):
    with pytest.raises(ValueError, match=r"^device is "):
        pi0_torch.load(CASE.checkpoint, config=CASE.config("float32"), device=device)


def test_models_are_made_without_memory():
    assert {p.device.type for p in abstract_model(CASE.config("float32")).parameters()} == {"meta"}
