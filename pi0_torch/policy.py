"""A policy that runs in PyTorch. Needs no JAX."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

import pi0.policy.policy
from convert.checkpoints import open_checkpoint
from pi0.config import ModelConfig
from pi0.observation import Observation
from pi0.policy.policy import complete
from pi0_torch.loading import load_model, to_device, to_numpy
from pi0_torch.models.pi0_fast import Pi0Fast
from pi0_torch.sampler import Sampler, TokenSampler


class Policy(pi0.policy.policy.Policy):
    """`from_pretrained`, then `infer`: what the robot sees in, its actions out (see `pi0.policy.Policy`)."""

    sampler: Sampler | TokenSampler | None = None

    @classmethod
    def from_pretrained(
        cls,
        source: str | Path,
        *,
        asset_id: str | None = None,
        config: ModelConfig | None = None,
        dtype: str | None = None,
        param_dtype: str | None = None,
        device: str | torch.device = "cpu",
        num_steps: int | None = None,
        seed: int = 0,
        fallback: bool = False,
        plan_every: int = 1,
        fast: bool = False,
        **said: Any,
    ) -> Policy:
        """The policy of a checkpoint of any layout that we read: a folder, `gs://` or `hf://`.

        `asset_id` chooses among several norm stats; `config`, `dtype`, `param_dtype` and `device` are those of `load`;
        `num_steps`, `seed`, `fallback` and `plan_every` those of `pi0.policy.Policy`; and `said` is what the checkpoint
        itself does not say: `robot`, `default_prompt`, `norm_stats`, ... (see `pi0.policy.complete`). With `fast`, π0
        and π0.5 sample by `pi0_torch.Sampler`, made and warmed up now, and π0-FAST by `TokenSampler`. Raises what they
        do.
        """
        checkpoint = open_checkpoint(source, config, asset_id=asset_id)
        assets = complete(checkpoint.assets, checkpoint.norm_stats, **said)
        model = load_model(checkpoint, dtype=dtype, param_dtype=param_dtype, device=device)
        policy = cls(model, assets, num_steps=num_steps, seed=seed, fallback=fallback, plan_every=plan_every)
        if fast:
            if isinstance(model, Pi0Fast):
                policy.sampler = TokenSampler(model, max_decoding_steps=num_steps)
            else:
                policy.sampler = Sampler(model, num_steps=num_steps)
        return policy

    def sample(self, observation: Observation, noise: np.ndarray | None) -> np.ndarray:
        """The model's normalized actions [B, T, A] from `noise` [B, T, A], or π0-FAST's tokens [B, D]; NumPy's all."""
        if isinstance(self.sampler, TokenSampler):
            return to_numpy(self.sampler.sample(observation))
        if self.sampler is not None and noise is not None:
            return to_numpy(self.sampler.sample(observation, noise))
        device = next(self.model.parameters()).device
        inputs = to_device(observation, device)
        if isinstance(self.model, Pi0Fast):
            return to_numpy(self.model.sample_tokens(inputs, self.num_steps))
        return to_numpy(self.model.sample_actions(inputs, torch.as_tensor(noise, device=device), self.num_steps))

    def sample_planned(
        self, observation: Observation, noise: np.ndarray, subtask: np.ndarray | None
    ) -> tuple[np.ndarray, np.ndarray]:
        """π0.5's subtask [B, D], written unless it is given, and the actions after it [B, T, A]; NumPy's both."""
        device = next(self.model.parameters()).device
        given = None if subtask is None else torch.as_tensor(subtask, device=device)
        inputs, noise_there = to_device(observation, device), torch.as_tensor(noise, device=device)
        tokens, actions = self.model.sample(inputs, noise_there, given, self.num_steps)
        return to_numpy(tokens), to_numpy(actions)
