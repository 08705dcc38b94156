"""A policy that runs in PyTorch. Needs no JAX."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

import pi0.policy
from convert.checkpoints import open_checkpoint
from pi0.config import ModelConfig
from pi0.observation import Observation
from pi0.policy import complete
from pi0_torch.loading import load_model, to_device, to_numpy
from pi0_torch.models.pi0_fast import Pi0Fast


class Policy(pi0.policy.Policy):
    """`from_pretrained`, then `infer`: what the robot sees in, its actions out (see `pi0.policy.Policy`)."""

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
        **said: Any,
    ) -> Policy:
        """The policy of a checkpoint of any layout that we read: a folder, `gs://` or `hf://`.

        `asset_id` chooses among several norm stats; `config`, `dtype`, `param_dtype` and `device` are those of `load`;
        `num_steps`, `seed` and `fallback` those of `pi0.policy.Policy`; and `said` is what the checkpoint itself does
        not say: `robot`, `default_prompt`, `norm_stats`, ... (see `pi0.policy.complete`). Raises what those do.
        """
        checkpoint = open_checkpoint(source, config, asset_id=asset_id)
        assets = complete(checkpoint.assets, checkpoint.norm_stats, **said)
        model = load_model(checkpoint, dtype=dtype, param_dtype=param_dtype, device=device)
        return cls(model, assets, num_steps=num_steps, seed=seed, fallback=fallback)

    def sample(self, observation: Observation, noise: np.ndarray | None) -> np.ndarray:
        """The model's normalized actions [B, T, A] from `noise` [B, T, A], or π0-FAST's tokens [B, D]; NumPy's all."""
        device = next(self.model.parameters()).device
        inputs = to_device(observation, device)
        if isinstance(self.model, Pi0Fast):
            return to_numpy(self.model.sample_tokens(inputs, self.num_steps))
        return to_numpy(self.model.sample_actions(inputs, torch.as_tensor(noise, device=device), self.num_steps))
