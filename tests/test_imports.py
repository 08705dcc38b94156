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
        pytest.param(JAX + TORCH, ("pi0", "convert", "pi0_serve"), "", id="pi0-convert-and-pi0_serve-without-both"),
    ],
)
def test_standing_alone(blocked: tuple[str, ...], packages: tuple[str, ...], code: str):
    """Every module of the packages; where JAX is blocked, a checkpoint of openpi's JAX code too."""
    script = BLOCK.format(blocked=blocked) + IMPORT_ALL.format(packages=packages) + code
    result = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


def test_a_robot_needs_numpy_msgpack_and_websockets_alone():
    script = "import sys\nfrom pi0_serve import ChunkPlayer, Client\nprint(*sys.modules)"
    result = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    packages = {name.split(".")[0] for name in result.stdout.split()} - set(sys.stdlib_module_names)
    assert {name for name in packages if not name.startswith(("_", "sitecustomize"))} - {"cython_runtime"} <= {
        *("numpy", "msgpack", "websockets", "pi0_serve"),
    }


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


# What only one framework needs: dtypes that have no name, graphs that are compiled, layers that are stacked.
ONLY_TORCH = {
    "dtype_name",
    "as_module",
    "own",
    "Widened",
    "Widened.__init__",
    "Widened.__getitem__",
    "FusedModel.__init__",
    "Sampler._compiled",
    "Policy._on_device",
}
ONLY_JAX = {"constrain_rows", "record", "unstack", "use_compilation_cache"}
MIRRORED = ("sampler.py", "fused.py", "policy.py")
# Of training: optax and Orbax are libraries, and PyTorch's checkpoints, optimizer and sharded arithmetic our own code.
ONLY_TORCH |= {"Block.around", "Optimizer", "sgd", "buckets", "global_norm"}
ONLY_TORCH |= {f"Checkpoints.{name}" for name in ("_steps", "_collect", "_write", "_delete_old", "_validation_loss")}
ONLY_TORCH |= {"_tensors", "_finite", "Root", "Root.__init__", "Root.forward", "Root.parameter_of"}
ONLY_TORCH |= {"repeatable", "fill", "count_flops", "find_mesh_device", "process_index", "process_count"}
ONLY_TORCH |= {"check_config", "shard", "whole", "mean_over_processes", "sharded_norm"}
ONLY_JAX |= {f"Assets{name}" for name in ("Handler", "Handler.save", "Handler.restore", "Save", "Restore")}
ONLY_JAX |= {
    "_validation_loss",
    "Checkpoints.wait_until_signed",
    "Checkpoints._sign_when_complete",
    "_all_finite",
    "in_bfloat16",
}
ONLY_JAX |= {"keep_compiled", "check_remat", "partition_specs", "_partition_spec", "state_shardings", "global_batch"}
JAX_FILES_ONLY = {"exports.py", "prove.py"}  # runs in JAX are exported to PyTorch and compared with that


def mirrored(tree: str) -> dict[str, Path]:
    """The files of a tree that the other one has too."""
    training = {f"training/{f.name}": f for f in (ROOT / tree / "training").glob("*.py")}
    found = {f.name: f for f in [*(ROOT / tree / "models").glob("*.py"), *(ROOT / tree / name for name in MIRRORED)]}
    return found | {name: file for name, file in training.items() if file.name not in JAX_FILES_ONLY}


JAX_FILES, TORCH_FILES = mirrored("pi0_jax"), mirrored("pi0_torch")


def test_the_same_files():
    assert JAX_FILES.keys() == TORCH_FILES.keys()


@pytest.mark.parametrize("name", sorted(JAX_FILES))
def test_the_same_definitions_in_the_same_order(name: str):
    def renamed(name: str) -> str:
        return name.replace("merged_weight", "merged_kernel")

    only_torch = ONLY_TORCH | ({"local_part"} if name == "training/sharding.py" else set())
    in_torch = [renamed(n) for n in outline(TORCH_FILES[name]) if n not in only_torch]
    assert [n for n in outline(JAX_FILES[name]) if n not in ONLY_JAX] == in_torch
