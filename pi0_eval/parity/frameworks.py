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
from pi0.run_config import RecipeConfig
from pi0_eval.parity.inputs import Inputs
from pi0_eval.parity.sides import Side

LOSSES = ("loss", "text loss", "fast loss", "flow loss")
TEXTS = {"tokens": "decoded logits", "subtask": "subtask logits"}  # what is written, and from which logits
SAMPLED = ("first logits", "decoded logits", "tokens", "subtask logits", "subtask", "actions")


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
def jax_program(gradients: bool, num_steps: int, proof: bool, subtasks: bool = False) -> Callable[..., Any]:
    """All stages, gradients and samples of any model in JAX, compiled once for each size."""
    import jax

    from pi0_jax.loading import Model

    options = XLA_OPTIONS | ({"xla_backend_optimization_level": 0} if proof else {})  # a proof runs once

    @partial(jax.jit, compiler_options=options)
    def run(model: Model, observation: Observation, actions: Any, noise: Any, time: Any) -> Any:
        def mean_loss(model: Model) -> tuple[jax.Array, dict[str, jax.Array]]:
            return training_loss(model, subtasks, observation, actions, noise, time)

        if gradients:
            gradient, stages = jax.grad(mean_loss, has_aux=True)(model)
        else:
            gradient, stages = None, mean_loss(model)[1]
        return stages, gradient, sample(model, subtasks, observation.prompt_only(), noise, num_steps)

    return run


def training_loss(model: Any, subtasks: bool, *batch: Any) -> tuple[Any, dict[str, Any]]:
    """The mean loss that a model is trained by, and the stages of its computation.

    A model that writes `subtasks` is trained by the recipe, whose parts are stages as well.
    """
    stages: dict[str, Any] = {}
    loss = model.compute_loss(*batch, stages=stages).mean()
    if subtasks:
        recipe = RecipeConfig()
        parts = model.loss_parts(*batch, recipe)
        stages |= {f"{name} loss": part for name, part in parts.items()}
        loss = sum(recipe.weights[name] * part.mean() for name, part in parts.items())
    return loss, stages


def sample(model: Any, subtasks: bool, observation: Any, noise: Any, num_steps: int) -> dict[str, Any]:
    """What a model samples, in order of computation: actions, tokens, or a subtask and actions after it."""
    stages: dict[str, Any] = {}
    if model.config.family.action_tokens:
        tokens = model.sample_tokens(observation, num_steps, stages=stages)
        return _texts("decoded logits", stages) | {"tokens": tokens}
    if subtasks:
        tokens, actions = model.sample_with_subtask(
            observation, noise, num_steps=num_steps, max_decoding_steps=num_steps, stages=stages
        )
        return _texts("subtask logits", stages) | {"subtask": tokens, "actions": actions}
    return {"actions": model.sample(observation, noise, num_steps)}


def _texts(name: str, stages: dict[str, Any]) -> dict[str, Any]:
    """The logits from which a text is written, and those of its first token, which samplers have as well."""
    return {"first logits": stages["decoded_logits"][:, 0], name: stages["decoded_logits"]}


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
    proof, subtasks = config.runtime.dtype == PROOF_DTYPE, checkpoint.assets.subtasks
    config = config.with_runtime(max_decoding_steps=num_steps)
    if side.attention is not None:
        config = config.with_runtime(attention=side.attention)
    with jax_settings(side, proof):
        params = {name: jnp.asarray(widened(t.read(()), config)) for name, t in checkpoint.ours.items()}
        model = with_parameters(config, params)
        if side.path == "sampler":
            sampler = Sampler(model, num_steps=num_steps, subtasks=subtasks, warm_up=False)
            sampled = _run_sampler(sampler, inputs)
            return Results({n: np.asarray(x) for n, x in sampled.items()}, {})
        run = jax_program(gradients, num_steps, proof, subtasks)
        results = run(model, inputs.observation, inputs.actions, inputs.noise, inputs.time)
        stages, sampled = ({n: np.asarray(x) for n, x in results[i].items()} for i in (0, 2))
        by_name = {} if results[1] is None else {n: np.asarray(g) for n, g in parameters_of(results[1]).items()}
        return Results(ordered(stages, sampled), by_name)


@contextlib.contextmanager
def jax_settings(side: Side, proof: bool) -> Iterator[None]:
    """Float64 for a proof; compiled or not, and on the device, as the side says."""
    import jax

    device = contextlib.nullcontext() if side.device is None else jax.default_device(jax.devices(side.device)[0])
    with jax.enable_x64(proof), jax.disable_jit(side.compiled is False), device:
        yield


def widened(array: np.ndarray, config: ModelConfig) -> np.ndarray:
    """A parameter, of any shape, as stored, or for a proof in float64, to which it is widened exactly."""
    return array.astype(np.float64) if config.runtime.dtype == PROOF_DTYPE else array


def _run_sampler(sampler: Any, inputs: Inputs) -> dict[str, Any]:
    """What a sampler of either framework samples."""
    observation = inputs.observation.prompt_only()
    if not (sampler.subtasks or sampler.config.family.action_tokens):
        return {"actions": sampler.sample(observation, inputs.noise)}
    _, first, _ = sampler.stages(observation, inputs.noise)["prefix"]()
    if sampler.subtasks:
        subtask, actions = sampler.sample_with_subtask(observation, inputs.noise)
        return {"first logits": first, "subtask": subtask, "actions": actions}
    return {"first logits": first, "tokens": sampler.sample(observation)}


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

    device, subtasks = find_device(side.device or "cpu"), checkpoint.assets.subtasks
    config = config.with_runtime(max_decoding_steps=num_steps)
    stored = checkpoint.in_layout("pi0_torch")
    tensors = {name: to_torch(widened(t.read(()), config)).to(device) for name, t in stored.items()}
    model = with_parameters(config, tensors)
    if side.path == "sampler":
        options: dict[str, Any] = {"attention": side.attention, "compile": bool(side.compiled), "subtasks": subtasks}
        sampler = Sampler(model, num_steps=num_steps, warm_up=False, **options)
        return Results({n: to_numpy(x) for n, x in _run_sampler(sampler, inputs).items()}, {})
    observation = to_device(inputs.observation, device)
    actions, noise, time = (torch.from_numpy(x).to(device) for x in (inputs.actions, inputs.noise, inputs.time))
    by_name: dict[str, np.ndarray] = {}
    with torch.set_grad_enabled(gradients):
        loss, stages = training_loss(model, subtasks, observation, actions, noise, time)
    if gradients:
        names, params = zip(*model.named_parameters(), strict=True)
        values = torch.autograd.grad(loss, params, materialize_grads=True)
        theirs = parameters_of(dict(zip(names, values, strict=True)))
        by_name = {n: tensor.read(()) for n, tensor in LAYOUTS["pi0_torch"].to_ours(config, theirs).items()}
    sampled = sample(model, subtasks, observation.prompt_only(), noise, num_steps)
    stages, sampled = ({n: to_numpy(x) for n, x in found.items()} for found in (stages, sampled))
    return Results(ordered(stages, sampled), by_name)


FRAMEWORKS = {"jax": run_jax, "torch": run_torch}


def ordered(stages: dict[str, np.ndarray], sampled: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The stages in order of computation, one entry per layer; of the prefix only unmasked tokens.

    Stages are [B, ...], those of layers [L, B, ...].
    """
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
            **_in_order(sampled, SAMPLED),
        }
    return {
        **prefix,
        "suffix tokens": stages["suffix_tokens"],
        **layers("prefix layer", "prefix_layers", valid),
        **layers("suffix layer", "suffix_layers"),
        "prefix out": stages["prefix_out"][valid],
        "suffix out": stages["suffix_out"],
        "velocity": stages["velocity"],
        **_in_order(stages, LOSSES),
        **_in_order(sampled, SAMPLED),
    }


def _in_order(found: dict[str, np.ndarray], names: tuple[str, ...]) -> dict[str, np.ndarray]:
    """Those of `names` that there are: JAX sorts what it returns."""
    return {name: found[name] for name in names if name in found}
