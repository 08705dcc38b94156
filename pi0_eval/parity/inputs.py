"""The inputs that both models of a comparison get. Axes: B batch, T action horizon, A action dim."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np

from pi0.config import ModelConfig
from pi0.masks import FAST, PREFIX, SUBTASK
from pi0.observation import Observation, check_actions
from pi0.reading import naming, read_npz


class ParityError(ValueError):
    """Two checkpoints cannot be compared; the message says why."""


@dataclasses.dataclass(frozen=True)
class Inputs:
    """One batch: observation, actions and noise [B, T, A], flow time [B]. π0-FAST uses the observation alone."""

    observation: Observation
    actions: np.ndarray
    noise: np.ndarray
    time: np.ndarray

    @classmethod
    def random(cls, config: ModelConfig, batch: int = 2, seed: int = 0, subtasks: bool = False) -> Inputs:
        """Random inputs: prompts of different lengths, and masked cameras from the second row on.

        π0-FAST has no masked cameras and trains on a random part at the end of each text. With `subtasks` π0.5's text
        ends with a subtask and FAST tokens, and not every row has actions.
        """
        rng = np.random.default_rng(seed)
        lengths = rng.integers(1, config.max_token_len + 1, batch)
        data: dict[str, np.ndarray] = {
            "state": rng.normal(size=(batch, config.state_size)),
            "tokenized_prompt": rng.integers(0, config.vocab_size, (batch, config.max_token_len)),
            "tokenized_prompt_mask": np.arange(config.max_token_len) < lengths[:, None],
        }
        for i, key in enumerate(config.image_keys):
            data[f"image/{key}"] = rng.integers(0, 256, (batch, *config.image_resolution, 3), np.uint8)
            data[f"image_mask/{key}"] = (np.arange(batch) == 0) | (rng.random(batch) < 0.5) | (i == 0)
        if not config.family.masked_cameras:
            data |= {f"image_mask/{key}": np.ones(batch, bool) for key in config.image_keys}
        if config.family.action_tokens:
            wanted = np.arange(config.max_token_len) >= rng.integers(0, lengths)[:, None]
            data["token_loss_mask"] = wanted & data["tokenized_prompt_mask"]
            data["token_ar_mask"] = data["token_loss_mask"].astype(int)
        if subtasks:
            ends = np.sort(rng.integers(1, lengths + 1, (2, batch)), axis=0)[..., None]
            places = np.arange(config.max_token_len)
            groups = np.where(places < ends[0], PREFIX, np.where(places < ends[1], SUBTASK, FAST))
            data |= {"token_group": groups, "has_actions": (np.arange(batch) == 0) | (rng.random(batch) < 0.5)}
        shape = (batch, config.action_horizon, config.action_dim)
        actions, noise = rng.normal(size=shape), rng.normal(size=shape)
        return cls(
            Observation.from_dict(data, config),
            actions.astype(np.float32),
            noise.astype(np.float32),
            rng.uniform(0.1, 0.9, batch).astype(np.float32),
        )

    @classmethod
    def of(
        cls, given: Inputs | Path | None, config: ModelConfig, batch: int, seed: int, subtasks: bool = False
    ) -> Inputs:
        """The given inputs, those of a file, or else random ones. Raises ParityError."""
        if given is None:
            return cls.random(config, batch, seed, subtasks)
        return given if isinstance(given, Inputs) else cls.load(given, config)

    @classmethod
    def load(cls, file: Path, config: ModelConfig) -> Inputs:
        """Load an npz file with the keys of `Observation.to_dict`, `actions`, `noise`, `time`. Raises ParityError."""
        data = read_npz(file, error=ParityError)
        with naming(file):
            return cls._validated(data, file, config)

    @classmethod
    def _validated(cls, data: dict[str, np.ndarray], file: Path, config: ModelConfig) -> Inputs:
        missing = sorted({"actions", "noise", "time"} - data.keys())
        if missing:
            raise ParityError(f"{file} lacks {missing}; it needs an observation's keys, actions, noise and time")
        actions, noise, time = (data.pop(key) for key in ("actions", "noise", "time"))
        observation = Observation.from_dict(data, config)
        batch = len(observation.state)
        if time.shape != (batch,):
            raise ParityError(f"{file}: time has shape {list(time.shape)}, expected [{batch}]")
        return cls(
            observation,
            check_actions(actions, config, batch),
            check_actions(noise, config, batch),
            time.astype(np.float32),
        )
