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

IMPORT_ALL = """
import importlib, pkgutil
for package in {packages!r}:
    for module in pkgutil.walk_packages(importlib.import_module(package).__path__, package + "."):
        importlib.import_module(module.name)
"""

LOAD_AND_SAMPLE = """
sys.path.insert(0, "tests")
import torch, pi0_torch
from golden_case import GoldenCase
case = GoldenCase("pi0")
observation, _, noise, _ = case.inputs()
model = pi0_torch.load(case.checkpoint, config=case.config("float32"))
assert model.sample_actions(pi0_torch.to_device(observation), torch.from_numpy(noise), 3).isfinite().all()
"""


@pytest.mark.parametrize(
    ("blocked", "packages", "code"),
    [
        pytest.param(JAX, ("pi0", "convert", "pi0_torch"), LOAD_AND_SAMPLE, id="pi0_torch-without-jax"),
        pytest.param(TORCH, ("pi0", "convert", "pi0_jax"), "", id="pi0_jax-without-torch"),
        pytest.param(JAX + TORCH, ("pi0", "convert"), "", id="pi0-and-convert-without-both"),
    ],
)
def test_standing_alone(blocked: tuple[str, ...], packages: tuple[str, ...], code: str):
    """Every module of the packages; where JAX is blocked, a checkpoint of openpi's JAX code too."""
    script = BLOCK.format(blocked=blocked) + IMPORT_ALL.format(packages=packages) + code
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
