"""A model and a mixed batch for tests of π0.5's recipe: rows with and without subtasks, actions and images."""

from __future__ import annotations

import numpy as np

from convert.layouts.registry import LAYOUTS
from convert.tensors import Tensor
from pi0.masks import FAST, SUBTASK
from pi0.observation import Observation
from pi0.parameters import parameters
from pi0.variants import get_variant

CONFIG = get_variant("tiny_pi05", remat="none")  # compiles faster
LENGTHS = [(6, 4, 5), (5, 0, 7), (7, 6, 0), (8, 3, 4)]  # tokens of prompt, subtask and FAST, by row
BATCH = len(LENGTHS)


def mixed_batch(seed: int = 0) -> tuple[Observation, np.ndarray, np.ndarray, np.ndarray]:
    """Observation, actions and noise [B, T, A], time [B]. Row 1 lacks a subtask, row 2 actions, row 3 a camera."""
    rng = np.random.default_rng(seed)
    shape = (BATCH, CONFIG.max_token_len)
    group = np.zeros(shape, np.int32)
    for row, (prompt, subtask, fast) in enumerate(LENGTHS):
        group[row, prompt : prompt + subtask] = SUBTASK
        group[row, prompt + subtask : prompt + subtask + fast] = FAST
    data = {
        "state": rng.normal(size=(BATCH, CONFIG.action_dim)),
        "tokenized_prompt": rng.integers(2, CONFIG.vocab_size, shape),
        "tokenized_prompt_mask": np.arange(shape[1]) < np.array([[sum(lengths)] for lengths in LENGTHS]),
        "token_group": group,
        "has_actions": np.array([True, True, False, True]),
    }
    for key in CONFIG.image_keys:
        data[f"image/{key}"] = rng.integers(0, 256, (BATCH, *CONFIG.image_resolution, 3), np.uint8)
    data[f"image_mask/{CONFIG.image_keys[0]}"] = np.array([True, True, True, False])
    actions, noise = rng.normal(size=(2, BATCH, CONFIG.action_horizon, CONFIG.action_dim)).astype(np.float32)
    return Observation.from_dict(data, CONFIG), actions, noise, rng.uniform(0.1, 0.9, BATCH).astype(np.float32)


def random_parameters(seed: int = 0) -> dict[str, np.ndarray]:
    """Parameters of no special value, by our names: every gate is open, so every part has an influence."""
    rng = np.random.default_rng(seed)
    return {n: (rng.normal(size=p.shape) * 0.2).astype(np.float32) for n, p in parameters(CONFIG).items()}


def torch_parameters() -> dict[str, np.ndarray]:
    """The same, by the names of the PyTorch model."""
    ours = {name: Tensor.of(value) for name, value in random_parameters().items()}
    return {name: tensor.read(()) for name, tensor in LAYOUTS["pi0_torch"].from_ours(CONFIG, ours).items()}
