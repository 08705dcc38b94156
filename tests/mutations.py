"""Attack the proof of parity: planted faults, one at a time, each of which it must find, at the stage that it is in.

    python tests/mutations.py

A fault is in the weights, in the code of PyTorch's model, or in that of JAX's (`tests/faults`); the other side is as it
should be. Faults that change no function are listed as equivalent, with the reason. `tests/pairs.py` has correct pairs.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
import time
from functools import cache
from pathlib import Path
from unittest.mock import patch

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))

import jax

from convert.checkpoints import Checkpoint
from convert.layouts.registry import LAYOUTS
from convert.tensors import Tensor
from pi0 import numerics
from pi0.assets import Assets
from pi0.config import ModelConfig
from pi0.variants import get_variant
from pi0_eval.parity.compare import errors
from pi0_eval.parity.frameworks import FRAMEWORKS, Results, exact_matmuls, jax_program
from pi0_eval.parity.inputs import Inputs
from pi0_eval.parity.report import PROOF
from pi0_eval.parity.sides import Side
from tests.faults import forward, gradients, sampling, weights
from tests.faults.mutation import RECIPE, STEPS, VARIANTS, Mutation, Weights
from tests.pairs import random_weights

TOKENS = 6  # of π0-FAST
FAMILIES = {
    "weights": (weights.weight_mutations, weights.constants),
    "forward": (forward.torch_code, forward.jax_code),
    "gradients": (gradients.torch_gradients, gradients.jax_gradients),
    "sampling": (sampling.torch_samplers, sampling.jax_samplers, sampling.decoding),
    "recipe": (sampling.recipe,),
}


def mutations(variant: str, families: tuple[str, ...] = tuple(FAMILIES)) -> list[Mutation]:
    """All of a variant; π0.5's recipe has weights and forward pass in common with π0.5."""
    shared = ("weights", "forward") if variant == RECIPE else ()
    chosen = [make for family in families if family not in shared for make in FAMILIES[family]]
    return [m for make in chosen for m in make(variant)]


def config_of(variant: str) -> ModelConfig:
    return get_variant(variant.partition(",")[0], remat="none").with_runtime(dtype="float64")


def weights_of(variant: str) -> Weights:
    """Random weights, of which π0-FAST and the recipe write the token that ends a text: the likeliest in some rows."""
    found = random_weights(config_of(variant))
    if variant in ("tiny_pi0_fast", RECIPE):
        found["paligemma.embedding"][numerics.EOS_TOKEN] *= 10
    return found


def compute(variant: str, side: Side, weights: Weights, gradients: bool = False) -> Results:
    """The results of a model with these weights, in float64."""
    config, ours = config_of(variant), {name: Tensor.of(value) for name, value in weights.items()}
    assets = Assets(config, subtasks=variant == RECIPE)
    checkpoint = Checkpoint(Path("memory"), LAYOUTS["pi0_jax"], assets, ours)
    inputs = Inputs.random(config, batch=3, seed=1, subtasks=assets.subtasks)
    steps = TOKENS if config.family.action_tokens else STEPS
    with exact_matmuls():
        return FRAMEWORKS[side.framework or ""](checkpoint, config, inputs, steps, gradients, side)


@cache
def reference(variant: str, framework: str) -> Results:
    """The results without a fault."""
    return compute(variant, Side(framework), weights_of(variant), gradients=True)


def first_to_part(mutation: Mutation) -> str | None:
    """The first stage that the proof finds, or None: the faulty side against the other framework."""
    other = reference(mutation.variant, "torch" if mutation.framework == "jax" else "jax")
    edited = mutation.weights(weights_of(mutation.variant))
    side = Side(mutation.framework, "sampler" if mutation.sampler else "plain")
    with contextlib.ExitStack() as stack:
        for target, name, value in mutation.patches:
            stack.enter_context(patch.object(target, name, value))
        if mutation.framework == "jax":
            for clear in (jax_program.cache_clear, jax.clear_caches):
                clear()
                stack.callback(clear)
        found = compute(mutation.variant, side, edited, mutation.gradients)
    return next((stage for stage, error in errors(other, found, "float64").items() if not error <= PROOF), None)


def verdict(mutation: Mutation) -> str:
    """ "ok", or what is wrong with what was found."""
    found = first_to_part(mutation)
    expected = mutation.first or (None,)
    return "ok" if found in expected else f"{mutation}: {found} is found first, not {' or '.join(map(str, expected))}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--variants", nargs="+", default=VARIANTS, choices=VARIANTS)
    parser.add_argument("--families", nargs="+", default=tuple(FAMILIES), choices=FAMILIES)
    parser.add_argument("--framework", choices=("jax", "torch"), help="only faults of this one (default: both)")
    args = parser.parse_args()
    started = time.perf_counter()
    total = equivalent = wrong = 0
    for variant in args.variants:
        for mutation in mutations(variant, tuple(args.families)):
            if args.framework not in (None, mutation.framework):
                continue
            total, equivalent = total + 1, equivalent + (not mutation.first)
            if (line := verdict(mutation)) != "ok":
                wrong += 1
                print(line, flush=True)
            elif not mutation.first:
                print(f"equivalent: {mutation}", flush=True)
        print(f"{time.perf_counter() - started:6.0f} s  {variant}: {total} faults so far, {wrong} wrong", flush=True)
    print(f"{total} faults, {equivalent} of them equivalent; {wrong} not found, or at another stage")
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
