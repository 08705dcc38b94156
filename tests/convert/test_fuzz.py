"""Damaged checkpoints of every layout: each is refused, by name, and nothing is written."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from convert.checkpoints import Checkpoint, write_checkpoint
from convert.conversion import convert
from convert.formats.orbax import write_orbax
from convert.formats.safetensors import write_safetensors
from convert.layouts.registry import LAYOUTS
from convert.tensors import CheckpointError, Tensor
from pi0.assets import Assets
from pi0.parameters import LayoutError, parameters
from pi0.storage import new_folder
from pi0.variants import get_variant
from tests.convert.test_checkpoints import OF_PI0

CASES_PER_LAYOUT = 50
DAMAGES = ("dropped", "renamed", "transposed", "nan", "dtype", "extra", "halves", "truncated")


def arrays(variant: str, layout: str) -> dict[str, np.ndarray]:
    config, rng = get_variant(variant), np.random.default_rng(0)
    ours = {n: Tensor.of(rng.normal(size=p.shape).astype(np.float32)) for n, p in parameters(config).items()}
    return {name: np.array(t.read(())) for name, t in LAYOUTS[layout].from_ours(config, ours).items()}


def write(layout: str, tensors: dict[str, np.ndarray], folder: Path) -> None:
    """The weights as they are, right or wrong, in the layout's format."""
    lazy = {name: Tensor.of(array) for name, array in tensors.items()}
    if LAYOUTS[layout].format == "safetensors":
        write_safetensors(folder / "model.safetensors", lazy, {"format": "pt"})
    else:
        shutil.rmtree(folder / "params")
        write_orbax(folder / "params", lazy, LAYOUTS[layout].root)


def damage(kind: str, tensors: dict[str, np.ndarray], name: str, rng: np.random.Generator) -> str:
    """Damage one tensor (or half of them) in place; returns what the error has to name."""
    array = tensors[name]
    if kind == "dropped":
        del tensors[name]
    elif kind == "renamed":
        tensors[f"{name}_x"] = tensors.pop(name)
    elif kind == "extra":
        tensors[f"{name}_x"] = array
        return f"{name}_x"
    elif kind == "transposed":
        tensors[name] = np.ascontiguousarray(array[None] if array.T.shape == array.shape else array.T)
    elif kind == "dtype":
        tensors[name] = array.astype(np.int32)
    elif kind == "nan":
        array.flat[rng.integers(array.size)] = rng.choice([np.nan, np.inf, -np.inf])
    return name


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    root, config = tmp_path_factory.mktemp("fuzz"), get_variant("tiny")
    ours = {n: Tensor.of(np.ones(p.shape, np.float32)) for n, p in parameters(config).items()}
    for layout in OF_PI0:
        with new_folder(root / layout) as folder:
            write_checkpoint(Checkpoint(folder, LAYOUTS["pi0_jax"], Assets(config), ours), folder, layout)
    return {layout: root / layout for layout in OF_PI0}


@pytest.mark.parametrize("layout", OF_PI0)
def test_damaged_checkpoints_are_refused(layout: str, folders: dict[str, Path], tmp_path):
    rng, intact, other = np.random.default_rng(1), arrays("tiny", layout), arrays("tiny_pi05", layout)
    causes = set()
    for case in range(CASES_PER_LAYOUT):
        kind = DAMAGES[case % len(DAMAGES)]
        folder = Path(shutil.copytree(folders[layout], tmp_path / "source"))
        tensors = {name: np.array(array) for name, array in intact.items()}
        name = str(rng.choice(list(intact)))
        named = damage(kind, tensors, name, rng)
        if kind == "halves":  # the first half of one model and the second of another
            half = len(intact) // 2
            tensors = dict(list(intact.items())[:half]) | dict(list(other.items())[half:])
            named = next(iter(intact.keys() - tensors.keys()))
        write(layout, tensors, folder)
        if kind == "truncated":
            files = [
                f for f in folder.rglob("*") if f.is_file() and f.name not in ("config.json", "_CHECKPOINT_METADATA")
            ]
            file = max(files, key=lambda f: f.stat().st_size)
            # In the first half: the end of an Orbax file may be an index that a later one has replaced.
            file.write_bytes(file.read_bytes()[: int(rng.integers(file.stat().st_size // 2))])
            named = ""  # the file, or the first tensor found in it
        with pytest.raises((LayoutError, CheckpointError)) as error:
            convert(folder, tmp_path / "out", to="pi0_torch" if layout != "pi0_torch" else "pi0_jax")
        said = str(error.value)
        # Our names and theirs differ by separators and layer numbers where the values, not the names, are wrong.
        assert kind == "nan" or named in said or kind == "halves", (kind, name, said)
        assert said and [f.name for f in tmp_path.iterdir()] == ["source"], (kind, name)
        causes.add(kind)
        shutil.rmtree(folder)
    assert causes == set(DAMAGES)


def test_there_are_200_cases():
    assert CASES_PER_LAYOUT * len(OF_PI0) >= 200


def test_a_config_of_another_model_is_refused(folders, tmp_path):
    folder = Path(shutil.copytree(folders["pi0_torch"], tmp_path / "source"))
    config = json.loads((folder / "config.json").read_text())
    config["model"]["kind"] = "pi05"
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(LayoutError, match=r"time_mlp_in\.weight"):
        convert(folder, tmp_path / "out", to="pi0_jax")
