"""Every experiment in configs/ can be read, and describes a run whose parts fit together."""

from __future__ import annotations

import ast
import dataclasses
from pathlib import Path

import numpy as np
import pytest

from pi0.datasets.lerobot import LeRobotDataset
from pi0.experiments import read_config
from pi0.observation import Observation
from pi0.presets import PRESETS
from pi0.robots.normalize import MODES
from pi0.robots.registry import make_robot
from pi0.run_config import RunConfig
from pi0.sample import METAWORLD
from pi0.tokenizers.text import BUNDLED
from pi0.variants import get_variant

pytest.importorskip("ml_collections")
import pi0_jax
from configs import debug, openpi
from pi0.training.data import load_data
from pi0_jax.training.optimizer import make_optimizer, make_schedule
from pi0_jax.training.train import train
from tests.pi0_eval.parity.test_compare import random_checkpoint, write
from tests.recording import write_recording

FOLDER = Path(__file__).parents[2] / "configs"
FILES = sorted(f.name for f in FOLDER.glob("*.py") if not f.name.startswith("_"))


@pytest.mark.parametrize("name", FILES)
def test_an_experiment(name: str):
    documentation = ast.get_docstring(ast.parse((FOLDER / name).read_text()))
    assert documentation is not None and f"pi0-train --config {name[:-3]}" in documentation
    config = read_config(str(FOLDER / name), ["--config.data.root=somewhere", "--config.steps=12345"])
    assert config.data.root == "somewhere" and config.steps == 12345
    model, robot = config.model, make_robot(config.data.robot)
    assert set(robot.cameras.values()) <= set(model.image_keys)
    assert max(robot.state_dim, robot.action_dim) <= model.action_dim
    assert config.data.normalization in MODES and config.data.asset_id
    make_optimizer(config.optimizer, make_schedule(config.optimizer, config.steps))
    assert bool(config.data.action_tokenizer) == (model.kind == "pi0_fast" or config.recipe is not None)


def tiny(name: str, root: Path) -> RunConfig:
    """An experiment with a tiny model of its kind from a base, two steps on a small recording of its robot."""
    config = read_config(name[:-3], ["--config.steps=2", "--config.optimizer.warmup_steps=1"])
    model = config.model
    variant = {"pi0": "tiny", "pi05": "tiny_pi05", "pi0_fast": "tiny_pi0_fast"}[model.kind]
    lora = "_lora" if model.paligemma.lora_rank else ""
    sizes = {"image_keys": model.image_keys, "action_dim": 16, "action_horizon": 10}
    writes = model.kind == "pi0_fast" or config.recipe is not None  # FAST tokens
    vocab = {"max_token_len": 128, "vocab_size": 512 + 128 + 512} if writes else {}
    base = random_checkpoint(get_variant(variant, **sizes, **vocab))  # LoRA is new
    data = dataclasses.replace(
        config.data,
        root=str(write_recording(root / "recording", make_robot(config.data.robot))),
        tokenizer=BUNDLED,
        validation_episodes=(1,),
        norm_stats_from="",
        action_tokenizer="bundled://fast_tokenizer" if writes else "",
    )
    return dataclasses.replace(
        config,
        base_checkpoint=str(write(base, root / "base", "pi0_jax")),
        model=get_variant(variant + lora, **sizes, **vocab, remat="none"),
        data=data,
        batch_size=2,
    )


@pytest.mark.parametrize("name", FILES)
def test_an_experiment_reads_its_robot(name: str, tmp_path):
    """Data and transforms, to the batch that the model gets: checked by `Observation.from_dict`."""
    config = tiny(name, tmp_path)
    model = config.model
    assets, training, validation = load_data(config)
    data = training.read(0, rows=np.arange(2))
    actions, observation = data.pop("actions"), Observation.from_dict(data, model)
    assert validation is not None and actions.shape == (2, 10, 16)
    assert set(assets.norm_stats) == {"state", "actions"} and assets.normalization == config.data.normalization
    robot = make_robot(assets.robot)
    for key, picture in observation.images.items():
        seen = key in robot.cameras.values()
        assert picture.any() == seen and observation.image_masks[key].all() == (seen or model.kind == "pi0_fast")
    assert (observation.token_loss_mask is not None) == (model.kind == "pi0_fast")


QUICK = ("pi0_fast_droid.py",)  # the others compile much the same


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=() if n in QUICK else pytest.mark.slow) for n in FILES if n != "debug.py"]
)
def test_an_experiment_trains(name: str, tmp_path):
    metrics = train(tiny(name, tmp_path / "data"), tmp_path / "run")
    assert np.isfinite([metrics["loss"], metrics["validation_loss"], metrics["grad_norm"]]).all()
    assert (tmp_path / "run" / "checkpoints" / "2").is_dir()


@pytest.mark.slow  # new parameters take long to compile
@pytest.mark.parametrize("variant", debug.DEMO)
def test_a_run_to_debug(variant: str, tmp_path):
    """As it is, on the bundled recordings; and the checkpoint acts."""
    metrics = train(read_config(f"{FOLDER / 'debug.py'}:{variant}", []), tmp_path)
    assert np.isfinite(metrics["validation_loss"])
    policy = pi0_jax.Policy.from_pretrained(tmp_path, fallback=True)
    assert policy.infer(LeRobotDataset(METAWORLD)[0])["actions"].shape == (5, 4)


def test_only_tiny_models_to_debug():
    with pytest.raises(ValueError, match="tiny_pi05"):
        debug.get_config("pi0")


def test_what_a_run_lacks_is_said_before_anything_is_written(tmp_path):
    with pytest.raises(ValueError, match=r"--config\.data\.root="):
        train(read_config(str(FOLDER / "pi0_libero_lora.py"), []), tmp_path / "run")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("value", "expected"), [("0.05", 0.05), ("[3, 7]", [3, 7]), ("(3,)", (3,)), ("[]", [])])
def test_validation_episodes_are_a_list_or_a_fraction(value: str, expected: object):
    for name in ("pi0_libero_lora.py", "pi0_metaworld.py", "metaworld_demo.py"):
        config = read_config(str(FOLDER / name), [f"--config.data.validation_episodes={value}"])
        plain = list(expected) if isinstance(expected, tuple) else expected
        assert config.data.validation_episodes == (tuple(plain) if isinstance(plain, list) else plain)
        assert config.to_dict()["data"]["validation_episodes"] == plain


@pytest.mark.parametrize("name", openpi.RECIPES)
def test_a_recipe_of_openpi(name: str):
    """It trains what its preset opens."""
    config, preset = read_config(f"openpi:{name}", []), PRESETS[name]
    assert not preset.misfits(config.model) and config.data.asset_id == preset.asset_id
    assert config.data.robot == preset.robot and config.data.state_in_prompt == preset.state_in_prompt
    assert {name for name, expert in config.model.experts.items() if expert.lora_rank} == set(preset.lora)
    assert bool(config.freeze) == bool(preset.lora) == (config.ema_decay is None)
    assert config.optimizer.decay_steps in (30_000, 1_000_000)
    with pytest.raises(ValueError, match="openpi's are pi0_libero, "):
        openpi.get_config("pi05_droid")
