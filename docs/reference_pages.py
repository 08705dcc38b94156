"""The pages of the reference: every public name of every module, from its docstring, and every command's `--help`.

Modules are read, not imported, so that neither framework is needed. A name is public unless it, its class or its module
begins with an underscore.
"""

from __future__ import annotations

import ast
import contextlib
import io
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

ROOT = Path(__file__).parents[1]
PACKAGES = {  # in the order of the floors, with what each is
    "pi0": "What both frameworks share: configs, observations, tokenizers, robots, datasets.",
    "convert": "Checkpoints: formats, layouts, conversion.",
    "pi0_jax": "Models, samplers, policies and training in JAX.",
    "pi0_torch": "Models, samplers and policies in PyTorch.",
    "pi0_eval": "Parity, replay, rollouts, scores, benchmarks, the doctor.",
    "pi0_serve": "The policy server, and the robot's side of it.",
}
Documented = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef


def modules(package: str) -> dict[str, Path]:
    """The public modules of a package by name."""
    found = {}
    for file in sorted((ROOT / package).rglob("*.py")):
        parts = file.relative_to(ROOT).with_suffix("").parts
        parts = parts[:-1] if parts[-1] == "__init__" else parts
        if not any(part.startswith("_") for part in parts):
            found[".".join(parts)] = file
    return found


def public_names(tree: ast.Module) -> Iterator[tuple[str, Documented]]:
    """The public functions, classes and methods of a module, with dots."""
    for node in tree.body:
        if isinstance(node, Documented) and not node.name.startswith("_"):
            yield node.name, node
            if isinstance(node, ast.ClassDef):
                for inner in node.body:
                    if isinstance(inner, ast.FunctionDef | ast.AsyncFunctionDef) and not inner.name.startswith("_"):
                        yield f"{node.name}.{inner.name}", inner


def write(folder: Path) -> None:
    """Write all pages of the reference; those of modules that are gone are deleted."""
    folder.mkdir(exist_ok=True)
    pages = {"commands.md": commands_page()}
    for package in PACKAGES:
        found = modules(package)
        pages |= {f"{name}.md": module_page(name, file) for name, file in found.items()}
        names = [name for name in found if name != package]
        pages[f"{package}.md"] += f"\n## Modules\n\n```{{toctree}}\n:maxdepth: 1\n\n{chr(10).join(names)}\n```\n"
    listed = "\n".join(PACKAGES)
    described = "\n".join(f"- [{name}]({name}.md): {text}" for name, text in PACKAGES.items())
    pages["index.md"] = (
        f"# Reference\n\n- [Commands](commands.md): what each prints for `--help`.\n{described}\n\n"
        f"```{{toctree}}\n:hidden:\n\ncommands\n{listed}\n```\n"
    )
    for file in folder.glob("*.md"):
        if file.name not in pages:
            file.unlink()
    for name, text in pages.items():
        file = folder / name
        if not file.exists() or file.read_text(encoding="utf-8") != text:
            file.write_text(text, encoding="utf-8")


def module_page(name: str, file: Path) -> str:
    """The page of a module."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    parts = [f"# {name}\n", _text(tree), f"```{{py:module}} {name}\n```\n"]
    for dotted, node in public_names(tree):
        parts.append(_entry(dotted, node))
    return "\n".join(parts)


def _entry(dotted: str, node: Documented) -> str:
    kind = "class" if isinstance(node, ast.ClassDef) else "method" if "." in dotted else "function"
    options = ""
    decorators = [ast.unparse(d) for d in node.decorator_list]
    if kind == "method" and any(d.endswith("property") for d in decorators):
        kind = "property"
    elif "classmethod" in decorators:
        options = ":classmethod:\n"
    elif "staticmethod" in decorators:
        options = ":staticmethod:\n"
    signature = "" if kind == "property" else _signature(node)
    body = _text(node) or "Documented where it is inherited from."
    return f"::::{{py:{kind}}} {dotted}{signature}\n{options}\n{body}\n::::\n"


def _signature(node: Documented) -> str:
    if isinstance(node, ast.ClassDef):
        inits = [n for n in node.body if isinstance(n, ast.FunctionDef) and n.name == "__init__"]
        if inits:
            return _signature(inits[0]).partition(" -> ")[0]
        if any("dataclass" in ast.unparse(d) for d in node.decorator_list):
            fields = [n for n in node.body if isinstance(n, ast.AnnAssign) and isinstance(n.target, ast.Name)]
            shown = [_field(n) for n in fields if not n.target.id.startswith("_")]  # type: ignore[union-attr]
            return f"({', '.join(shown)})"
        return ""
    arguments = ast.unparse(node.args)
    for first in ("self", "cls"):
        arguments = arguments.removeprefix(f"{first}, ") if arguments != first else ""
    result = f" -> {ast.unparse(node.returns)}" if node.returns is not None else ""
    return f"({arguments}){result}".replace("\n", " ")


def _field(node: ast.AnnAssign) -> str:
    value = "" if node.value is None else f"={ast.unparse(node.value)}"
    return f"{ast.unparse(node.target)}: {ast.unparse(node.annotation)}{value}".replace("\n", " ")


def _text(node: ast.Module | Documented) -> str:
    """A docstring as Markdown: lists of attributes as lists, other indented blocks as they are, and no stray markup."""
    lines, shown, inside = (ast.get_docstring(node) or "").split("\n"), list[str](), ""
    for line in lines:
        indented = line.startswith("    ")
        if indented and not inside:
            named = re.match(r"    [\w, ]+: ", line) and shown and shown[-1].rstrip().endswith(":")
            inside = "list" if named else "text"
            shown += ["", *(["```text"] if inside == "text" else [])]
        elif inside and line and not indented:
            shown += ["```", ""] if inside == "text" else [""]
            inside = ""
        if inside == "list":
            name = re.match(r"    ([\w, ]+): (.*)", line)
            shown.append(f"- `{name[1]}`: {name[2]}" if name else f"  {line.strip()}")
        else:
            shown.append(line.removeprefix("    ") if inside else line)
    text = "\n".join([*shown, *(["```"] if inside == "text" else []), ""])
    return "".join(
        part if part.startswith("`") else re.sub(r"([\[<*])", r"\\\1", part)
        for part in re.split(r"(```.*?```|`[^`]*`)", text, flags=re.DOTALL)
    )


def commands_page() -> str:
    """The help of every command, at 100 columns."""
    from pi0.command import COMMANDS, load_command

    parts = [
        "# Commands\n\n`pi0 NAME` and `pi0-NAME` are the same. Exit codes are in the help where they say more than 0 "
        "for success and 1 for an error.\n"
    ]
    with mock.patch.dict(os.environ, {"COLUMNS": "100", "NO_COLOR": "1"}):
        for name, text in COMMANDS.items():
            printed = io.StringIO()
            with contextlib.redirect_stdout(printed), contextlib.suppress(SystemExit):
                load_command(name)(["--help"])
            parts.append(
                f"## pi0-{name}\n\n{text[0].upper()}{text[1:]}.\n\n```text\n{printed.getvalue().strip()}\n```\n"
            )
    return "\n".join(parts)


if __name__ == "__main__":
    write(Path(sys.argv[1]))
