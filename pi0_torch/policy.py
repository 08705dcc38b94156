"""A policy that runs in PyTorch. Needs no JAX."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import torch

import pi0.policy.policy
from convert.checkpoints import open_checkpoint
from pi0.config import ModelConfig
from pi0.observation import Observation
from pi0.policy.policy import check_rtc, fill_assets
from pi0.policy.rtc import RTC, Previous
from pi0.quantization import QuantizationConfig
from pi0.reading import naming
from pi0.robots.pipeline import Pipeline
from pi0_torch.loading import load_model, to_device, to_numpy
from pi0_torch.quantization import quantize
from pi0_torch.sampler import Sampler


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
        device: str | torch.device = "cpu",
        num_steps: int | None = None,
        seed: int = 0,
        fallback: bool = False,
        subtask_every: int = 1,
        rtc: RTC | str | None = None,
        use_sampler: bool = False,
        attention: str | None = None,
        compile: bool | None = None,
        quantization: QuantizationConfig | str | Path | None = None,
        **overrides: Any,
    ) -> Policy:
        """The policy of a checkpoint of any layout that we read: a folder, `gs://` or `hf://`.

        `preset` names the openpi config that the checkpoint was trained with (`pi0.presets`), which says what an openpi
        checkpoint does not. `asset_id` chooses among several norm stats; `head_dims` is that of `open_checkpoint`;
        `config`, `dtype`, `param_dtype` and `device` those of `load`; `num_steps`, `seed`, `fallback`,
        `subtask_every` and `rtc` those of `Policy`; `overrides` what the checkpoint itself does not say, or says
        otherwise: `robot`, `action_horizon`, `norm_stats`, ... (see `fill_assets`). With `use_sampler` it samples by
        `pi0_torch.Sampler`, made and warmed up now, with its `attention` and `compile`, and `model` is None: its memory
        is free again; its weights are rounded as `quantization` says: a config, a format's name, or a JSON file
        (`QuantizationConfig.of`). Raises what they do, and ValueError for these three without `use_sampler`.
        """
        if not use_sampler and (attention, compile, quantization) != (None, None, None):
            raise ValueError("attention, compile and quantization are options of the sampler: pass use_sampler=True")
        rounding = None if quantization is None else QuantizationConfig.of(quantization)
        checkpoint = open_checkpoint(source, config, asset_id=asset_id, preset=preset, head_dims=head_dims)
        with naming(checkpoint.folder):
            assets = fill_assets(checkpoint.assets, checkpoint.norm_stats, **overrides)
            Pipeline.from_assets(assets)  # before the weights are read
            if (rtc := RTC.of(rtc)) is not None:
                check_rtc(rtc, assets)
        checkpoint = dataclasses.replace(checkpoint, assets=assets)
        model: Any = load_model(checkpoint, dtype=dtype, param_dtype=param_dtype, device=device)
        options: dict[str, Any] = {"seed": seed, "fallback": fallback, "subtask_every": subtask_every, "rtc": rtc}
        if use_sampler:
            how: dict[str, Any] = {"subtasks": assets.subtasks, "rtc": rtc, "attention": attention, "compile": compile}
            sampler, model = Sampler(model, num_steps=num_steps, warm_up=rounding is None, **how), None
            if rounding is not None:
                quantize(sampler, rounding)
                sampler.warm_up()
            options["sampler"] = sampler
        return cls(model, assets, num_steps=num_steps, **options)

    def sample(
        self, observation: Observation, noise: np.ndarray | None, previous: Previous | None = None
    ) -> np.ndarray:
        """Normalized actions [B, T, A] from `noise` [B, T, A], or π0-FAST's tokens [B, D], as NumPy arrays."""
        if self.sampler is not None:
            return to_numpy(self.sampler.sample(observation, noise, previous))
        observation, noise, previous = self._on_device(observation, noise, previous)
        options = () if self.rtc is None else (self.rtc, previous)  # π0-FAST takes none
        return to_numpy(self.model.sample(observation, noise, self.num_steps, *options))

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
            *inputs, previous = self._on_device(observation, noise, subtask, previous)
            options: dict[str, Any] = {"rtc": self.rtc, "previous": previous}
            tokens, actions = self.model.sample_with_subtask(*inputs, self.num_steps, **options)
        return to_numpy(tokens), to_numpy(actions)

    def _on_device(self, observation: Observation, *arrays: Any) -> tuple[Any, ...]:
        device = next(self.model.parameters()).device

        def move(array: Any) -> Any:
            if isinstance(array, Previous):
                return Previous(*map(move, array))
            return None if array is None else torch.as_tensor(array, device=device)

        return to_device(observation, device), *map(move, arrays)
