"""What an export is compared with: the stages of the plain model's `sample`, in either framework.

Axes: B batch, S prefix tokens, L layers, W width, T action horizon, A action dim.
"""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from convert.checkpoints import Checkpoint
from pi0 import numerics
from pi0.config import PROOF_DTYPE, ModelConfig
from pi0.masks import block_mask
from pi0.observation import Observation, to_numpy
from pi0.policy.rtc import RTC, Previous
from pi0.quantization import QuantizationConfig

Stages = dict[str, np.ndarray]
Source = Callable[["Case"], Stages]


@dataclasses.dataclass(frozen=True)
class Case:
    """The inputs of a comparison: an observation, and of models that sample actions noise [B, T, A] and, with
    real-time chunking, the previous chunk."""

    name: str
    observation: Observation
    noise: np.ndarray | None = None
    previous: Previous | None = None


def stages_of(
    model: Any,
    case: Case,
    num_steps: int,
    *,
    rtc: RTC | None = None,
    subtasks: bool = False,
    tensor: Callable = np.array,
) -> dict[str, Any]:
    """The stages that a plain model computes while it samples, in order; `tensor` makes an array of its framework.

    Tokens of the prefix are those of all cameras and the whole prompt, masked ones included.
    """
    observation = case.observation
    found: dict[str, Any] = {}
    prefix, valid = model.embed_prefix(observation, found)
    _, cache = model.read_prefix(prefix, valid, valid[:, :, None] & valid[:, None, :], found)
    stages = {f"vision layer {i}": x for i, x in enumerate(found["vision.layers"])}
    stages |= {"image tokens": found["image_tokens"], "prefix tokens": prefix}
    pairs = cache if isinstance(cache, list) else zip(*cache, strict=True)  # in JAX layers are an axis
    for i, ((keys, values), layer) in enumerate(zip(pairs, found["layers.0"], strict=True)):
        stages |= {f"prefix keys {i}": keys, f"prefix values {i}": values, f"prefix layer {i}": layer}
    if model.config.family.action_tokens:
        texts: dict[str, Any] = {}
        tokens = model.sample_tokens(observation, num_steps, stages=texts)
        return stages | {"decoded logits": texts["decoded_logits"], "tokens": tokens}
    if subtasks:
        texts = {}
        options = {"num_steps": num_steps, "rtc": rtc, "previous": case.previous, "stages": texts}
        subtask, actions = model.sample_with_subtask(observation, case.noise, **options)
        return stages | {"subtask logits": texts["decoded_logits"], "subtask": subtask, "actions": actions}
    return stages | _steps(model, case, num_steps, cache, valid, rtc, tensor)


def _steps(
    model: Any, case: Case, num_steps: int, cache: Any, valid: Any, rtc: RTC | None, tensor: Callable[..., Any]
) -> dict[str, Any]:
    """The stages of the Euler steps; see `FlowModel.integrate`."""
    package = type(model).__module__.partition(".")[0]
    rtc_code: Any = importlib.import_module(f"{package}.models.rtc")
    noise, stages = case.noise, dict[str, Any]()
    assert noise is not None
    seen, own = to_numpy(valid), model.config.family.state_tokens
    blocks = np.repeat([0, 1, 2], [seen.shape[1], own, noise.shape[1]])
    everything = np.concatenate([seen, np.ones((len(seen), len(blocks) - seen.shape[1]), bool)], axis=1)
    mask = tensor(block_mask(blocks, everything, own + noise.shape[1]))
    positions = tensor(seen.sum(1, keepdims=True) + np.arange(own + noise.shape[1]))
    given = rtc_code.given_actions(rtc, case.previous)
    x_t = rtc_code.clamp(noise, given, case.previous)
    times = numerics.euler_times(num_steps)
    for i, (time, scale) in enumerate(zip(times.tolist(), (rtc or RTC()).scales(times).tolist(), strict=True)):
        layers: dict[str, Any] | None = None if rtc is not None and rtc.method == "guided" else {}
        step = (time, scale, num_steps, cache, positions, mask, rtc, case.previous, layers)
        x_t = model.euler_step(case.observation, x_t, *step)
        for layer, x in enumerate((layers or {}).get("layers.0", ())):
            stages[f"step {i + 1} suffix layer {layer}"] = x
        stages[f"step {i + 1} actions"] = x_t
    return stages | {"actions": x_t}


def layer_formats(config: ModelConfig, quantization: QuantizationConfig, subtasks: bool) -> dict[str, str]:
    """The format of each layer of PyTorch's sampler. Raises ConfigError for a pattern that matches none."""
    import torch

    from pi0_torch.loading import abstract_model
    from pi0_torch.quantization import sampler_layers
    from pi0_torch.sampler import Sampler

    with torch.device("meta"):
        sampler = Sampler(abstract_model(config), subtasks=subtasks, compile=False, warm_up=False)
    return quantization.formats(sampler_layers(sampler.weights))


def torch_source(
    checkpoint: Checkpoint,
    config: ModelConfig,
    weights: str,
    *,
    quantization: QuantizationConfig | None = None,
    formats: Mapping[str, str] | None = None,
    **options: Any,
) -> Source:
    """The stages of a checkpoint's plain model in PyTorch, with weights stored as `weights`; see `stages_of`.

    With `quantization`, its layers are rounded to their `formats`.
    """
    import torch

    from pi0_torch.loading import map_tensors, to_numpy, to_torch, with_parameters
    from pi0_torch.quantization import simulate

    dtype = getattr(torch, weights)
    stored = checkpoint.in_layout("pi0_torch")
    model = with_parameters(config, {name: to_torch(t.read(())).to(dtype) for name, t in stored.items()})
    if quantization is not None:
        model = simulate(model, quantization, formats or {})

    def compute(case: Case) -> Stages:
        with torch.no_grad():
            parts = (map_tensors(torch.as_tensor, x) for x in (case.observation, case.noise, case.previous))
            found = stages_of(model, Case(case.name, *parts), tensor=torch.as_tensor, **options)
        return {name: to_numpy(value) for name, value in found.items()}

    return compute


def jax_source(checkpoint: Checkpoint, config: ModelConfig, weights: str, **options: Any) -> Source:
    """`torch_source`, in JAX."""
    import jax
    import jax.numpy as jnp

    from pi0_jax.loading import with_parameters

    proof = PROOF_DTYPE in (weights, config.runtime.dtype)
    with jax.enable_x64(proof):
        params = {name: jnp.asarray(t.read(()), dtype=weights) for name, t in checkpoint.ours.items()}
        model = with_parameters(config, params)

    def compute(case: Case) -> Stages:
        with jax.enable_x64(proof):
            found = stages_of(model, case, tensor=jnp.asarray, **options)
        return {name: np.asarray(value) for name, value in found.items()}

    return compute
