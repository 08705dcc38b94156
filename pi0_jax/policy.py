"""A policy that runs in JAX. Needs no torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import numpy as np

import pi0.policy.policy
from convert.checkpoints import open_checkpoint
from pi0.config import ModelConfig
from pi0.observation import Observation
from pi0.policy.policy import complete
from pi0_jax.loading import load_model
from pi0_jax.models.pi0 import Pi0
from pi0_jax.models.pi0_fast import Pi0Fast
from pi0_jax.models.pi05 import Pi05
from pi0_jax.sampler import Sampler, TokenSampler

# Compiled once for each size of model and batch.
_sample_actions = jax.jit(Pi0.sample_actions, static_argnames="num_steps")
_sample_planned = jax.jit(Pi05.sample, static_argnames="num_steps")
_sample_tokens = jax.jit(Pi0Fast.sample_tokens, static_argnames="max_decoding_steps")


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
        num_steps: int | None = None,
        seed: int = 0,
        fallback: bool = False,
        plan_every: int = 1,
        fast: bool = False,
        **said: Any,
    ) -> Policy:
        """The policy of a checkpoint of any layout that we read: a folder, `gs://` or `hf://`.

        `asset_id` chooses among several norm stats; `config`, `dtype` and `param_dtype` are those of `load`;
        `num_steps`, `seed`, `fallback` and `plan_every` those of `pi0.policy.Policy`; and `said` is what the checkpoint
        itself does not say: `robot`, `default_prompt`, `norm_stats`, ... (see `pi0.policy.complete`). With `fast`, π0
        and π0.5 sample by `pi0_jax.Sampler`, made and warmed up now, and π0-FAST by `TokenSampler`; their compiled
        programs are kept in the user's own cache. Raises what they do.
        """
        checkpoint = open_checkpoint(source, config, asset_id=asset_id)
        assets = complete(checkpoint.assets, checkpoint.norm_stats, **said)
        model = load_model(checkpoint, dtype=dtype, param_dtype=param_dtype)
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
            return np.asarray(self.sampler.sample(observation))
        if self.sampler is not None and noise is not None:
            return np.asarray(self.sampler.sample(observation, noise))
        if isinstance(self.model, Pi0Fast):
            return np.asarray(_sample_tokens(self.model, observation, max_decoding_steps=self.num_steps))
        return np.asarray(_sample_actions(self.model, observation, noise, num_steps=self.num_steps))

    def sample_planned(
        self, observation: Observation, noise: np.ndarray, subtask: np.ndarray | None
    ) -> tuple[np.ndarray, np.ndarray]:
        """π0.5's subtask [B, D], written unless it is given, and the actions after it [B, T, A]; NumPy's both."""
        tokens, actions = _sample_planned(self.model, observation, noise, subtask, num_steps=self.num_steps)
        return np.asarray(tokens), np.asarray(actions)
