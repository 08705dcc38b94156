"""Public docstrings say what is taken, returned and raised.

A public name is one that the reference lists (`docs/reference_pages.py`). Read, not imported.
"""

from __future__ import annotations

import ast
import functools
import importlib
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT / "docs"))
reference_pages = importlib.import_module("reference_pages")

Function = ast.FunctionDef | ast.AsyncFunctionDef
# Arrays without a shape: with one, as in Float[Array, "b h a"], the annotation says it. `Tensor` in convert is not an
# array but a stored tensor, which has its shape and dtype as attributes.
ARRAY = re.compile(r"\b(?:np\.ndarray|jax\.Array|torch\.Tensor|Array|Tensor)\b")
OPAQUE = {"rng": "a random key", "stages": "a dict that receives intermediate results, each of its own shape"}
SHAPED = re.compile(r"\b(?:Float|Int|Bool|UInt8|Num|Shaped|Key|Complex|Inexact|Real|Integer)\w*\[[^\[\]]*\]")
SHAPE = re.compile(r"\[[^\]]*\]|\bscalars?\b|\bany shape\b|\bone dimension\b")
RAISES = re.compile(r"\brais(?:e|es|ed|ing)\b|\brefus(?:e|es|ed|al|ing)\b|\bis an error\b|\bare errors\b", re.I)


@functools.cache
def trees() -> dict[str, ast.Module]:
    """Every public module."""
    return {
        name: ast.parse(file.read_text(encoding="utf-8"))
        for package in reference_pages.PACKAGES
        for name, file in reference_pages.modules(package).items()
    }


@functools.cache
def classes() -> dict[str, list[ast.ClassDef]]:
    """All classes by their names without module."""
    found: dict[str, list[ast.ClassDef]] = {}
    for tree in trees().values():
        for node in ast.walk(tree):
            if isinstance(node, ast.ClassDef):
                found.setdefault(node.name, []).append(node)
    return found


def inherited(owner: ast.ClassDef, name: str) -> bool:
    """Whether a class that `owner` derives from documents the method."""
    for base in owner.bases:
        for parent in classes().get(ast.unparse(base).split("[")[0].split(".")[-1], []):
            for node in parent.body:
                if isinstance(node, Function) and node.name == name and ast.get_docstring(node):
                    return True
            if parent is not owner and inherited(parent, name):
                return True
    return False


def entries() -> Iterator[tuple[str, reference_pages.Documented, ast.ClassDef | None]]:
    """Every entry of the reference, with the class that it is a method of."""
    for module, tree in trees().items():
        owner = None
        for dotted, node in reference_pages.public_names(tree):
            if isinstance(node, ast.ClassDef):
                owner = node
            yield f"{module}.{dotted}", node, owner if "." in dotted else None


def raised(node: ast.AST) -> Iterator[str]:
    """The exceptions that a function raises itself, not those of functions inside of it."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Raise) and isinstance(child.exc, ast.Call):
            yield ast.unparse(child.exc.func).split(".")[-1]
        if not isinstance(child, Function | ast.ClassDef | ast.Lambda):
            yield from raised(child)


def arrays(node: Function) -> list[str]:
    """The annotations of a function's parameters and result that name an array and no shape."""
    arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
    found = [a.annotation for a in arguments if a.annotation and a.arg not in OPAQUE]
    found += [node.returns] if node.returns else []
    texts = [SHAPED.sub("", ast.unparse(a).replace("convert.tensors.Tensor", "")) for a in found]
    return [text for text in texts if ARRAY.search(text)]


def faults(name: str, node: reference_pages.Documented, owner: ast.ClassDef | None) -> Iterator[str]:
    """What an entry's docstring lacks."""
    text = ast.get_docstring(node) or ""
    if not text:
        if owner is None or not inherited(owner, node.name):
            yield f"{name} has no docstring"
        return
    if isinstance(node, ast.ClassDef):
        return
    missing = [error for error in dict.fromkeys(raised(node)) if error not in text]
    if missing and not RAISES.search(text):
        yield f"{name} raises {', '.join(missing)}"
    ours = arrays(node)
    if name.startswith(("convert.", "pi0_eval.")):
        ours = [a for a in ours if re.search(r"np\.ndarray|jax\.Array|torch\.Tensor", a)]
    if ours and not SHAPE.search(text):
        yield f"{name} has no shape of {'; '.join(ours)}"


@pytest.mark.parametrize("package", reference_pages.PACKAGES)
def test_docstrings_say_shapes_and_errors(package: str):
    """Each entry has a docstring, its own or that of the method it overrides; with errors and shapes."""
    found = [f for n, node, owner in entries() if n.split(".")[0] == package for f in faults(n, node, owner)]
    assert not found, "\n".join(found)
