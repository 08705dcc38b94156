"""Tokens per second of π0-FAST in JAX and PyTorch, with the cache and without.

python benchmarks/decoding.py                  about 50 M parameters, float32, batch 1 and 4
python benchmarks/decoding.py --dtype bfloat16 --tokens 64
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import time
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import torch
from flax import nnx

import pi0_jax
import pi0_torch
from convert.layouts.registry import LAYOUTS
from convert.tensors import Tensor
from pi0.config import GemmaConfig, ModelConfig, RuntimeConfig, VisionConfig
from pi0.observation import Observation
from pi0_eval.parity.compare import Inputs
from pi0_jax.loading import parameters_of
from pi0_torch.loading import to_torch, with_parameters

MID_SIZE = ModelConfig(
    kind="pi0_fast",
    vision=VisionConfig(width=384, depth=8, mlp_dim=1536, num_heads=6),
    paligemma=GemmaConfig(width=512, depth=8, mlp_dim=2048, num_heads=8, num_kv_heads=1, head_dim=64),
    action_expert=None,
    vocab_size=8192,
    image_resolution=(112, 112),
    image_keys=("base_0_rgb", "base_1_rgb", "wrist_0_rgb"),
    max_token_len=128,
    runtime=RuntimeConfig(remat="none"),
)

FEW = 4  # tokens decoded without a cache: each takes as long as the next, since the text is padded


def seconds(run: Callable[[], object], repeats: int) -> float:
    """Median wall time of a call, after one that warms up."""
    times = []
    for i in range(repeats + 1):
        start = time.perf_counter()
        run()
        if i:
            times.append(time.perf_counter() - start)
    return statistics.median(times)


def with_targets(observation: Observation, tokens: int) -> Observation:
    """All but `tokens` of the text as prompt, so that there is room to write them into the text."""
    mask = np.arange(observation.tokenized_prompt.shape[1]) < observation.tokenized_prompt.shape[1] - tokens
    mask = np.tile(mask, (len(observation.tokenized_prompt), 1))
    return dataclasses.replace(observation, tokenized_prompt_mask=mask, token_ar_mask=None, token_loss_mask=None)


def anew(sample: Callable[[Observation, int], np.ndarray], observation: Observation, tokens: int) -> None:
    """Decode without a cache: each token by a pass over all before it, which is what decoding one token does.

    (Positions are those of a prompt, without the one that decoding skips: as much work.)
    """
    start = int(observation.tokenized_prompt_mask[0].sum())
    for i in range(start, start + tokens):
        token = sample(observation, 1)
        prompt, mask = observation.tokenized_prompt.copy(), observation.tokenized_prompt_mask.copy()
        prompt[:, i : i + 1], mask[:, i] = token, True
        observation = dataclasses.replace(observation, tokenized_prompt=prompt, tokenized_prompt_mask=mask)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="compute dtype")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()

    config = MID_SIZE.with_runtime(dtype=args.dtype)
    in_jax = jax.jit(lambda: pi0_jax.Pi0Fast(config, rngs=nnx.Rngs(0)))()
    ours = {name: Tensor.of(np.asarray(value)) for name, value in parameters_of(in_jax).items()}
    theirs = LAYOUTS["pi0_torch"].from_ours(config, ours)
    in_torch = with_parameters(config, {name: to_torch(tensor.read(())) for name, tensor in theirs.items()})
    assert isinstance(in_torch, pi0_torch.Pi0Fast)
    jitted = jax.jit(pi0_jax.Pi0Fast.sample_tokens, static_argnames="max_decoding_steps")

    def sample_jax(observation: Observation, tokens: int) -> np.ndarray:
        return np.asarray(jitted(in_jax, observation, max_decoding_steps=tokens, eos_token=jnp.int32(-1)))

    def sample_torch(observation: Observation, tokens: int) -> np.ndarray:
        return in_torch.sample_tokens(pi0_torch.to_device(observation), tokens, eos_token=-1).numpy()

    count = sum(p.numel() for p in in_torch.parameters())
    print(f"pi0_fast, {count / 1e6:.0f} M parameters, {args.dtype}, prefix of {config.prefix_len} tokens, ", end="")
    print(f"{args.tokens} decoded, {torch.get_num_threads()} threads, median of {args.repeats} calls\n")
    print(f"{'tokens/s':<10}{'batch':>6}{'cached':>10}{'uncached':>10}{'cached / uncached':>20}")
    for batch in args.batch:
        observation = with_targets(Inputs.random(config, batch).observation, args.tokens)
        for name, sample in (("JAX", sample_jax), ("PyTorch", sample_torch)):
            cached = seconds(partial(sample, observation, args.tokens), args.repeats)
            uncached = seconds(partial(anew, sample, observation, FEW), args.repeats)
            rates = batch * args.tokens / cached, batch * FEW / uncached
            print(f"{name:<10}{batch:>6}{rates[0]:>10.1f}{rates[1]:>10.1f}{rates[0] / rates[1]:>20.1f}", flush=True)


if __name__ == "__main__":
    main()
