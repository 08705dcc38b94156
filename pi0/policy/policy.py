"""A policy: a robot's observations in, its actions out. `pi0_torch.Policy` and `pi0_jax.Policy` call the model."""

from __future__ import annotations

import abc
import dataclasses
import logging
import time
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pi0.assets import Assets, AssetsError
from pi0.fetch import fetch
from pi0.observation import Observation, ObservationError, check_actions, to_numpy
from pi0.policy.rtc import RTC, Previous
from pi0.policy.subtasks import SubtaskSampler
from pi0.presets import describe_assumed, fitting_presets
from pi0.robots.normalize import NormStats, load_norm_stats
from pi0.robots.pipeline import Pipeline
from pi0.robots.registry import ROBOTS, make_robot
from pi0.tokenizers.fast import FAST, FASTError, FASTTokenizer
from pi0.tokenizers.text import PALIGEMMA, TextTokenizer

logger = logging.getLogger(__name__)

PREVIOUS = ("prev_chunk", "delay")  # what an observation says of the chunk that the robot executes


class Policy(abc.ABC):
    """A model, and the robot, transforms, norm stats and tokenizers that its checkpoint names.

    `num_steps` (default: the config's) are the Euler steps of π0 and π0.5, or the most tokens that π0-FAST decodes.
    Noise is drawn from `seed` by NumPy, so that both frameworks draw the same. With `fallback`, tokens of π0-FAST that
    are no actions give zero normalized actions instead of an error. A π0.5 that writes subtasks predicts a new one
    every `subtask_every` calls (and after `reset`, and for another batch size), and keeps it in between. `sampler` does
    what the model's `sample` does, faster. With `rtc` (a method's name, or `RTC`) a chunk goes on from the previous one
    (real-time chunking), where the observation has `prev_chunk`: "trained" is for checkpoints that were trained so;
    a sampler has been made with the same. Raises AssetsError for assets that lack what a robot's data needs
    (`fill_assets` adds it), or do not fit each other.
    """

    def __init__(
        self,
        model: Any,
        assets: Assets,
        *,
        num_steps: int | None = None,
        seed: int = 0,
        fallback: bool = False,
        subtask_every: int = 1,
        sampler: Any = None,
        rtc: RTC | str | None = None,
    ):
        if num_steps is not None and num_steps < 1:
            raise ValueError(f"num_steps is {num_steps}; it must be at least 1")
        self.model, self.assets, self.config = model, assets, assets.model
        self.num_steps, self.fallback, self.sampler = num_steps, fallback, sampler
        self.pipeline = Pipeline.from_assets(assets)
        self.rtc, self._rng = RTC.of(rtc), np.random.default_rng(seed)
        if self.rtc is not None:
            check_rtc(self.rtc, assets)
        if sampler is not None and sampler.rtc != self.rtc:
            raise ValueError(f"the sampler was made with rtc={sampler.rtc}, the policy with {self.rtc}")
        self._subtasks = SubtaskSampler(self.sample_with_subtask, subtask_every)
        self._warned_of_delay = False

    def reset(self) -> None:
        """Begin a new episode: the next call predicts a new subtask."""
        self._subtasks.reset()

    @abc.abstractmethod
    def sample(
        self, observation: Observation, noise: np.ndarray | None, previous: Previous | None = None
    ) -> np.ndarray:
        """Normalized actions [B, T, A] from `noise` [B, T, A], or π0-FAST's tokens [B, D], as NumPy arrays."""

    @abc.abstractmethod
    def sample_with_subtask(
        self,
        observation: Observation,
        noise: np.ndarray,
        subtask: np.ndarray | None,
        previous: Previous | None = None,
    ) -> tuple[np.ndarray, np.ndarray]:
        """π0.5's subtask [B, D], predicted unless it is given, and the actions [B, T, A], as NumPy arrays."""

    def infer(self, observation: Mapping[str, Any], noise: np.ndarray | None = None) -> dict[str, Any]:
        """Predict an action chunk [T, A] for one observation: `infer_batch` of one, without the axis B.

        `noise` is [T, A].
        """
        result = self.infer_batch([observation], None if noise is None else to_numpy(noise)[None])
        return {key: value if key == "timing" else value[0] for key, value in result.items()}

    def infer_batch(self, observations: Sequence[Mapping[str, Any]], noise: np.ndarray | None = None) -> dict[str, Any]:
        """Predict action chunks: {"actions": float32 [B, T, robot dims], "timing": {part: seconds}}.

        An observation is what the robot's adapter reads (see `Robot.to_model`): camera images of any size, state and
        `prompt` (or `task`) as recorded or live, in the robot's own keys and units, which the actions have too.
        Recorded actions in it are ignored. With `rtc` it may have `prev_chunk`, the actions [T', robot dims] of the
        previous chunk from this observation's step on, at most T, and `delay`, how many of them will be executed before
        the new chunk is there (default 0). `noise` [B, T, A] is drawn where not given. π0-FAST's result has `decoded`
        bool [B] too, False where `fallback` was used; that of a π0.5 which writes subtasks has `subtask`, their texts.

        Raises ObservationError, before the model runs, for what is missing or does not fit, by name; FASTError for
        tokens that are no actions.
        """
        start = time.perf_counter()
        observation = self.inputs(observations)
        noise = self.noise(len(observations), noise)
        previous = self.previous(observations)
        ready, tokens = time.perf_counter(), None
        if self.assets.subtasks:
            if self._subtasks.subtask is not None and len(self._subtasks.subtask) != len(observations):
                self.reset()
            tokens, outputs = self._subtasks(observation, noise, previous)
        else:
            outputs = self.sample(observation, noise, *(() if previous is None else (previous,)))
        sampled = time.perf_counter()
        result = self.outputs(outputs, observation.state, tokens)
        parts = {"inputs": ready - start, "model": sampled - ready, "actions": time.perf_counter() - sampled}
        return result | {"timing": parts}

    def outputs(self, outputs: np.ndarray, state: np.ndarray, subtask: np.ndarray | None = None) -> dict[str, Any]:
        """`infer_batch`'s result without timing, of what `sample` or `sample_with_subtask` gave for `inputs`.

        `state` [B, S] is that of the inputs, `subtask` [B, D] the tokens. Raises FASTError as `infer_batch`.
        """
        pairs = [self._actions(output, row) for output, row in zip(outputs, state, strict=True)]
        result: dict[str, Any] = {"actions": np.stack([actions for actions, _ in pairs])}
        if self.config.family.action_tokens:
            result["decoded"] = np.array([decoded for _, decoded in pairs])
        return result if subtask is None else result | {"subtask": [self.pipeline.text(row) for row in subtask]}

    def inputs(self, observations: Sequence[Mapping[str, Any]]) -> Observation:
        """The robot's observations as the model's inputs, validated. Raises ObservationError."""
        if isinstance(observations, Mapping) or not len(observations):
            raise ObservationError(f"a batch is a list of observations, not empty; got {type(observations).__name__}")
        rows = [self._row(observation, i, len(observations)) for i, observation in enumerate(observations)]
        dummies: dict[str, np.ndarray] = {}  # of cameras that are masked in some rows
        for row in rows:
            dummies |= {key: np.zeros_like(value) for key, value in row.items() if key.startswith("image/")}
        rows = [dummies | row for row in rows]
        data = {key: np.stack([row[key] for row in rows]) for key in rows[0]}
        return Observation.from_dict(data, self.config).prompt_only()

    def previous(self, observations: Sequence[Mapping[str, Any]]) -> Previous | None:
        """The previous chunks in observations, as the model's actions and their weights; None of a policy without RTC.

        Raises ObservationError.
        """
        keys = sorted({key for observation in observations for key in PREVIOUS if key in observation})
        if self.rtc is None:
            if keys:
                raise ObservationError(f"{keys[0]}: this policy has no real-time chunking; make it with rtc='guided'")
            return None
        rows = []
        for i, observation in enumerate(observations):
            try:
                rows.append(self._previous(self.rtc, observation))
            except ValueError as error:
                where = f"observation {i}: " if len(observations) > 1 else ""
                raise ObservationError(f"{where}prev_chunk: {error}") from error
        return Previous.join(rows)

    def _previous(self, rtc: RTC, observation: Mapping[str, Any]) -> Previous:
        horizon, dim = self.config.action_horizon, self.config.action_dim
        chunk, delay = observation.get("prev_chunk"), observation.get("delay", 0)
        if chunk is None:
            if "delay" in observation:
                raise ValueError("it is missing, of an observation with a delay")
            return Previous.none(1, horizon, dim)
        chunk = to_numpy(chunk)
        if chunk.ndim != 2 or not 0 < len(chunk) <= horizon:
            raise ValueError(f"it is {list(chunk.shape)}; expected 1 to {horizon} actions, [T, robot dims]")
        if isinstance(delay, bool) or not isinstance(delay, int | np.integer) or not 0 <= delay <= len(chunk):
            raise ValueError(f"delay is {delay!r:.80}; it must be from 0 to the {len(chunk)} actions of prev_chunk")
        trained = (self.assets.training or {}).get("rtc")
        if rtc.method == "trained" and trained and delay > trained["max_delay"] and not self._warned_of_delay:
            self._warned_of_delay = True
            logger.warning("delay is %d; the model was trained for at most %d", delay, trained["max_delay"])
        actions, weights = (np.zeros((1, horizon, dim), np.float32) for _ in range(2))
        actions[0, : len(chunk)] = self.pipeline.chunk(observation, chunk)
        dims = dim if rtc.method == "trained" else self.pipeline.robot.action_dim
        weights[0, :, :dims] = rtc.weights(horizon, int(delay), len(chunk))[:, None]
        return Previous(actions, weights)

    def _row(self, observation: Mapping[str, Any], i: int, count: int) -> dict[str, Any]:
        where = f"observation {i}: " if count > 1 else ""
        if not isinstance(observation, Mapping):
            raise ObservationError(f"{where}expected a dict of images, state and prompt; got {observation!r:.80}")
        try:
            return self.pipeline(observation, actions=False)
        except ValueError as error:
            raise ObservationError(f"{where}{error}") from error

    def noise(self, batch: int, noise: Any = None, seed: int | None = None) -> np.ndarray | None:
        """Noise [B, T, A] for a batch: the given one, checked, or drawn, by `seed` or else by the policy's generator.

        None for a model that takes none. Raises ObservationError.
        """
        if self.config.family.action_tokens:
            if noise is not None or seed is not None:
                raise ObservationError(f"noise: {self.config.family.title} decodes greedily and takes none")
            return None
        if noise is None:
            shape = (batch, self.config.action_horizon, self.config.action_dim)
            rng = self._rng if seed is None else np.random.default_rng(seed)
            return rng.normal(size=shape).astype(np.float32)
        return check_actions(noise, self.config, batch, name="noise")

    def _actions(self, output: np.ndarray, state: np.ndarray) -> tuple[np.ndarray, bool]:
        """The model's output for one observation in the robot's units, and whether it was decoded."""
        try:
            return self.pipeline.actions(output, state), True
        except FASTError:
            if not self.fallback:
                raise
            zeros = np.zeros((self.config.action_horizon, self.pipeline.robot.action_dim))
            return self.pipeline.actions(zeros, state), False


def check_rtc(rtc: RTC, assets: Assets) -> None:
    """Raise AssetsError for a checkpoint whose model cannot be run with real-time chunking of this method."""
    if assets.model.family.action_tokens:
        raise AssetsError(f"rtc: {assets.model.family.title} decodes tokens; real-time chunking is for flow matching")
    if rtc.method == "trained" and not (assets.training or {}).get("rtc"):
        raise AssetsError("rtc is 'trained', but the checkpoint was not trained with config.rtc; use rtc='guided'")


def fill_assets(
    assets: Assets,
    known: Collection[str] = (),
    *,
    robot: str | Mapping[str, Any] | None = None,
    default_prompt: str | None = None,
    norm_stats: str | Path | dict[str, NormStats] | None = None,
    normalization: str | dict[str, Any] | None = None,
    tokenizer: str | Path | None = None,
    action_tokenizer: str | Path | None = None,
    state_in_prompt: bool | None = None,
    action_horizon: int | None = None,
) -> Assets:
    """A checkpoint's assets with overrides, and with what it does not say, as those of openpi and LeRobot do not.

    `robot` as `make_robot` takes it, with `default_prompt` for observations without one; `norm_stats`, or the address
    of their file; `normalization`, a mode or one each of state and actions (default: that of the family's released
    models); the addresses of the tokenizers (default: PaliGemma's, and for π0-FAST physical-intelligence/fast); and
    whether π0.5's prompt has the state in it (default: yes; in openpi's `pi05_libero` it does not). `known` are the
    asset ids of all norm stats of the checkpoint, to name in an error. `action_horizon` is that of the model's
    training, where the checkpoint does not say it: no tensor depends on it, but a model that samples another one than
    it was trained with gives other actions. Raises AssetsError where horizon, robot or norm stats are still missing,
    and for a horizon that the checkpoint says otherwise; what else is assumed (`Assets.assumed`) is logged.
    """
    assets = _with_horizon(assets, known, action_horizon)
    changes: dict[str, Any] = {}
    reference = robot or assets.robot
    if reference is None:
        names = ", ".join(ROBOTS)
        raise AssetsError(f"the checkpoint does not say its robot; pass robot=, one of {names} (or with options)")
    if default_prompt is not None:
        named = {"name": reference} if isinstance(reference, str) else dict(reference)
        reference = named | {"default_prompt": default_prompt}
    if robot is not None:
        make_robot(reference)  # imports the package of the caller's robot; that of a checkpoint's is not imported
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
    needed = assets.model.family.action_tokens and assets.action_tokenizer is None
    if action_tokenizer is not None or needed:
        changes["action_tokenizer"] = FASTTokenizer(action_tokenizer or FAST).reference()
    if state_in_prompt is not None:
        changes["state_in_prompt"] = state_in_prompt
    return dataclasses.replace(assets, **changes)


def _with_horizon(assets: Assets, known: Collection[str], action_horizon: int | None) -> Assets:
    """The assets with a horizon that is said, by their file or by `action_horizon`; see `fill_assets`."""
    model = assets.model
    if "action_horizon" in assets.assumed:
        if action_horizon is None:
            presets = ", ".join(fitting_presets(model, assets.assumed, known)) or "none of those known"
            raise AssetsError(
                "the checkpoint does not say its action horizon, and with another one than in training a model gives "
                f"other actions: pass preset=, the openpi config it was trained with (fitting are {presets}), or "
                f"action_horizon= (that of the released {model.family.title} base model is {model.action_horizon})"
            )
        model = dataclasses.replace(model, action_horizon=action_horizon)
        assumed = tuple(name for name in assets.assumed if name != "action_horizon")
        assets = dataclasses.replace(assets, model=model, assumed=assumed)
    elif action_horizon not in (None, model.action_horizon):
        raise AssetsError(f"action_horizon is {action_horizon}, but the checkpoint says {model.action_horizon}")
    if assets.assumed:
        logger.warning("assumed, as in released models: %s", describe_assumed(model, assets.assumed))
    return assets
