"""Each tree stands alone, and both are mirrors."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
JAX, TORCH = ("jax", "jaxlib", "flax", "optax", "orbax"), ("torch",)

BLOCK = """
import sys
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {blocked!r}:
            raise ImportError(name + " is blocked")
sys.meta_path.insert(0, Blocker())
"""

SAMPLE_IN_TORCH = """
import numpy as np, torch, pi0_torch
from pi0.config import ModelConfig
from pi0.observation import Observation
config = ModelConfig.variant("tiny")
data = {"state": np.zeros((1, 7)), "tokenized_prompt": np.zeros((1, 8), int),
        "tokenized_prompt_mask": np.ones((1, 8), bool)}
data |= {f"image/{k}": np.zeros((1, 28, 42, 3), np.uint8) for k in config.image_keys}
observation = pi0_torch.to_device(Observation.from_dict(data, config))
assert pi0_torch.Pi0(config).sample_actions(observation, torch.zeros(1, 5, 7)).shape == (1, 5, 7)
"""

MODULES = "import pi0.pipeline, pi0.datasets, pi0.assets, convert.checkpoints, convert.conversion, convert.parity"


@pytest.mark.parametrize(
    ("blocked", "code"),
    [
        pytest.param(JAX, f"import pi0_torch\n{MODULES}\n{SAMPLE_IN_TORCH}", id="pi0_torch-without-jax"),
        pytest.param(TORCH, f"import pi0_jax, pi0_jax.train\n{MODULES}", id="pi0_jax-without-torch"),
        pytest.param(JAX + TORCH, MODULES, id="pi0-and-convert-without-both"),
    ],
)
def test_standing_alone(blocked: tuple[str, ...], code: str):
    script = BLOCK.format(blocked=blocked) + code
    result = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


def outline(file: Path) -> list[str]:
    """The classes, methods and functions of a file in order. `__call__` in Flax is `forward` in PyTorch."""
    names = []
    for node in ast.parse(file.read_text()).body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef):
            names.append(node.name)
        if isinstance(node, ast.ClassDef):
            methods = [n.name for n in node.body if isinstance(n, ast.FunctionDef)]
            names += [f"{node.name}.{'forward' if m == '__call__' else m}" for m in methods]
    return names


JAX_FILES = {f.name: f for f in (ROOT / "pi0_jax" / "models").glob("*.py")}
TORCH_FILES = {f.name: f for f in (ROOT / "pi0_torch" / "models").glob("*.py")}


def test_the_same_files():
    assert JAX_FILES.keys() == TORCH_FILES.keys()


@pytest.mark.parametrize("name", sorted(JAX_FILES))
def test_the_same_definitions_in_the_same_order(name: str):
    in_torch = [n for n in outline(TORCH_FILES[name]) if n != "dtype_name"]  # of dtypes, which have no name in PyTorch
    assert outline(JAX_FILES[name]) == in_torch
