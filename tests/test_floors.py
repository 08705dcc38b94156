"""The house: every import points down or stays on its floor, and no files import each other in a circle.

All imports count, also those within functions and for type checkers alone.
"""

from __future__ import annotations

import ast
import graphlib
import importlib
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FLOORS = {"pi0": 1, "convert": 2, "pi0_jax": 3, "pi0_torch": 3, "pi0_eval": 4, "pi0_serve": 4}
BESIDE = {"configs": {"pi0", "configs"}}  # and what they may import
FRAMEWORKS = {"jax", "jaxlib", "flax", "optax", "orbax", "torch"}
MAX_LINES = 450


def files() -> dict[str, Path]:
    """The product's modules by name."""
    found = (file for package in [*FLOORS, *BESIDE] for file in (ROOT / package).rglob("*.py"))
    return {".".join(f.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): f for f in found}


FILES = files()


def imports(name: str) -> set[str]:
    """The modules that a module imports: of this project the files that names come from, of others the package."""
    found = set()
    for node in ast.walk(ast.parse(FILES[name].read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0 and node.module, f"{name} has a relative import"
            parts = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= (parts & FILES.keys()) | ({node.module} if parts - FILES.keys() else set())
    return {module if module in FILES else module.split(".")[0] for module in found}


def room(module: str) -> str:
    return module.split(".")[0]


IMPORTS = {name: imports(name) for name in FILES}


@pytest.mark.parametrize("name", FILES)
def test_imports_point_down(name: str):
    allowed = BESIDE.get(room(name))
    if allowed is None:
        floor = FLOORS[room(name)]
        allowed = {other for other, its in FLOORS.items() if its < floor or other == room(name)}
        allowed |= set(BESIDE) if floor > 2 else set()
    rooms = {room(module) for module in IMPORTS[name]} & {*FLOORS, *BESIDE}
    assert rooms <= allowed, f"{name} imports {sorted(rooms - allowed)}"


@pytest.mark.parametrize("name", [name for name in FILES if FLOORS.get(room(name), 1) < 3])
def test_no_framework_below_the_third_floor(name: str):
    assert not IMPORTS[name] & FRAMEWORKS


def test_no_circles():
    graph = {
        name: {module for module in found if module in FILES and module != name} for name, found in IMPORTS.items()
    }
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


def test_a_circle_would_be_found(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(IMPORTS, "pi0.numerics", {"pi0.assets"})
    monkeypatch.setitem(IMPORTS, "pi0.assets", {"pi0.numerics"})
    with pytest.raises(pytest.fail.Exception, match="numerics"):
        test_no_circles()


@pytest.mark.parametrize("name", FILES)
def test_files_are_short(name: str):
    lines = len(FILES[name].read_text().splitlines())
    assert lines <= MAX_LINES, f"{name} has {lines} lines"


@pytest.mark.parametrize("package", [*FLOORS, *BESIDE])
def test_public_names_can_be_imported(package: str):
    """In every module of every package; and each package is marked as typed."""
    assert (ROOT / package / "py.typed").exists()
    for module in pkgutil.walk_packages([str(ROOT / package)], f"{package}."):
        names = getattr(importlib.import_module(module.name), "__all__", [])
        assert all(hasattr(sys.modules[module.name], name) for name in names), module.name
    loaded = importlib.import_module(package)
    for name in getattr(loaded, "__all__", []):
        assert getattr(loaded, name) is not None


@pytest.mark.parametrize("module", ["pi0_jax.models.gemma", "pi0_torch.models.gemma"])
def test_models_load_no_checkpoint_code(module: str):
    script = f"import sys, {module}; print(*[name for name in sys.modules if name.split('.')[0] == 'convert'])"
    result = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    assert result.stdout.split() == []
