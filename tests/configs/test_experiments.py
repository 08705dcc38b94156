"""Every experiment in configs/ can be read, and describes a run whose parts fit together."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from pi0.config import ModelConfig
from pi0.normalize import MODES
from pi0.robots import make_robot

pytest.importorskip("ml_collections")
from pi0_jax.optimizer import make_optimizer, make_schedule
from pi0_jax.train import read_config, train

FOLDER = Path(__file__).parents[2] / "configs"
FILES = sorted(f.name for f in FOLDER.glob("*.py") if f.name not in ("__init__.py", "finetune.py"))


@pytest.mark.parametrize("name", FILES)
def test_an_experiment(name: str):
    documentation = ast.get_docstring(ast.parse((FOLDER / name).read_text()))
    assert documentation is not None and f"pi0-train --config configs/{name}" in documentation
    config = read_config(str(FOLDER / name), ["--config.data.root=somewhere", "--config.steps=12345"])
    assert config.data.root == "somewhere" and config.steps == 12345
    model = ModelConfig.from_dict(config.model.to_dict())
    robot = make_robot(config.data.robot if isinstance(config.data.robot, str) else config.data.robot.to_dict())
    assert set(robot.cameras.values()) <= set(model.image_keys)
    assert max(robot.state_dim, robot.action_dim) <= model.action_dim
    assert config.data.normalization in MODES and config.data.asset_id
    make_optimizer(config.optimizer, make_schedule(config.optimizer, config.steps))


def test_what_a_run_lacks_is_said_before_anything_is_written(tmp_path):
    with pytest.raises(ValueError, match=r"--config\.data\.root="):
        train(read_config(str(FOLDER / "pi0_libero_lora.py"), []), tmp_path / "run")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("value", "expected"), [("0.05", 0.05), ("[3, 7]", [3, 7]), ("(3,)", (3,)), ("[]", [])])
def test_validation_episodes_are_a_list_or_a_fraction(value: str, expected: object):
    for name in ("pi0_libero_lora.py", "pi0_metaworld.py", "metaworld_demo.py"):
        config = read_config(str(FOLDER / name), [f"--config.data.validation_episodes={value}"])
        assert config.data.validation_episodes == expected
        assert config.data.to_dict()["validation_episodes"] == expected
