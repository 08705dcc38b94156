"""A small model and its observations, on which fast sampling is compared with the plain model in either framework."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator

import numpy as np

from pi0.config import ModelConfig
from pi0.variants import get_variant
from pi0_eval.parity.inputs import Inputs

TINY = get_variant("tiny")
CAMERAS = ("base_0_rgb", "left_wrist_0_rgb", "right_wrist_0_rgb")
BUCKETS = (3, 5)  # of 8 tokens
EDGES = (1, 3, 4, 5, 6, 8)  # prompt lengths on either side of each bucket's edge
SUBSETS = [s for n in range(len(CAMERAS) + 1) for s in itertools.combinations(CAMERAS, n)]


def config(kind: str, dtype: str = "float32", depth: int = 2, num_steps: int = 3) -> ModelConfig:
    """Three cameras, and no two axes of one size."""
    expert, vision = dataclasses.replace(TINY.paligemma, depth=depth), dataclasses.replace(TINY.vision, depth=depth)
    action_expert = dataclasses.replace(TINY.action_expert, depth=depth)
    return dataclasses.replace(
        TINY,
        kind=kind,
        vision=vision,
        paligemma=expert,
        action_expert=action_expert,
        image_keys=CAMERAS,
    ).with_runtime(dtype=dtype, num_steps=num_steps, remat="none")


def observations(model: ModelConfig) -> Iterator[tuple[str, Inputs]]:
    """A batch of mixed masks; for π0, whose prefix is π0.5's, every subset of cameras and prompts across every edge."""
    yield "mixed", Inputs.random(model, batch=4, seed=3)
    if model.kind == "pi0":
        for i, subset in enumerate(SUBSETS):
            yield f"{subset}", seen(model, 1, subset, 6 + i % 3, seed=i)
        for length in EDGES:
            yield f"{length} tokens", seen(model, 1, CAMERAS, length, seed=length)


def seen(model: ModelConfig, batch: int, cameras: tuple[str, ...], length: int, seed: int) -> Inputs:
    """Random inputs in which exactly these cameras are there in some row, and the longest prompt has this length."""
    inputs, rng = Inputs.random(model, batch, seed), np.random.default_rng(seed)
    masks = {key: np.full(batch, key in cameras) for key in model.image_keys}
    for mask in masks.values():
        mask[1:] &= rng.random(batch - 1) < 0.5
    lengths = rng.integers(1, length + 1, batch)
    lengths[0] = length
    text = np.arange(model.max_token_len) < lengths[:, None]
    observation = dataclasses.replace(inputs.observation, image_masks=masks, tokenized_prompt_mask=text)
    return dataclasses.replace(inputs, observation=observation)


def varied(model: ModelConfig, calls: int, batches: int) -> Iterator[Inputs]:
    """Prompts, subsets of one or two cameras and batch sizes up to `batches` at random."""
    rng = np.random.default_rng(0)
    for i in range(calls):
        subset = SUBSETS[rng.integers(1, 7)]
        yield seen(model, int(rng.integers(1, batches + 1)), subset, int(rng.integers(1, 9)), seed=i)


def distance(a: np.ndarray, b: np.ndarray) -> float:
    """Relative L2."""
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))
