"""A release: versions agree, and the wheel has all that an installation needs, away from this repository."""

from __future__ import annotations

import importlib.metadata
import itertools
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import pi0

ROOT = Path(__file__).parents[1]
SCRIPT = """
import pathlib, sys
sys.path.insert(0, {target!r})
import pi0, pi0.command, configs.metaworld_demo
from pi0.datasets.registry import open_dataset
from pi0.robots.registry import make_robot
from pi0.experiments import read_config
from pi0_eval.doctor.command import main
import pi0_serve.server
dataset = open_dataset("bundled://metaworld_v30", make_robot("metaworld"), episodes=[3])
assert dataset[0]["observation.images.corner"].shape == (128, 128, 3)
assert read_config("metaworld_demo").steps == 300
assert (pathlib.Path(pi0_serve.server.__file__).parent / "page.html").exists()
ours = [m for n, m in sys.modules.items() if n.split(".")[0] in ("pi0", "pi0_eval", "pi0_serve", "convert", "configs")]
assert all(pathlib.Path(m.__file__).is_relative_to({target!r}) for m in ours), [m.__file__ for m in ours]
assert all((pathlib.Path(pi0.__file__).parents[1] / p / "py.typed").exists() for p in ("pi0", "pi0_jax", "pi0_torch"))
"""
IMPORTS = """
import importlib, pkgutil
for top in ("pi0", "convert", "pi0_jax", "pi0_eval", "pi0_serve", "configs"):
    for found in pkgutil.walk_packages(importlib.import_module(top).__path__, f"{top}."):
        importlib.import_module(found.name)
"""
PIP = ["-m", "pip", "--quiet", "--disable-pip-version-check"]


def test_versions_agree():
    assert re.search(r"^version: (.*)$", (ROOT / "CITATION.cff").read_text(), re.M)[1] == pi0.__version__
    assert "## [Unreleased]" in (ROOT / "CHANGELOG.md").read_text()


def test_every_requirement_is_pinned():
    """`constraints.txt` has a version of each package of each extra, within what it asks."""
    pins = read_pins()
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for text in [*project["dependencies"], *itertools.chain(*project["optional-dependencies"].values())]:
        requirement = Requirement(text)
        if (name := canonicalize_name(requirement.name)) == "pi0":
            continue
        assert name in pins, f"{name} has no version in constraints.txt"
        assert requirement.specifier.contains(pins[name]), f"{text} excludes {name} {pins[name]}"


def test_pins_agree_with_each_other():
    """What an installed package of a pinned version requires of another is what is pinned: pip can resolve them."""
    pins, checked = read_pins(), 0
    for distribution in importlib.metadata.distributions():
        if pins.get(canonicalize_name(distribution.name)) != distribution.version:
            continue
        for text in distribution.requires or []:
            requirement = Requirement(text)
            name = canonicalize_name(requirement.name)
            if name in pins and (requirement.marker is None or requirement.marker.evaluate({"extra": ""})):
                wrong = f"{distribution.name} requires {text}; constraints.txt has {pins[name]}"
                assert requirement.specifier.contains(pins[name], prereleases=True), wrong
                checked += 1
    assert checked > 50


def read_pins() -> dict[str, str]:
    """The versions of `constraints.txt` by package."""
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    return dict(line.split("==") for line in lines if not line.startswith("#"))


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """Built from a copy of what is tracked, so that no other file of the checkout is packed by chance."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in listed.split("\0"):
        if name and not name.startswith("tests/") and (ROOT / name).exists():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, source / name)
    subprocess.run([sys.executable, *PIP, "wheel", "--no-deps", "--wheel-dir", folder, source], check=True, cwd=folder)
    return next(folder.glob("*.whl"))


@pytest.mark.network  # pip fetches setuptools
def test_the_wheel_works_in_an_empty_folder(wheel: Path, tmp_path: Path):
    target, empty = tmp_path / "target", tmp_path / "empty"
    empty.mkdir()
    names = zipfile.ZipFile(wheel).namelist()
    assert not [name for name in names if name.startswith(("tests/", "benchmarks/", "docs/"))]
    subprocess.run([sys.executable, *PIP, "install", "--no-deps", "--target", target, wheel], check=True, cwd=empty)
    script = SCRIPT.format(target=str(target))
    result = subprocess.run([sys.executable, "-c", script], cwd=empty, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert not list(empty.iterdir())


@pytest.mark.slow
@pytest.mark.network
@pytest.mark.parametrize("version", ["3.11", "3.12", "3.13"])
def test_the_wheel_on_each_python(version: str, wheel: Path, tmp_path: Path):
    """Installed with the pinned versions for JAX and serving: every module is imported, and data is read."""
    python = find_python(version)
    if python is None:
        pytest.skip(f"there is no python{version} on PATH, nor at $PYTHON_{version.replace('.', '_')}")
    subprocess.run([python, "-m", "venv", tmp_path / "venv"], check=True)
    own, pins = tmp_path / "venv" / "bin", ROOT / "constraints.txt"
    subprocess.run([own / "python", *PIP, "install", f"{wheel}[jax,serve,gcs]", "-c", pins], check=True, cwd=tmp_path)
    for command in ([own / "python", "-c", IMPORTS], [own / "pi0-check-data", "bundled://metaworld_v30"]):
        result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
        assert result.returncode == 0, result.stderr


def find_python(version: str) -> str | None:
    """An interpreter of that version that starts."""
    name = os.environ.get(f"PYTHON_{version.replace('.', '_')}") or shutil.which(f"python{version}")
    if name is None or subprocess.run([name, "-V"], capture_output=True, check=False).returncode:
        return None
    return name
