"""A policy that runs in JAX. Needs no torch."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import jax
import numpy as np

import pi0.policy.policy
from convert.checkpoints import open_checkpoint
from pi0.config import ModelConfig
from pi0.observation import Observation
from pi0.policy.policy import check_rtc, fill_assets
from pi0.policy.rtc import RTC, Previous
from pi0.reading import naming
from pi0.robots.pipeline import Pipeline
from pi0_jax.loading import load_model
from pi0_jax.sampler import Sampler

# Compiled once for each size of model and batch.
_sample = jax.jit(lambda model, *inputs: model.sample(*inputs), static_argnums=(3, 4))
_sample_with_subtask = jax.jit(
    lambda model, *inputs, rtc, previous: model.sample_with_subtask(*inputs, rtc=rtc, previous=previous),
    static_argnums=4,
    static_argnames="rtc",
)


class Policy(pi0.policy.policy.Policy):
    """`from_pretrained`, then `infer`: observations in, actions out (see `pi0.policy.policy.Policy`)."""

    @classmethod
    def from_pretrained(
        cls,
        source: str | Path,
        *,
        asset_id: str | None = None,
        config: ModelConfig | None = None,
        preset: str | None = None,
        head_dims: tuple[int, int] | None = None,
        dtype: Any = None,
        param_dtype: Any = None,
        num_steps: int | None = None,
        seed: int = 0,
        fallback: bool = False,
        subtask_every: int = 1,
        rtc: RTC | str | None = None,
        use_sampler: bool = False,
        attention: str | None = None,
        **overrides: Any,
    ) -> Policy:
        """The policy of a checkpoint of any layout that we read: a folder, `gs://` or `hf://`.

        `preset` names the openpi config that the checkpoint was trained with (`pi0.presets`), which says what an openpi
        checkpoint does not. `asset_id` chooses among several norm stats; `head_dims` is that of `open_checkpoint`;
        `config`, `dtype` and `param_dtype` those of `load`; `num_steps`, `seed`, `fallback`, `subtask_every` and
        `rtc` those of `Policy`; `overrides` what the checkpoint itself does not say, or says otherwise: `robot`,
        `action_horizon`, `norm_stats`, ... (see `fill_assets`). With `use_sampler` it samples by `pi0_jax.Sampler`,
        made and warmed up now, and `model` is None: its memory is free again; compiled programs are kept in the user's
        own cache. `attention` is how the model computes it, see `RuntimeConfig`; the sampler has its own. Raises what
        they do, and ValueError for both together.
        """
        if use_sampler and attention is not None:
            raise ValueError(f"attention is {attention!r}: the sampler has its own; leave attention or use_sampler out")
        checkpoint = open_checkpoint(source, config, asset_id=asset_id, preset=preset, head_dims=head_dims)
        with naming(checkpoint.folder):
            assets = fill_assets(checkpoint.assets, checkpoint.norm_stats, **overrides)
            Pipeline.from_assets(assets)  # before the weights are read
            if (rtc := RTC.of(rtc)) is not None:
                check_rtc(rtc, assets)
        checkpoint = dataclasses.replace(checkpoint, assets=assets)
        model: Any = load_model(checkpoint, dtype=dtype, param_dtype=param_dtype, attention=attention)
        options: dict[str, Any] = {"seed": seed, "fallback": fallback, "subtask_every": subtask_every, "rtc": rtc}
        if use_sampler:
            options["sampler"], model = Sampler(model, num_steps=num_steps, subtasks=assets.subtasks, rtc=rtc), None
        return cls(model, assets, num_steps=num_steps, **options)

    def sample(
        self, observation: Observation, noise: np.ndarray | None, previous: Previous | None = None
    ) -> np.ndarray:
        """Normalized actions [B, T, A] from `noise` [B, T, A], or π0-FAST's tokens [B, D], as NumPy arrays."""
        if self.sampler is not None:
            return np.asarray(self.sampler.sample(observation, noise, previous))
        options = () if self.rtc is None else (self.rtc, previous)  # π0-FAST takes none
        return np.asarray(_sample(self.model, observation, noise, self.num_steps, *options))

    def sample_with_subtask(
        self,
        observation: Observation,
        noise: np.ndarray,
        subtask: np.ndarray | None,
        previous: Previous | None = None,
    ) -> tuple[np.ndarray, np.ndarray]:
        """π0.5's subtask [B, D], predicted unless it is given, and the actions [B, T, A], as NumPy arrays."""
        if self.sampler is not None:
            tokens, actions = self.sampler.sample_with_subtask(observation, noise, subtask, previous)
        else:
            tokens, actions = _sample_with_subtask(
                self.model, observation, noise, subtask, self.num_steps, rtc=self.rtc, previous=previous
            )
        return np.asarray(tokens), np.asarray(actions)
