from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from convert.checkpoints import Checkpoint, write_checkpoint
from convert.formats.safetensors import read_safetensors, write_safetensors
from convert.inspection import inspect, main
from convert.layouts.registry import LAYOUTS
from convert.tensors import Tensor
from pi0.assets import Assets
from pi0.parameters import parameters
from pi0.robots.normalize import NormStats
from pi0.storage import new_folder
from pi0.variants import get_variant
from tests.convert.test_checkpoints import OF_PI0
from tests.golden_case import CASES, FAST, LORA, GoldenCase


@pytest.mark.parametrize("name", [*CASES, FAST, LORA])
def test_openpi_checkpoints(name: str):
    """No config beside them: everything follows from names and shapes."""
    case = GoldenCase(name)
    found, config = inspect(case.checkpoint), case.config("bfloat16")
    assert (found.layout, found.kind, found.problems) == ("openpi_jax", config.kind, [])
    assert found.style == ("Orbax, training style" if name == "pi05" else "Orbax")
    # LoRA's alpha is no shape; None means the rank, which it is in all of openpi's variants.
    assert found.config.paligemma == dataclasses.replace(config.paligemma, lora_alpha=None)
    assert found.config.vision == config.vision
    assert (found.config.action_expert is None) == (name == FAST)
    assert found.lora_experts == (("paligemma", "action_expert") if name == LORA else ())
    assert found.parameters == sum(int(np.prod(p.shape)) for p in parameters(config).values())
    assert set(found.dtypes["vision"]) == {"float32"} and (found.step, found.norm_stats) == (None, [])


@pytest.fixture(params=OF_PI0)
def stored(request, tmp_path) -> tuple[str, Path]:
    config, rng = get_variant("tiny"), np.random.default_rng(0)
    stats = NormStats.from_data(rng.normal(size=(10, 4)))
    assets = Assets(config, {"state": stats, "actions": stats}, "my_lab", "zscore", step=17)
    ours = {n: Tensor.of(rng.normal(size=p.shape).astype(np.float32)) for n, p in parameters(config).items()}
    with new_folder(tmp_path / "named_pi05_lora") as folder:  # a name that lies
        write_checkpoint(Checkpoint(folder, LAYOUTS["pi0_jax"], assets, ours), folder, request.param)
    return request.param, tmp_path / "named_pi05_lora"


def test_every_layout_with_what_lies_beside(stored):
    layout, folder = stored
    found = inspect(folder)
    assert (found.layout, found.kind, found.config) == (layout, "pi0", get_variant("tiny"))
    assert (found.step, found.norm_stats, found.problems, found.lora_experts) == (17, ["my_lab"], [], ())


def test_the_command(stored, capsys):
    layout, folder = stored
    for arguments in ([str(folder)], [str(folder), "--json"]):
        with pytest.raises(SystemExit) as stop:
            main(arguments)
        assert stop.value.code == 0
        printed = capsys.readouterr().out
        assert layout in printed and "my_lab" in printed
    assert json.loads(printed)["config"]["action_dim"] == 7


def test_what_does_not_fit_is_said(tmp_path, capsys):
    config = get_variant("tiny")
    ours = {n: Tensor.of(np.zeros(p.shape, np.float32)) for n, p in parameters(config).items()}
    with new_folder(tmp_path / "x") as folder:
        write_checkpoint(Checkpoint(folder, LAYOUTS["pi0_jax"], Assets(config), ours), folder, "pi0_torch")
    file = tmp_path / "x" / "model.safetensors"
    tensors = {n: Tensor.of(np.array(t.read(()))) for n, t in read_safetensors(file).items()}
    tensors["head.weight"] = tensors.pop("state_proj.weight")
    write_safetensors(file, tensors)
    with pytest.raises(SystemExit) as stop:
        main([str(tmp_path / "x")])
    printed = capsys.readouterr().out
    assert stop.value.code == 1 and "missing state_proj.weight" in printed and "unknown head.weight" in printed
    # Flat heads cannot be told apart without a config: what is missing is said, not guessed.
    shutil.move(tmp_path / "x" / "config.json", tmp_path / "gone.json")
    found = inspect(tmp_path / "x")
    assert found.config is None and dataclasses.asdict(found)["problems"]
    with pytest.raises(SystemExit) as stop:
        main([str(tmp_path)])
    assert stop.value.code == 1 and "neither" in capsys.readouterr().err
