"""Run a checkpoint in JAX or PyTorch and collect the outputs of all stages.

Axes: B batch, L layers, T action horizon, A action dim, D decoded tokens.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from functools import cache, partial
from typing import Any

import numpy as np

from convert.checkpoints import Checkpoint
from convert.layouts.registry import LAYOUTS
from pi0.config import PROOF_DTYPE, ModelConfig
from pi0.observation import Observation
from pi0_eval.parity.inputs import Inputs
from pi0_eval.parity.sides import Side


@dataclasses.dataclass(frozen=True)
class Results:
    """What one model computed: `stages` by name, in order, and `gradients` of the mean loss by parameter name."""

    stages: dict[str, np.ndarray]
    gradients: dict[str, np.ndarray]


# By default, XLA may elide a rounding to bfloat16 and back, which the model prescribes.
XLA_OPTIONS = {"xla_allow_excess_precision": False}


@contextlib.contextmanager
def exact_matmuls() -> Iterator[None]:
    """Compute float32 matrix products in full float32, not in TF32 or bfloat16, in every installed framework."""
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(ImportError):
            import jax

            stack.enter_context(jax.default_matmul_precision("highest"))
        with contextlib.suppress(ImportError):
            import torch

            backends: tuple[Any, ...] = (torch.backends.cuda.matmul, torch.backends.cudnn)
            for backend in backends:
                stack.callback(setattr, backend, "allow_tf32", backend.allow_tf32)
                backend.allow_tf32 = False
        yield


@cache
def jax_program(gradients: bool, num_steps: int, proof: bool) -> Callable[..., Any]:
    """All stages, gradients and samples of any model in JAX, compiled once for each size."""
    import jax

    from pi0_jax.loading import Model

    options = XLA_OPTIONS | ({"xla_backend_optimization_level": 0} if proof else {})  # a proof runs once

    @partial(jax.jit, compiler_options=options)
    def run(model: Model, observation: Observation, actions: Any, noise: Any, time: Any) -> Any:
        def mean_loss(model: Model) -> tuple[jax.Array, dict[str, jax.Array]]:
            stages: dict[str, jax.Array] = {}
            return model.compute_loss(observation, actions, noise, time, stages=stages).mean(), stages

        if gradients:
            gradient, stages = jax.grad(mean_loss, has_aux=True)(model)
        else:
            gradient, stages = None, mean_loss(model)[1]
        return stages, gradient, model.sample(observation.prompt_only(), noise, num_steps)

    return run


def run_jax(
    checkpoint: Checkpoint,
    config: ModelConfig,
    inputs: Inputs,
    num_steps: int,
    gradients: bool,
    side: Side = Side("jax"),  # noqa: B008 -- frozen
) -> Results:
    """All stages of a checkpoint in JAX; `num_steps` as in `model.sample`. Of a sampler, what it samples."""
    import jax.numpy as jnp

    from pi0_jax.loading import parameters_of, with_parameters
    from pi0_jax.sampler import Sampler, use_compilation_cache

    use_compilation_cache()
    proof = config.runtime.dtype == PROOF_DTYPE
    if side.attention is not None:
        config = config.with_runtime(attention=side.attention)
    with jax_settings(side, proof):
        params = {name: jnp.asarray(widened(t.read(()), config)) for name, t in checkpoint.ours.items()}
        model = with_parameters(config, params)
        if side.path == "sampler":
            sampler = Sampler(model, num_steps=num_steps, warm_up=False)
            sampled = np.asarray(sampler.sample(inputs.observation.prompt_only(), inputs.noise))
            return Results({_sampled(config): sampled}, {})
        run = jax_program(gradients, num_steps, proof)
        stages, gradient, sampled = run(model, inputs.observation, inputs.actions, inputs.noise, inputs.time)
        by_name = {} if gradient is None else {n: np.asarray(g) for n, g in parameters_of(gradient).items()}
        return Results(_ordered({n: np.asarray(x) for n, x in stages.items()}, np.asarray(sampled)), by_name)


@contextlib.contextmanager
def jax_settings(side: Side, proof: bool) -> Iterator[None]:
    """Float64 for a proof; compiled or not, and on the device, as the side says."""
    import jax

    device = contextlib.nullcontext() if side.device is None else jax.default_device(jax.devices(side.device)[0])
    with jax.enable_x64(proof), jax.disable_jit(side.compiled is False), device:
        yield


def widened(array: np.ndarray, config: ModelConfig) -> np.ndarray:
    """A parameter as stored, or for a proof in float64, to which it is widened exactly."""
    return array.astype(np.float64) if config.runtime.dtype == PROOF_DTYPE else array


def _sampled(config: ModelConfig) -> str:
    return "tokens" if config.family.action_tokens else "actions"


def run_torch(
    checkpoint: Checkpoint,
    config: ModelConfig,
    inputs: Inputs,
    num_steps: int,
    gradients: bool,
    side: Side = Side("torch"),  # noqa: B008 -- frozen
) -> Results:
    """All stages of a checkpoint in PyTorch; `num_steps` as in `model.sample`. Of a sampler, what it samples."""
    import torch

    from pi0_torch.loading import find_device, parameters_of, to_device, to_numpy, to_torch, with_parameters
    from pi0_torch.sampler import Sampler

    device = find_device(side.device or "cpu")
    stored = checkpoint.in_layout("pi0_torch")
    tensors = {name: to_torch(widened(t.read(()), config)).to(device) for name, t in stored.items()}
    model = with_parameters(config, tensors)
    if side.path == "sampler":
        compile = bool(side.compiled)
        sampler = Sampler(model, num_steps=num_steps, attention=side.attention, compile=compile, warm_up=False)
        return Results({_sampled(config): to_numpy(sampler.sample(inputs.observation.prompt_only(), inputs.noise))}, {})
    observation = to_device(inputs.observation, device)
    actions, noise, time = (torch.from_numpy(x).to(device) for x in (inputs.actions, inputs.noise, inputs.time))
    stages: dict[str, torch.Tensor] = {}
    by_name: dict[str, np.ndarray] = {}
    with torch.set_grad_enabled(gradients):
        loss = model.compute_loss(observation, actions, noise, time, stages=stages)
    if gradients:
        names, params = zip(*model.named_parameters(), strict=True)
        values = torch.autograd.grad(loss.mean(), params, materialize_grads=True)
        theirs = parameters_of(dict(zip(names, values, strict=True)))
        by_name = {n: tensor.read(()) for n, tensor in LAYOUTS["pi0_torch"].to_ours(config, theirs).items()}
    sampled = model.sample(observation.prompt_only(), noise, num_steps)
    return Results(_ordered({n: to_numpy(x) for n, x in stages.items()}, to_numpy(sampled)), by_name)


FRAMEWORKS = {"jax": run_jax, "torch": run_torch}


def _ordered(stages: dict[str, np.ndarray], sampled: np.ndarray) -> dict[str, np.ndarray]:
    """The stages in order of computation, one entry per layer; of the prefix only unmasked tokens."""
    valid = stages["prefix_valid"]

    def layers(name: str, key: str, mask: np.ndarray | None = None) -> dict[str, np.ndarray]:
        return {f"{name} {i}": x if mask is None else x[mask] for i, x in enumerate(stages[key])}

    prefix = {
        **layers("vision layer", "vision.layers"),
        "image tokens": stages["image_tokens"],
        "prefix tokens": stages["prefix_tokens"][valid],
    }
    if "logits" in stages:
        return {
            **prefix,
            **layers("prefix layer", "prefix_layers", valid),
            "pre-logits": stages["pre_logits"][valid],
            "logits": stages["logits"][valid[:, -stages["logits"].shape[1] :]],
            "loss": stages["loss"],
            "tokens": sampled,
        }
    return {
        **prefix,
        "suffix tokens": stages["suffix_tokens"],
        **layers("prefix layer", "prefix_layers", valid),
        **layers("suffix layer", "suffix_layers"),
        "prefix out": stages["prefix_out"][valid],
        "suffix out": stages["suffix_out"],
        "velocity": stages["velocity"],
        "loss": stages["loss"],
        "actions": sampled,
    }
