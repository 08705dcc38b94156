"""Rewrite the PEP 695 syntax of an installed LeRobot, which needs Python 3.12, for Python 3.11.

Run by the interpreter of its environment. `class A[T]` becomes `class A(Generic[T])`, `def f[T: B]` a plain function
with a TypeVar, `type X = Y` an assignment.
"""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path

CLASS = re.compile(r"^class (\w+)\[([\w, ]+)\](?:\(([^)]*)\))?:", re.M)
FUNCTION = re.compile(r"^( *)def (\w+)\[(\w+)(?:: *(\w+))?\]\(", re.M)
ALIAS = re.compile(r"^( *)type (\w+) = ", re.M)


def rewritten(text: str) -> str:
    """The source without type parameters."""
    names: set[str] = set()

    def of_class(match: re.Match[str]) -> str:
        name, parameters, bases = match.groups()
        names.update(p.strip() for p in parameters.split(","))
        inherited = ", ".join([*([bases] if bases else []), f"Generic[{parameters}]"])
        return f"class {name}({inherited}):"

    def of_function(match: re.Match[str]) -> str:
        names.add(match[3])
        return f"{match[1]}def {match[2]}("

    text = ALIAS.sub(r"\1\2 = ", FUNCTION.sub(of_function, CLASS.sub(of_class, text)))
    if not names:
        return text
    declared = "from typing import Generic, TypeVar\n\n" + "".join(f'{n} = TypeVar("{n}")\n' for n in sorted(names))
    imports = [m.end() for m in re.finditer(r"^(?:from \S+ import (?:\([^)]*\)|[^\n(]*)|import [^\n]*)\n", text, re.M)]
    return text[: imports[-1]] + "\n" + declared + text[imports[-1] :]


def main() -> None:
    """Rewrite all files of the installed package."""
    if sys.version_info >= (3, 12):
        return
    spec = importlib.util.find_spec("lerobot")
    assert spec is not None and spec.submodule_search_locations
    for file in Path(next(iter(spec.submodule_search_locations))).rglob("*.py"):
        text = file.read_text(encoding="utf-8")
        if (new := rewritten(text)) != text:
            file.write_text(new, encoding="utf-8")
            print("rewritten:", file)


if __name__ == "__main__":
    main()
