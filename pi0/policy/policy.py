"""A policy: what a robot sees in, its actions out. `pi0_torch.Policy` and `pi0_jax.Policy` add the model's call."""

from __future__ import annotations

import abc
import dataclasses
import time
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pi0.assets import Assets, AssetsError
from pi0.fetch import fetch
from pi0.observation import Observation, ObservationError, check_actions
from pi0.policy.subtasks import SubtaskSampler
from pi0.robots.normalize import NormStats, load_norm_stats
from pi0.robots.pipeline import Pipeline
from pi0.robots.registry import ROBOTS
from pi0.tokenizers.fast import FAST, FASTError, FASTTokenizer
from pi0.tokenizers.text import PALIGEMMA, TextTokenizer


class Policy(abc.ABC):
    """A model, and the robot, transforms, norm stats and tokenizers that its checkpoint names.

    `num_steps` (default: the config's) are the Euler steps of π0 and π0.5, or the most tokens that π0-FAST writes.
    Noise is drawn from `seed` by NumPy, so that both frameworks draw the same. With `fallback`, text of π0-FAST that
    is no actions gives the middle of what training saw instead of an error. A π0.5 that writes subtasks writes a new
    one every `plan_every` calls (and after `reset`, and for another batch size), and keeps it in between. Raises
    AssetsError for assets that do not say all that a robot's data needs (`complete` adds it), or do not fit each other.
    """

    def __init__(
        self,
        model: Any,
        assets: Assets,
        *,
        num_steps: int | None = None,
        seed: int = 0,
        fallback: bool = False,
        plan_every: int = 1,
    ):
        if num_steps is not None and num_steps < 1:
            raise ValueError(f"num_steps is {num_steps}; it must be at least 1")
        self.model, self.assets, self.config = model, assets, assets.model
        self.num_steps, self.fallback = num_steps, fallback
        self.pipeline = Pipeline.from_assets(assets)
        self._rng = np.random.default_rng(seed)
        self._planner = SubtaskSampler(self.sample_planned, plan_every)

    def reset(self) -> None:
        """Begin a new episode: the next call writes a new subtask."""
        self._planner.reset()

    @abc.abstractmethod
    def sample(self, observation: Observation, noise: np.ndarray | None) -> np.ndarray:
        """The model's normalized actions [B, T, A] from `noise` [B, T, A], or π0-FAST's tokens [B, D]; NumPy's all."""

    def sample_planned(
        self, observation: Observation, noise: np.ndarray, subtask: np.ndarray | None
    ) -> tuple[np.ndarray, np.ndarray]:
        """π0.5's subtask [B, D], written unless it is given, and the actions after it [B, T, A]; NumPy's both."""
        raise TypeError(f"{type(self).__name__} writes no subtasks")

    def infer(self, observation: Mapping[str, Any], noise: np.ndarray | None = None) -> dict[str, Any]:
        """One frame of the robot's to its next actions: `infer_batch` of one, without the axis B."""
        result = self.infer_batch([observation], None if noise is None else np.asarray(noise)[None])
        return {key: value if key == "timing" else value[0] for key, value in result.items()}

    def infer_batch(self, observations: Sequence[Mapping[str, Any]], noise: np.ndarray | None = None) -> dict[str, Any]:
        """Frames of the robot's to {"actions": float32 [B, T, robot dims], "timing": {part: seconds}}.

        A frame is what the robot's adapter reads (see `Robot.to_model`): pictures of any size, state and `prompt` (or
        `task`) as recorded or live, in the robot's own keys and units, which the actions have too. Recorded actions in
        it are not looked at. `noise` [B, T, A] is drawn where not given. π0-FAST's result has `decoded` bool [B] too,
        False where `fallback` stood in; that of a π0.5 which writes subtasks has `subtask`, their texts.

        Raises ObservationError, before the model runs, for what is missing or does not fit, by name; FASTError for
        text that is no actions.
        """
        start = time.perf_counter()
        observation = self.inputs(observations)
        noise = self._noise(len(observations), noise)
        ready = time.perf_counter()
        if self.assets.subtasks:
            if self._planner.subtask is not None and len(self._planner.subtask) != len(observations):
                self.reset()
            tokens, outputs = self._planner(observation, noise)
        else:
            outputs = self.sample(observation, noise)
        sampled = time.perf_counter()
        pairs = [self._actions(output, state) for output, state in zip(outputs, observation.state, strict=True)]
        result: dict[str, Any] = {"actions": np.stack([actions for actions, _ in pairs])}
        if self.config.kind == "pi0_fast":
            result["decoded"] = np.array([decoded for _, decoded in pairs])
        if self.assets.subtasks:
            result["subtask"] = [self.pipeline.text(row) for row in tokens]
        parts = {"inputs": ready - start, "model": sampled - ready, "actions": time.perf_counter() - sampled}
        return result | {"timing": parts}

    def inputs(self, observations: Sequence[Mapping[str, Any]]) -> Observation:
        """Frames of the robot's as the model's inputs, checked. Raises ObservationError."""
        if isinstance(observations, Mapping) or not len(observations):
            raise ObservationError(f"a batch is a list of one frame or more; got {type(observations).__name__}")
        rows = [self._row(observation, i, len(observations)) for i, observation in enumerate(observations)]
        data = {key: np.stack([row[key] for row in rows]) for key in rows[0]}
        return Observation.from_dict(data, self.config).prompt_only()

    def _row(self, observation: Mapping[str, Any], i: int, count: int) -> dict[str, Any]:
        where = f"observation {i}: " if count > 1 else ""
        if not isinstance(observation, Mapping):
            raise ObservationError(f"{where}a frame is a table of pictures, state and prompt; got {observation!r:.80}")
        try:
            return self.pipeline(observation, actions=False)
        except ValueError as error:
            raise ObservationError(f"{where}{error}") from error

    def _noise(self, batch: int, noise: np.ndarray | None) -> np.ndarray | None:
        if self.config.kind == "pi0_fast":
            if noise is not None:
                raise ObservationError("noise: pi0_fast writes the likeliest tokens and takes none")
            return None
        if noise is None:
            shape = (batch, self.config.action_horizon, self.config.action_dim)
            return self._rng.normal(size=shape).astype(np.float32)
        return check_actions(noise, self.config, batch, name="noise")

    def _actions(self, output: np.ndarray, state: np.ndarray) -> tuple[np.ndarray, bool]:
        """The model's output for one frame in the robot's units, and whether it was actions."""
        try:
            return self.pipeline.actions(output, state), True
        except FASTError:
            if not self.fallback:
                raise
            middle = np.zeros((self.config.action_horizon, self.pipeline.robot.action_dim))
            return self.pipeline.actions(middle, state), False


def complete(
    assets: Assets,
    known: Collection[str] = (),
    *,
    robot: str | Mapping[str, Any] | None = None,
    default_prompt: str | None = None,
    norm_stats: str | Path | dict[str, NormStats] | None = None,
    normalization: str | None = None,
    tokenizer: str | Path | None = None,
    action_tokenizer: str | Path | None = None,
    state_in_prompt: bool | None = None,
) -> Assets:
    """A checkpoint's assets with what it does not say, as those of openpi and LeRobot do not, or says otherwise.

    `robot` as `make_robot` takes it, with `default_prompt` for frames without one; `norm_stats`, or the address of
    their file; `normalization`, one of `MODES` (default: the one of released models of this kind); where
    the tokenizers are (default: PaliGemma's, and for π0-FAST physical-intelligence/fast); and whether π0.5's prompt
    tells the state (default: yes; in openpi's `pi05_libero` it does not). `known` are the asset ids of all norm stats
    beside the checkpoint, to say in an error. Raises AssetsError where robot or norm stats are still missing.
    """
    changes: dict[str, Any] = {}
    reference = robot or assets.robot
    if reference is None:
        names = ", ".join(ROBOTS)
        raise AssetsError(f"the checkpoint does not say its robot; pass robot=, one of {names} (or with options)")
    if default_prompt is not None:
        named = {"name": reference} if isinstance(reference, str) else dict(reference)
        reference = named | {"default_prompt": default_prompt}
    changes["robot"] = reference
    if norm_stats is not None:
        changes["norm_stats"] = norm_stats if isinstance(norm_stats, dict) else load_norm_stats(fetch(norm_stats))
    elif assets.norm_stats is None:
        choice = f"asset_id=, one of {', '.join(known)}" if known else "norm_stats=, the file"
        raise AssetsError(f"the checkpoint does not say which norm stats to use; pass {choice}")
    if normalization is not None or assets.normalization is None:
        changes["normalization"] = normalization or assets.model.family.normalization
    if tokenizer is not None or assets.tokenizer is None:
        changes["tokenizer"] = TextTokenizer(tokenizer or PALIGEMMA).reference()
    fast = assets.model.kind == "pi0_fast"
    if action_tokenizer is not None or (fast and assets.action_tokenizer is None):
        changes["action_tokenizer"] = FASTTokenizer(action_tokenizer or FAST).reference()
    if state_in_prompt is not None:
        changes["state_in_prompt"] = state_in_prompt
    return dataclasses.replace(assets, **changes)
