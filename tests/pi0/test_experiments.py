"""Experiments are found by name, by file and by module, and any field of their config can be overridden."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

import pytest

pytest.importorskip("ml_collections")

from pi0.config import ConfigError
from pi0.experiments import experiments, find_experiment, read_config
from pi0.run_config import RecipeConfig

FILE = """
from configs import debug

def get_config(variant="tiny"):
    config = debug.get_config(variant)
    config.steps = 77
    return config
"""


@pytest.fixture
def lab(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of a user's own package `my_lab` and of a file `mine.py`."""
    (tmp_path / "mine.py").write_text(FILE)
    (tmp_path / "my_lab.py").write_text(FILE.replace("get_config(variant=", "get_towels(variant="))
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path
    sys.modules.pop("my_lab", None)


def test_every_form_of_a_name(lab: Path):
    for name, kind, steps in (
        ("debug", "pi0", 10),
        ("debug:tiny_pi05", "pi05", 10),
        ("configs/debug.py", "pi0", 10),
        (f"{lab}/mine.py", "pi0", 77),
        (f"{lab}/mine.py:tiny_pi0_fast", "pi0_fast", 77),
        ("my_lab:get_towels", "pi0", 77),
        ("my_lab:get_towels:tiny_pi05", "pi05", 77),
    ):
        config = read_config(name)
        assert (config.model.kind, config.steps) == (kind, steps), name


def test_names_that_do_not_exist(lab: Path):
    assert {"debug", "pi0_metaworld", "pi05_pretrain"} <= set(experiments()) and "_shared" not in experiments()
    for name, said in (
        ("pi1", r"unknown experiment 'pi1'; experiments are debug, .*pi0_metaworld, .*FILE\.py"),
        ("_shared", "unknown experiment"),
        ("my_lab:get_socks", "get_socks.*experiments are debug"),
        ("no_lab:get_towels", "no_lab.*experiments are debug"),
        ("pi0_metaworld:pi0_small", "pi0_metaworld takes no argument; it got 'pi0_small'"),
        ("pi05_pretrain:large", "unknown size 'large'; known sizes are full, demo, tiny"),
        ("metaworld_demo:pi1", "unknown model variant 'pi1'; known variants are pi0, "),
        (f"{lab}/my_lab.py", "no function get_config"),
    ):
        with pytest.raises(ConfigError, match=said):
            find_experiment(name)()
    with pytest.raises(FileNotFoundError, match=r"other\.py"):
        read_config("other.py")


def test_any_field_can_be_overridden():
    config = read_config(
        "debug:tiny_pi05",
        [
            "--config.model.image_resolution=(56,56)",
            '--config.model.image_keys=["base_0_rgb"]',
            "--config.model.paligemma.lora_rank=4",
            "--config.ema_decay=None",
            "--config.optimizer.peak_lr=1",
            "--config.recipe.fast_weight=0.0",
            "--config.data.asset_id=123",
            "--config.data.augment",
            "--config.keep_best=false",
            "--config.batch_size",
            "8",
            '--config.data.robot={"name": "metaworld", "cameras": {"corner": "base_0_rgb"}}',
            "--config.data.robot.cameras.wrist=left_wrist_0_rgb",
            '--config.sharding={"n": ""}',
            "--config.mesh.fsdp=2",
            "--config.data.mixture=[{'weight': 2}, {'weight': 1.5}]",
        ],
    )
    assert config.model.image_resolution == (56, 56) and config.model.image_keys == ("base_0_rgb",)
    assert config.model.paligemma.lora_rank == 4 and config.ema_decay is None
    assert config.optimizer.peak_lr == 1.0 and isinstance(config.optimizer.peak_lr, float)
    assert config.recipe == RecipeConfig(fast_weight=0.0)  # there was none
    assert config.data.asset_id == "123" and config.data.augment and not config.keep_best
    assert config.batch_size == 8 and config.mesh.fsdp == 2 and config.sharding == {"n": ""}
    cameras = {"corner": "base_0_rgb", "wrist": "left_wrist_0_rgb"}
    assert config.data.robot == {"name": "metaworld", "cameras": cameras}
    assert [source.weight for source in config.data.sources] == [2.0, 1.5]


@pytest.mark.parametrize("value", ["0.05", "[3, 7]", "(3,)", "[]"])
def test_overrides_are_what_the_config_says(value: str):
    config = read_config("debug", [f"--config.data.validation_episodes={value}"])
    assert dataclasses.asdict(read_config("debug")) != dataclasses.asdict(config)


@pytest.mark.parametrize(
    ("override", "said"),
    [
        (
            "--config.nosuch=1",
            r"the config has unknown fields \['nosuch'\]; known fields are \['accumulate', .*'wandb'\]",
        ),
        ("--config.data.rot=x", r"data has unknown fields \['rot'\]; known fields are \['action_tokenizer', .*'root'"),
        ("--config.steps=1e3", r"steps is 1000\.0; it must be a whole number"),
        ("--config.steps=None", "steps is None; it must be a whole number"),
        ("--config.steps.more=1", "steps is 10; it has no field 'more'"),
        ("--config.keep_best=1", "keep_best is 1; it must be true or false"),
        ("--config.seed=True", "seed is True; it must be a whole number"),
        ("--config.data.validation_episodes=all", "data.validation_episodes is 'all'; it must be a list or a number"),
        ("--config.data.validation_episodes=[1.5]", r"data.validation_episodes\[0\] is 1.5; it must be a whole number"),
        ("--config.optimizer.b1=", "optimizer.b1 is ''; it must be a number"),
        ("--config.data.mixture=[{'rooot': 'x'}]", r"data.mixture\[0\] has unknown fields \['rooot'\]; known fields"),
        ("--confg.steps=1", "unknown argument --confg.steps=1"),
        ("steps=1", "unknown argument steps=1"),
    ],
)
def test_overrides_that_cannot_be(override: str, said: str):
    with pytest.raises(ConfigError, match=said):
        read_config("debug", [override])
