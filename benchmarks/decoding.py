"""Measure the tokens per second of π0-FAST in JAX and PyTorch, with and without a cache.

python benchmarks/decoding.py                  about 50 M parameters, float32, batch 1 and 4
python benchmarks/decoding.py --dtype bfloat16 --tokens 64
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import statistics
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from flax import nnx

import pi0_jax.loading
import pi0_torch.loading
from pi0.config import DTYPES
from pi0.observation import Observation
from pi0.parameters import parameters
from pi0.variants import get_variant
from pi0_eval.bench import times_ms
from pi0_eval.parity.inputs import Inputs

FEW = 4  # tokens decoded without a cache; all take the same time, since the text is padded
NO_TOKEN = -1  # as the end-of-sequence token, so that decoding does not end


def with_targets(observation: Observation, tokens: int) -> Observation:
    """The observation with room for `tokens` at the end of its text; the rest is the prompt."""
    mask = np.arange(observation.tokenized_prompt.shape[1]) < observation.tokenized_prompt.shape[1] - tokens
    mask = np.tile(mask, (len(observation.tokenized_prompt), 1))
    return dataclasses.replace(observation, tokenized_prompt_mask=mask, token_ar_mask=None, token_loss_mask=None)


def uncached(sample: Callable[[Observation, int], np.ndarray], observation: Observation, tokens: int) -> None:
    """Decode without a cache: each token by a pass over all tokens before it, as when decoding a single token.

    Positions are those of a prompt, without the one that decoding skips, which does not change the amount of work.
    """
    start = int(observation.tokenized_prompt_mask[0].sum())
    for i in range(start, start + tokens):
        token = sample(observation, 1)
        prompt, mask = observation.tokenized_prompt.copy(), observation.tokenized_prompt_mask.copy()
        prompt[:, i : i + 1], mask[:, i] = token, True
        observation = dataclasses.replace(observation, tokenized_prompt=prompt, tokenized_prompt_mask=mask)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="compute dtype")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()

    config = get_variant("bench_pi0_fast", image_resolution=(112, 112), max_token_len=128, dtype=args.dtype)
    in_jax: Any = jax.jit(lambda: pi0_jax.loading.make_model(config, rngs=nnx.Rngs(0)))()
    in_torch: Any = pi0_torch.loading.make_model(config).requires_grad_(False)
    jitted = jax.jit(type(in_jax).sample_tokens, static_argnames="max_decoding_steps")

    def sample_jax(observation: Observation, tokens: int) -> np.ndarray:
        return np.asarray(jitted(in_jax, observation, max_decoding_steps=tokens, eos_token=jnp.int32(NO_TOKEN)))

    def sample_torch(observation: Observation, tokens: int) -> np.ndarray:
        inputs = pi0_torch.loading.to_device(observation)
        return in_torch.sample_tokens(inputs, tokens, eos_token=NO_TOKEN).numpy()

    count = sum(math.prod(p.shape) for p in parameters(config).values())
    print(f"pi0_fast, {count / 1e6:.0f} M parameters, {args.dtype}, prefix of {config.prefix_len} tokens, ", end="")
    print(f"{args.tokens} decoded, {torch.get_num_threads()} threads, median of {args.repeats} calls\n")
    print(f"{'tokens/s':<10}{'batch':>6}{'cached':>10}{'uncached':>10}{'cached / uncached':>20}")
    for batch in args.batch:
        observation = with_targets(Inputs.random(config, batch).observation, args.tokens)
        for name, sample in (("JAX", sample_jax), ("PyTorch", sample_torch)):
            runs = partial(sample, observation, args.tokens), partial(uncached, sample, observation, FEW)
            with_cache, without = (statistics.median(times_ms(run, args.repeats)) / 1e3 for run in runs)
            rates = batch * args.tokens / with_cache, batch * FEW / without
            print(f"{name:<10}{batch:>6}{rates[0]:>10.1f}{rates[1]:>10.1f}{rates[0] / rates[1]:>20.1f}", flush=True)


if __name__ == "__main__":
    main()
