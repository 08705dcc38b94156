"""Random models, and inputs for them, whose speed is measured: no time depends on the numbers."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np

from pi0.config import ModelConfig
from pi0.numerics import EOS_TOKEN
from pi0.observation import Observation
from pi0.quantization import CALIBRATED, QuantizationConfig


def random_inputs(config: ModelConfig, cameras: int, batch: int) -> tuple[Observation, np.ndarray]:
    """An observation with the first cameras and text of the full length, and noise [B, T, A]."""
    rng = np.random.default_rng(0)
    data: dict[str, np.ndarray] = {
        "state": rng.normal(size=(batch, config.state_size)),
        "tokenized_prompt": rng.integers(0, config.vocab_size, (batch, config.max_token_len)),
        "tokenized_prompt_mask": np.ones((batch, config.max_token_len), bool),
    }
    for i, key in enumerate(config.image_keys):
        data[f"image/{key}"] = rng.integers(0, 256, (batch, *config.image_resolution, 3), np.uint8)
        data[f"image_mask/{key}"] = np.full(batch, i < cameras)
    noise = rng.normal(size=(batch, config.action_horizon, config.action_dim)).astype(np.float32)
    return Observation.from_dict(data, config), noise


@functools.cache
def jax_model(config: ModelConfig) -> Any:
    """A random model in the compute dtype."""
    import jax
    import jax.numpy as jnp
    from flax import nnx

    from pi0_jax.loading import make_model

    @jax.jit
    def random_model() -> Any:
        model, dtype = make_model(config, rngs=nnx.Rngs(0)), config.runtime.dtype
        embedding = model.paligemma.embedding
        embedding[...] = embedding[...].at[EOS_TOKEN].set(0)  # never the likeliest token, so decoding does not end
        return jax.tree.map(lambda x: x.astype(dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x, model)

    return random_model()


@functools.cache
def torch_model(config: ModelConfig) -> Any:
    """A random model in the compute dtype, on the GPU where there is one."""
    import torch

    from pi0_torch.loading import make_model

    torch.set_default_dtype(getattr(torch, config.runtime.dtype))
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model: Any = make_model(config).requires_grad_(False)
    torch.set_default_dtype(torch.float32)
    model.paligemma.embedding[EOS_TOKEN] = 0  # never the likeliest token, so decoding does not end
    return model


@functools.cache
def jax_sampler(config: ModelConfig, num_steps: int) -> Any:
    """JAX's sampler of the random model."""
    from pi0_jax.sampler import Sampler

    return Sampler(jax_model(config), num_steps=num_steps, warm_up=False)


@functools.cache
def torch_sampler(
    config: ModelConfig,
    num_steps: int,
    attention: str | None = None,
    compile: bool | None = None,
    quantize: str = "",
) -> Any:
    """PyTorch's sampler of the random model, all layers in a format of `pi0.quantization` where one is given.

    Ranges of inputs are those of random inputs.
    """
    import torch

    from pi0_torch.loading import to_device
    from pi0_torch.quantization import calibration, sampler_layers
    from pi0_torch.quantization import quantize as round_weights
    from pi0_torch.sampler import Sampler

    model: Any = torch_model(config)
    sampler = Sampler(model, num_steps=num_steps, attention=attention, compile=compile, warm_up=False)
    ranges: dict[str, float] = {}
    if quantize in CALIBRATED:
        observation, noise = random_inputs(config, len(config.image_keys), 1)
        with torch.no_grad(), calibration(model, sampler_layers(sampler.weights).keys()) as ranges:
            model.sample(to_device(observation, sampler.device), torch.from_numpy(noise).to(sampler.device), 2)
    if quantize:
        round_weights(sampler, QuantizationConfig({"*": quantize}, input_ranges=ranges))
    return sampler
