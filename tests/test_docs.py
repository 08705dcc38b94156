"""README and docs: short, true, complete; links, commands and code are valid, and the reference has all names.

`--run-slow` builds the site and runs, in order, the commands of README and of the tutorial.
"""

from __future__ import annotations

import argparse
import ast
import functools
import importlib
import inspect
import os
import pkgutil
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from pi0.command import COMMANDS, load_command
from pi0.experiments import find_experiment, read_config

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "SECURITY.md", *sorted((ROOT / "docs").glob("*.md"))]
PACKAGES = ("pi0", "convert", "pi0_jax", "pi0_torch", "pi0_eval", "pi0_serve")
sys.path.append(str(ROOT / "docs"))
reference_pages = importlib.import_module("reference_pages")


def blocks(page: Path, language: str) -> list[str]:
    """The code blocks of a page in a language; without one for commands."""
    fences = re.findall(r"^```([\w{}-]*)\n(.*?)^```$", page.read_text(), re.M | re.S)
    return [text for name, text in fences if name == language]


def commands(page: Path) -> list[str]:
    """The lines of a page's blocks that run a command of this project, with their continuations, without comments."""
    found = []
    for block in blocks(page, ""):
        for line in block.replace("\\\n", " ").split("\n"):
            if re.match(r"\s*pi0-[a-z]", line):
                found.append(re.sub(r"\s+#.*", "", line).strip())
    return found


COMMAND_LINES = [(page, line) for page in PAGES for line in commands(page)]


class Parsed(Exception):
    """The arguments were understood; the command does not run."""


@pytest.mark.parametrize(("page", "line"), COMMAND_LINES, ids=[f"{p.stem}: {c[:60]}" for p, c in COMMAND_LINES])
def test_commands_are_understood(page: Path, line: str, monkeypatch: pytest.MonkeyPatch):
    """Every argument is known and its value of the right type; experiments exist, with the fields that are set."""
    if "…" in line or "..." in line.split() or re.search(r" (train|parity) \.\.\.|--config \.\.\.", line):
        pytest.skip("is an outline")
    words = shlex.split(os.path.expandvars(line.replace("$TASKS", "metaworld/reach-v3")))
    name, arguments = words[0].removeprefix("pi0-"), words[1:]
    assert name in COMMANDS, f"{page}: there is no pi0-{name}"
    original = argparse.ArgumentParser.parse_known_args

    def parse(self, args=None, namespace=None):
        result = original(self, args, namespace)
        if (config := getattr(result[0], "config", None)) and not config.endswith(".py"):
            find_experiment(config)
            read_config(config, result[1])
        raise Parsed

    monkeypatch.setattr(argparse.ArgumentParser, "parse_known_args", parse)
    with pytest.raises(Parsed):
        load_command(name)(arguments)


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_code_compiles(page: Path):
    for code in blocks(page, "python"):
        ast.parse(code)


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_lead_somewhere(page: Path):
    """Relative ones: files of the repository, or pages of the reference, and headings."""
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.S)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if "://" in target:
            continue
        name, _, anchor = target.partition("#")
        file = page.parent / name if name else page
        if name.startswith("reference/"):
            module = name.removeprefix("reference/").removesuffix(".md")
            assert module in ("index", "commands") or any(module in modules(p) for p in PACKAGES), target
            continue
        assert file.exists(), f"{page.name}: {target}"
        if anchor:
            slugs = [
                re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-")
                for title in re.findall(r"^#+ (.*)$", file.read_text(), re.M)
            ]
            assert anchor in slugs, f"{page.name}: {target}"


def test_readme_is_short_and_begins_with_the_two_commands():
    text = (ROOT / "README.md").read_text()
    assert len(text.split()) <= 900
    assert text.index("make demo") < text.index("make test") < text.index("##")


def test_every_extra_is_in_the_tables():
    extras = re.search(r"\[project.optional-dependencies\]\n(.*?)\n\[", (ROOT / "pyproject.toml").read_text(), re.S)[1]
    names = re.findall(r"^([a-z0-9-]+) = ", extras, re.M)
    for page in ("README.md", "docs/install.md"):
        missing = [name for name in names if f"`{name}`" not in (ROOT / page).read_text()]
        assert not missing, f"{page} lacks {missing}"


@functools.cache
def modules(package: str) -> dict[str, Path]:
    return reference_pages.modules(package)


@pytest.mark.parametrize("package", PACKAGES)
def test_the_reference_has_every_public_name(package: str):
    """By importing, where the generator reads: functions, classes and methods that are defined in a module."""
    for found in pkgutil.walk_packages([str(ROOT / package)], f"{package}."):
        if any(part.startswith("_") for part in found.name.split(".")):
            continue
        module = importlib.import_module(found.name)
        page = reference_pages.module_page(found.name, modules(package)[found.name])
        entries = set(re.findall(r"^::::\{py:\w+\} ([\w.]+)", page, re.M))
        for name, value in vars(module).items():
            if name.startswith("_") or getattr(value, "__module__", None) != found.name:
                continue
            if inspect.isclass(value) or inspect.isfunction(inspect.unwrap(value)):
                own = getattr(value, "__name__", name)
                assert own in entries or name != own, f"{found.name}.{name}"


@pytest.mark.parametrize("package", PACKAGES)
def test_every_public_name_is_documented(package: str):
    """Methods that another class documents, and dataclasses' own, excepted."""
    missing = []
    for name, file in modules(package).items():
        tree = ast.parse(file.read_text())
        if not ast.get_docstring(tree):
            missing.append(name)
        for dotted, node in reference_pages.public_names(tree):
            if "." not in dotted and not ast.get_docstring(node):
                missing.append(f"{name}.{dotted}")
    assert not missing


def test_every_command_is_in_the_reference():
    page = reference_pages.commands_page()
    for name in COMMANDS:
        assert f"## pi0-{name}" in page and f"usage: pi0-{name}" in page, name


@pytest.mark.slow
def test_the_site_builds_without_a_warning(tmp_path: Path):
    pytest.importorskip("sphinx_book_theme")
    command = [sys.executable, "-m", "sphinx", "-q", "-W", "-b", "html", ROOT / "docs", tmp_path]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "reference" / "pi0_torch.policy.html").exists()


SHORTER = {
    "pi0-train": "--config.steps=2 --config.batch_size=4 --config.optimizer.warmup_steps=1",
    "pi0-replay": "--overwrite",
    "pi0-stats": "--overwrite",
}
CHECKPOINTS = {  # that a page takes as given: folder, layout
    "docs/ci.md": (("exported/jax", "pi0_jax"), ("exported/torch", "pi0_torch")),
    "docs/run.md": (("runs/demo/export", "pi0_torch"),),
    "docs/train_torch.md": (("exported", "pi0_torch"),),
}
FIRST = {"docs/compare.md": "pi0-convert tests/golden/pi0/checkpoint runs/pi0_torch --to pi0_torch"}  # by another page
QUICK_PAGES = ("docs/convert.md",)  # the other pages are slow
RUN_PAGES = (
    "README.md",
    *(f"docs/{n}.md" for n in ["add_robot", "ci", "compare", "data", "doctor", "finetune", "recipe", "run", "train"]),
)


@pytest.mark.parametrize(
    "page", [*QUICK_PAGES, *(pytest.param(p, marks=pytest.mark.slow) for p in (*RUN_PAGES, "docs/train_torch.md"))]
)
def test_the_commands_run_in_order(page: str, tmp_path: Path):
    """Those that need no simulator and end by themselves, in a folder with the tests' checkpoints; training is cut.

    The pages rollout, scaling and serving are left out: simulators, clusters, and servers, which have tests.
    """
    from tests.pi0_serve.serving import write_tiny

    (tmp_path / "tests").symlink_to(ROOT / "tests")
    for folder, layout in CHECKPOINTS.get(page, ()):
        write_tiny(tmp_path / folder, layout, action_horizon=10)
    lines = [*([FIRST[page]] if page in FIRST else []), *commands(ROOT / page)]
    run = [line for line in lines if not re.match(r"pi0-(serve|rollout)", line)]
    assert run
    for line in run:
        words = shlex.split(line)
        command = [
            sys.executable,
            "-c",
            "import sys; from pi0.command import main; sys.argv[0] = sys.argv.pop(1); main()",
        ]
        command += [*words, *SHORTER.get(words[0], "").split()]
        environment = os.environ | {"PYTHONPATH": str(ROOT), "PI0_CACHE": str(tmp_path / "cache")}
        result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
        # The doctor may find that a model of two steps is none, and does find the fault that its page shows.
        assert result.returncode in ((0, 1) if words[0] == "pi0-doctor" else (0,)), f"{line}\n{result.stderr}"
