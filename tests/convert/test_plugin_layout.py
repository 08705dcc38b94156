"""A layout from a file outside of the packages."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

import pi0_torch
from convert.checkpoints import open_checkpoint
from convert.conversion import convert, main
from convert.inspection import inspect
from convert.layouts.registry import find_layout
from convert.tensors import same_bytes
from pi0.parameters import LayoutError
from tests.convert.test_checkpoints import assert_same, random_checkpoint, write

NAME = "lab_layouts:MIRROR"
CODE = """
from convert.layouts.layout import Layout, Rule
from convert.layouts.pi0_torch import LAYOUT

def write_readme(folder, assets, dtype):
    (folder / "README").write_text(f"{assets.model.kind}, {dtype}")

# Every name backwards, and a name of its own for one tensor.
MIRROR = Layout(
    "mirror",
    tuple(Rule(rule.ours, ".".join(reversed(rule.theirs.split("."))), rule.axes) for rule in LAYOUT.rules),
    kinds=("pi0",),
    format="safetensors",
    spellings=((r"^head\\.", "bias.state_proj."),),
    write_sidecars=write_readme,
    config_folder="",
)
NOT_A_LAYOUT = 5
"""


@pytest.fixture(autouse=True)
def package(tmp_path, monkeypatch):
    (tmp_path / "package").mkdir()
    (tmp_path / "package" / "lab_layouts.py").write_text(CODE)
    monkeypatch.syspath_prepend(tmp_path / "package")
    monkeypatch.delitem(sys.modules, "lab_layouts", raising=False)


@pytest.fixture
def source(tmp_path) -> Path:
    return write(random_checkpoint(), tmp_path / "source", "pi0_torch")


def test_there_and_back_every_byte(source, tmp_path):
    converted = convert(source, tmp_path / "mirror", to=NAME)
    assert converted.layout.name == "mirror" and "weight.state_proj" in converted.in_layout(NAME)
    assert (tmp_path / "mirror" / "README").read_text() == "pi0, float32"
    back = convert(tmp_path / "mirror", tmp_path / "back", to="pi0_torch", layout=NAME)
    assert_same(back.ours, open_checkpoint(source).ours)
    one, other = ((folder / "model.safetensors").read_bytes() for folder in (source, tmp_path / "back"))
    assert one == other
    opened = open_checkpoint(tmp_path / "mirror", layout=find_layout(NAME))
    model = pi0_torch.loading.load_model(opened)
    for name, tensor in opened.in_layout("pi0_torch").items():
        assert same_bytes(pi0_torch.loading.to_numpy(model.state_dict()[name]), tensor.read(()))


def test_the_commands(source, tmp_path, capsys):
    main([str(source), str(tmp_path / "mirror"), "--to", NAME])
    main([str(tmp_path / "mirror"), str(tmp_path / "back"), "--to", "pi0_torch", "--layout", NAME])
    assert_same(open_checkpoint(tmp_path / "back").ours, open_checkpoint(source).ours)
    assert inspect(tmp_path / "mirror", layout=NAME).problems == []


def test_it_is_not_detected(source, tmp_path):
    convert(source, tmp_path / "mirror", to=NAME)
    with pytest.raises(LayoutError):
        open_checkpoint(tmp_path / "mirror")
    with pytest.raises(LayoutError, match="tried openpi_torch"):
        open_checkpoint(tmp_path / "mirror", layout="openpi_torch")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("mirror", "unknown layout 'mirror'; known are pi0_jax, "),
        ("lab_layouts:NOT_A_LAYOUT", "is int; expected"),
        ("lab_layouts:NOTHING", "cannot be imported"),
        ("paligemma_npz", "can only be read"),
        ("nowhere:LAYOUT", "cannot be imported"),
    ],
)
def test_what_is_no_layout_is_refused(name: str, message: str, source, tmp_path, capsys):
    with pytest.raises(ValueError, match=message):
        convert(source, tmp_path / "out", to=name)
    with pytest.raises(SystemExit) as stop:
        main([str(source), str(tmp_path / "out"), "--to", name])
    assert stop.value.code == 1 and message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
