"""Small checkpoints to export: random weights, with no norm or gate at its start."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import torch

from convert.checkpoints import Checkpoint, write_checkpoint
from convert.layouts.registry import LAYOUTS
from pi0.assets import Assets
from pi0.config import ModelConfig
from pi0.variants import get_variant
from pi0_torch.loading import make_model, parameters_of


def small(variant: str, depth: int = 2, **runtime: Any) -> ModelConfig:
    """A tiny variant with fewer layers."""
    config = get_variant(variant, num_steps=2, max_decoding_steps=4, remat="none", **runtime)
    parts = ("vision", "paligemma", "action_expert")
    found = {name: getattr(config, name) for name in parts if getattr(config, name) is not None}
    return dataclasses.replace(config, **{name: dataclasses.replace(part, depth=depth) for name, part in found.items()})


def save(config: ModelConfig, folder: Path, **assets: Any) -> Path:
    """A checkpoint of a random model in `folder`."""
    torch.manual_seed(0)
    model = make_model(config)
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn(parameter.shape)
    ours = LAYOUTS["pi0_torch"].to_ours(config, parameters_of(model.state_dict()))
    folder.mkdir(parents=True)
    checkpoint = Checkpoint(folder, LAYOUTS["pi0_torch"], Assets(config, **assets), ours)
    write_checkpoint(checkpoint, folder, "pi0_torch")
    return folder


VELOCITIES = Path(__file__).parent / "doctor" / "velocities"  # a trained π0 with its robot


def export_velocities(folder: Path, *options: str) -> Path:
    """An export of it to ONNX with one Euler step, in `folder`."""
    from pi0_eval.export.command import main

    main([str(VELOCITIES), str(folder), "--to", "onnx", "--num-steps", "1", "--cases", "1", *options])
    return folder


def frame(seed: int = 0) -> dict[str, Any]:
    """An observation of its robot."""
    rng = np.random.default_rng(seed)
    images = {name: rng.integers(0, 256, (48, 64, 3), np.uint8) for name in ("corner", "wrist")}
    return images | {"state": rng.normal(size=4).astype(np.float32), "prompt": "open the drawer"}
