"""A policy's sampler with any of its layers quantized, on recorded frames: actions, stages, loss, bytes, milliseconds.

Axes: N frames, T action horizon, A action dim, R robot's action dims.
"""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Collection, Sequence
from typing import Any

import numpy as np
import torch

from pi0.datasets.base import Dataset
from pi0.observation import Observation
from pi0.quantization import WIDE, QuantizationConfig
from pi0.training.validation import action_draws
from pi0_eval.parity.compare import errors
from pi0_eval.parity.frameworks import Results, ordered
from pi0_eval.replay import recorded_actions
from pi0_eval.scores import Frames
from pi0_torch.loading import Model, map_tensors, to_device, to_numpy
from pi0_torch.policy import Policy
from pi0_torch.quantization import (
    calibration,
    check_formats,
    put,
    replacement,
    sampler_layers,
    simulate,
    stored_bytes,
)
from pi0_torch.sampler import Sampler


@dataclasses.dataclass(frozen=True)
class Recorded:
    """Frames of a dataset as a model's inputs: `observation`, normalized `actions` [N, T, A], and what is drawn.

    `noise` [N, T, A] and `time` [N] are those of the loss, `start` [N, T, A] the noise that is sampled from.
    """

    observation: Observation
    actions: np.ndarray
    noise: np.ndarray
    time: np.ndarray
    start: np.ndarray

    @classmethod
    def read(cls, policy: Policy, dataset: Dataset, frames: Sequence[int]) -> Recorded:
        """The frames of these numbers."""
        read = Frames.read([dataset[i] for i in frames], policy.pipeline, policy.config.action_horizon).arrays
        observation = Observation.from_dict({k: v for k, v in read.items() if k != "actions"}, policy.config)
        actions = read.get("actions")
        if actions is None:  # of π0-FAST they are tokens
            actions = np.zeros((len(frames), policy.config.action_horizon, policy.config.action_dim), np.float32)
        return cls(observation, actions, *action_draws(policy.config, len(frames)))

    def __len__(self) -> int:
        return len(self.start)

    def batches(self, size: int) -> list[Recorded]:
        """The frames in parts of at most `size`."""
        return [
            map_tensors(lambda x, own=slice(first, first + size): x[own], self)  # type: ignore[misc]
            for first in range(0, len(self), size)
        ]


@dataclasses.dataclass(frozen=True)
class ActionError:
    """How far actions are from those of the wide policy, over frames, steps of the chunk and dimensions.

    `mean` and `largest` are fractions of the range of the recorded actions of each dimension; `units`, the mean of each
    dimension in the robot's units; `outputs` the relative L2 error of what the model gives: normalized actions, or of
    π0-FAST the share of tokens that differ.
    """

    mean: float
    largest: float
    units: list[float]
    outputs: float


class Quantizable:
    """A policy's sampler, of which any layers are quantized as `config` says, and its wide outputs on `frames`.

    `action_range` [R] is the range of the recorded actions; a dimension in which they are constant is left out of
    fractions. The policy keeps its model.
    """

    def __init__(
        self, policy: Policy, config: QuantizationConfig, frames: Recorded, dataset: Dataset, *, batch: int = 8
    ):
        self.policy, self.config, self.frames, self.batch = policy, config, frames, batch
        self.sampler = Sampler(policy.model, num_steps=policy.num_steps, compile=False, warm_up=False)
        self.layers = sampler_layers(self.sampler.weights)
        self.formats = config.formats(self.layers)
        check_formats(self.formats.values(), self.sampler.device)
        self.quantized = [name for name, format in self.formats.items() if format != WIDE]
        if not self.quantized:
            raise ValueError("the config quantizes no layer: all are wide")
        self.action_range = np.ptp(recorded_actions(dataset, policy.pipeline.robot), axis=0).astype(np.float64)
        if not (self.action_range > 0).any():
            raise ValueError("the recorded actions are constant: there is no range to compare errors with")
        self._wide = {name: layer[0] for name, layer in self.layers.items()}
        compute = getattr(torch, policy.config.runtime.dtype)
        self._narrow = {
            n: replacement(n, self._wide[n].detach(), self.formats[n], config, compute) for n in self.quantized
        }
        self.reference = self.outputs()
        self.actions = self.in_units(self.reference)

    def keep_wide(self, names: Collection[str]) -> None:
        """Quantize every layer of the config but these."""
        for name in self.quantized:
            put(self.layers[name], self._wide[name] if name in names else self._narrow[name])

    def quantize_one(self, name: str) -> None:
        """Quantize this layer alone."""
        self.keep_wide([other for other in self.quantized if other != name])

    def outputs(self) -> np.ndarray:
        """Normalized actions [N, T, A], or π0-FAST's tokens."""
        parts = [self.sampler.sample(b.observation.prompt_only(), b.start) for b in self.frames.batches(self.batch)]
        width = max(part.shape[1] for part in parts)
        return np.concatenate([_padded(to_numpy(part), width) for part in parts])

    def in_units(self, outputs: np.ndarray) -> np.ndarray:
        """Outputs as actions [N, T, R] in the robot's units."""
        return self.policy.outputs(outputs, np.asarray(self.frames.observation.state))["actions"].astype(np.float64)

    def error(self) -> ActionError:
        """The error of the layers as they are."""
        outputs = self.outputs()
        off = np.abs(self.in_units(outputs) - self.actions)
        varies = self.action_range > 0
        share = off[..., varies] / self.action_range[varies]
        if self.policy.config.family.action_tokens:
            width = max(outputs.shape[1], self.reference.shape[1])
            relative = float((_padded(outputs, width) != _padded(self.reference, width)).mean())
        else:
            relative = float(np.linalg.norm(outputs - self.reference) / np.linalg.norm(self.reference))
        return ActionError(float(share.mean()), float(share.max()), off.mean(axis=(0, 1)).tolist(), relative)

    def stored(self) -> int:
        """Bytes of the sampler's weights."""
        return stored_bytes(self.sampler.weights)

    def layer_bytes(self, name: str) -> tuple[int, int]:
        """Bytes of a layer's weights, wide and quantized."""
        wide = self._wide[name]
        return wide.numel() * wide.element_size(), stored_bytes(self._narrow[name])

    def simulated(self, wide: Collection[str] = ()) -> Model:
        """The plain model with the same numbers; of all layers wide, the model itself."""
        formats = {name: WIDE if name in wide else format for name, format in self.formats.items()}
        if not any(format != WIDE for format in formats.values()):
            return self.policy.model
        return simulate(self.policy.model, self.config, formats)

    def latency(self, repeats: int) -> dict[str, float]:
        """Median milliseconds for one frame, wide and quantized, in turns; leaves all layers quantized."""
        first = self.frames.batches(1)[0]
        times: dict[str, list[float]] = {"wide": [], "quantized": []}
        for i in range(repeats + 1):
            for name, kept in (("wide", self.quantized), ("quantized", [])):
                self.keep_wide(kept)
                begin = time.perf_counter()
                self.sampler.sample(first.observation.prompt_only(), first.start)
                if self.sampler.device.type == "cuda":
                    torch.cuda.synchronize()
                if i:  # the first warms up
                    times[name].append(1e3 * (time.perf_counter() - begin))
        return {name: statistics.median(own) for name, own in times.items()}


def _padded(tokens: np.ndarray, width: int) -> np.ndarray:
    """Tokens [N, D] with zeros behind them; actions as they are."""
    return tokens if tokens.ndim > 2 else np.pad(tokens, ((0, 0), (0, width - tokens.shape[1])))


@torch.no_grad()
def loss(model: Model, frames: Recorded, batch: int) -> float:
    """The mean loss over the frames: of flow matching, or of π0-FAST's tokens."""
    parts = [_stages(model, part)[1].reshape(len(part), -1).mean(axis=1) for part in frames.batches(batch)]
    return float(np.concatenate(parts).mean())


@torch.no_grad()
def stage_errors(wide: Model, other: Model, frames: Recorded, batch: int) -> dict[str, float]:
    """Relative L2 error of every stage of the loss, in order of computation, on the first `batch` frames."""
    part = frames.batches(batch)[0]
    first, second = (Results(ordered(_stages(model, part)[0], {}), {}) for model in (wide, other))
    return errors(first, second)


def _stages(model: Any, frames: Recorded) -> tuple[dict[str, np.ndarray], np.ndarray]:
    device = next(model.parameters()).device
    arrays = [torch.from_numpy(x).to(device) for x in (frames.actions, frames.noise, frames.time)]
    stages: dict[str, torch.Tensor] = {}
    found = model.compute_loss(to_device(frames.observation, device), *arrays, stages=stages)
    return {name: to_numpy(x.float() if x.is_floating_point() else x) for name, x in stages.items()}, to_numpy(found)


@torch.no_grad()
def calibrate(policy: Policy, frames: Recorded, batch: int) -> dict[str, float]:
    """The largest absolute input of each layer on the frames, as `QuantizationConfig.input_ranges`."""
    layers = sampler_layers(Sampler(policy.model, num_steps=1, compile=False, warm_up=False).weights)
    with calibration(policy.model, layers.keys()) as ranges:
        for part in frames.batches(batch):
            policy.sample(part.observation.prompt_only(), part.start)
    return ranges
