"""Attack the proof of parity: planted faults, one at a time, each of which it must find, at the stage that it is in.

    python tests/mutations.py --out faults.jsonl

A fault is in the weights, in the code of PyTorch's model, or in that of JAX's (`tests/faults`); the other side is as it
should be. Faults that change no function are listed as equivalent, with the reason. The lines of `--out` are kept: the
same command goes on where it was stopped, and tries again what was wrong. `tests/pairs.py` has correct pairs.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import itertools
import json
import sys
import time
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path
from typing import Any
from unittest.mock import patch

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))

import jax
import numpy as np

from convert.checkpoints import Checkpoint
from convert.layouts.registry import LAYOUTS
from convert.tensors import Tensor
from pi0 import numerics
from pi0.assets import Assets
from pi0.config import PROOF_DTYPE, ModelConfig
from pi0.parameters import parameters
from pi0.variants import get_variant
from pi0_eval.parity.compare import errors, judge
from pi0_eval.parity.frameworks import FRAMEWORKS, Results, exact_matmuls, jax_program
from pi0_eval.parity.inputs import Inputs
from pi0_eval.parity.report import PROOF
from pi0_eval.parity.sides import Side
from tests.faults import forward, gradients, lora, rounding, sampling, weights
from tests.faults.mutation import RECIPE, STEPS, VARIANTS, Mutation, Weights
from tests.pairs import near_initial, random_weights

Line = dict[str, Any]
TOKENS = 6  # of π0-FAST
FAMILIES = {
    "weights": (weights.weight_mutations, weights.constants),
    "forward": (forward.torch_code, forward.jax_code),
    "gradients": (gradients.torch_gradients, gradients.jax_gradients),
    "sampling": (sampling.torch_samplers, sampling.jax_samplers, sampling.decoding),
    "recipe": (sampling.recipe,),
    "lora": (lora.lora,),
    "rounding": (rounding.places, rounding.code),
}


def mutations(variant: str, families: tuple[str, ...] = tuple(FAMILIES)) -> list[Mutation]:
    """All of a variant; π0.5's recipe has weights and forward pass in common with π0.5."""
    shared = ("weights", "forward", "rounding") if variant == RECIPE else ()
    chosen = [make for family in families if family not in shared for make in FAMILIES[family]]
    return [m for make in chosen for m in make(variant)]


def config_of(variant: str) -> ModelConfig:
    return get_variant(variant.partition(",")[0], remat="none")


def weights_of(variant: str, initial: bool = False) -> Weights:
    """Random weights, of which π0-FAST and the recipe write the token that ends a text: the likeliest in some rows.

    `initial`: of the size that training starts from instead, which let fewer roundings fall otherwise.
    """
    if initial:
        rng = np.random.default_rng(0)
        return {name: near_initial(name, p, rng) for name, p in parameters(config_of(variant)).items()}
    found = random_weights(config_of(variant))
    if variant in ("tiny_pi0_fast", RECIPE):
        found["paligemma.embedding"][numerics.EOS_TOKEN] *= 10
    return found


def compute(variant: str, side: Side, weights: Weights, gradients: bool = False, dtype: str = PROOF_DTYPE) -> Results:
    """The results of a model with these weights."""
    config = config_of(variant).with_runtime(dtype=dtype)
    ours = {name: Tensor.of(value) for name, value in weights.items()}
    assets = Assets(config, subtasks=variant == RECIPE)
    checkpoint = Checkpoint(Path("memory"), LAYOUTS["pi0_jax"], assets, ours)
    inputs = Inputs.random(config, batch=3, seed=1, subtasks=assets.subtasks)
    steps = TOKENS if config.family.action_tokens else STEPS
    with exact_matmuls():
        return FRAMEWORKS[side.framework or ""](checkpoint, config, inputs, steps, gradients, side)


@cache
def reference(variant: str, framework: str, dtype: str = PROOF_DTYPE, initial: bool = False) -> Results:
    """The results without a fault."""
    return compute(variant, Side(framework), weights_of(variant, initial), dtype == PROOF_DTYPE, dtype)


def first_to_part(mutation: Mutation) -> str | None:
    """The first stage that is found, or None: the faulty side against the other framework.

    It is the proof's; of a fault of rounding the budget's, or else one whose bits differ.
    """
    dtypes, initial = (PROOF_DTYPE, "bfloat16")[: 1 + mutation.rounding], mutation.rounding
    other = "torch" if mutation.framework == "jax" else "jax"
    right = [reference(mutation.variant, other, dtype, initial) for dtype in dtypes]
    edited = mutation.weights(weights_of(mutation.variant, initial))
    side = Side(mutation.framework, "sampler" if mutation.sampler else "plain")
    with contextlib.ExitStack() as stack:
        for target, name, value in mutation.patches:
            stack.enter_context(patch.object(target, name, value))
        if mutation.framework == "jax":
            for clear in (jax_program.cache_clear, jax.clear_caches):
                clear()
                stack.callback(clear)
        found = [compute(mutation.variant, side, edited, mutation.gradients, dtype) for dtype in dtypes]
    apart = errors(right[0], found[0], PROOF_DTYPE)
    first = next((stage for stage, error in apart.items() if not error <= PROOF), None)
    if first or not mutation.rounding:
        return first
    rows = judge(dataclasses.replace(right[0], gradients={}), found[0], right[1], found[1], *dtypes[1:] * 2)
    return next((row.stage for row in rows if not row.passed), None) or rounding.other_bits(right[1], found[1])


def verdict(mutation: Mutation) -> str:
    """ "ok", or what is wrong with what was found."""
    found = first_to_part(mutation)
    expected = mutation.first or (None,)
    return "ok" if found in expected else f"{mutation}: {found} is found first, not {' or '.join(map(str, expected))}"


def line_of(mutation: Mutation, family: str) -> Line:
    """What a fault gives; one that raises an exception is not found, but broken."""
    started = time.process_time()
    try:
        found = verdict(mutation)
    except Exception as error:
        found = f"{mutation}: {type(error).__name__}: {error}"
    line = {"fault": str(mutation), "family": family, "equivalent": not mutation.first, "verdict": found}
    return line | {"cpu": round(time.process_time() - started, 2)}


def results(
    variants: Iterable[str], families: Iterable[str], framework: str | None = None, out: Path | None = None
) -> Iterator[Line]:
    """A line of each fault; where `out` has an "ok" of it, that one."""
    lines = [json.loads(line) for line in out.read_text().splitlines()] if out and out.exists() else []
    done = {line["fault"]: line for line in lines if line["verdict"] == "ok"}
    for variant, family in itertools.product(variants, families):
        for mutation in mutations(variant, (family,)):
            if framework not in (None, mutation.framework):
                continue
            if (line := done.get(str(mutation))) is None:
                line = line_of(mutation, family)
                if out:
                    with out.open("a") as file:
                        file.write(json.dumps(line, ensure_ascii=False) + "\n")
            yield line


def table(lines: list[Line]) -> str:
    """Faults, those of them that are equivalent, those that are wrong, and CPU seconds, by family."""
    rows = [f"{'':<10}{'faults':>8}{'equivalent':>12}{'wrong':>8}{'CPU s':>8}"]
    for family in [*FAMILIES, "all"]:
        some = [line for line in lines if family in (line["family"], "all")]
        wrong = sum(line["verdict"] != "ok" for line in some)
        figures = f"{len(some):>8}{sum(line['equivalent'] for line in some):>12}{wrong:>8}"
        rows += [f"{family:<10}{figures}{sum(line['cpu'] for line in some):>8.0f}"] * bool(some)
    return "\n".join(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--variants", nargs="+", default=VARIANTS, choices=VARIANTS)
    parser.add_argument("--families", nargs="+", default=tuple(FAMILIES), choices=FAMILIES)
    parser.add_argument("--framework", choices=("jax", "torch"), help="only faults of this one (default: both)")
    parser.add_argument("--out", type=Path, help="keep a line for each fault in this file, and go on from there")
    args = parser.parse_args()
    started, lines = time.perf_counter(), []
    for line in results(args.variants, args.families, args.framework, args.out):
        lines.append(line)
        if line["verdict"] != "ok":
            print(line["verdict"], flush=True)
        elif line["equivalent"]:
            print(f"equivalent: {line['fault']}", flush=True)
        if len(lines) % 100 == 0:
            print(f"{time.perf_counter() - started:6.0f} s  {len(lines)} faults", flush=True)
    print(table(lines))
    wrong = sum(line["verdict"] != "ok" for line in lines)
    print(f"{len(lines)} faults; {wrong} not found, or at another stage")
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
