"""Train two checkpoints for a few steps, in either framework, on the same batches: `compare_training`.

After each step, loss and gradient norm, every trained parameter, its moments and its moving average are compared.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from convert.checkpoints import Checkpoint, open_checkpoint
from convert.layouts.registry import LAYOUTS
from convert.tensors import Tensor
from convert.training_state import in_layout
from pi0.config import ModelConfig
from pi0.run_config import DataConfig, RecipeConfig, RunConfig
from pi0.training.draws import Batch, Draws
from pi0_eval.parity.compare import common_config, framework_of
from pi0_eval.parity.frameworks import exact_matmuls
from pi0_eval.parity.inputs import Inputs, ParityError

TOLERANCE = 1e-5  # relative, of scalars, and of each tensor's L2 norm
# Moments have the rounding of gradients, which float32 amplifies on some batches: at 58 M parameters with LoRA each
# framework's gradient is up to 1.5e-5 from float64's, so that two are up to 3e-5 apart, and their squares 6e-5.
# Gradients themselves are judged against float64, by `pi0-parity`.
MOMENTS = {"mu": 3e-5, "nu": 6e-5, "trace": 3e-5}
# Tensors with a norm below this fraction of all of their group are measured relative to that fraction of it.
FLOOR = 1e-4
# Adam divides by the size of a gradient, and makes steps of one that is rounding alone: those whose moment is below
# this fraction of all are not compared. SigLIP's key bias has no gradient in exact arithmetic.
NOISE = 1e-7
COMPARED = ("loss", "grad_norm")


class Step(NamedTuple):
    """What is there after a step: scalars, and tensors by group (params, ema, mu, nu or trace) and our names."""

    scalars: dict[str, float]
    tensors: dict[str, dict[str, np.ndarray]]


class Difference(NamedTuple):
    """How far a scalar or a tensor is apart after a step, relative."""

    step: int
    name: str
    value: float


@dataclasses.dataclass(frozen=True)
class TrainingReport:
    """A comparison: the largest difference of each step in each group, and the first one out of tolerance."""

    a: str
    b: str
    rows: list[dict[str, Difference]]
    first: Difference | None

    @property
    def passed(self) -> bool:
        """Whether all are within tolerance."""
        return self.first is None

    def table(self) -> str:
        """The report as text."""
        groups = list(self.rows[0])
        lines = [f"A = {self.a}", f"B = {self.b}", "", f"{'step':>4}  " + "  ".join(f"{g:>9}" for g in groups)]
        for i, row in enumerate(self.rows):
            lines.append(f"{i + 1:>4}  " + "  ".join(f"{row[g].value:>9.2e}" for g in groups))
        verdict = (
            f"PASSED: after {len(self.rows)} steps all are within {TOLERANCE:g}, moments {max(MOMENTS.values()):g}"
        )
        if self.first is not None:
            step, name, value = self.first
            verdict = f"FAILED: after step {step}, {name} is apart by {value:.2e}; {allowed(name):g} is allowed"
        return "\n".join([*lines, "", verdict])

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        rows = [{group: list(difference) for group, difference in row.items()} for row in self.rows]
        first = None if self.first is None else list(self.first)
        return {"a": self.a, "b": self.b, "passed": self.passed, "steps": rows, "first": first}


def compare_training(
    a: str | Path,
    b: str | Path,
    steps: int,
    *,
    framework_a: str | None = None,
    framework_b: str | None = None,
    config: RunConfig | None = None,
    batch: int = 2,
    seed: int = 0,
    progress: Callable[[str], None] = lambda line: None,
) -> TrainingReport:
    """Train two checkpoints for `steps` on the same random batches of `batch` rows, in float32.

    `config` is that of the run (default: the config that A was trained with, or else the default one), with its
    optimizer, losses and what is frozen. The frameworks are by default those of the checkpoints' file formats. Raises
    ParityError for different models.
    """
    checkpoints = open_checkpoint(a), open_checkpoint(b)
    common_config(*(checkpoint.assets for checkpoint in checkpoints))
    config = run_config(checkpoints[0]) if config is None else config
    batches = random_batches(config, steps, batch, seed)
    sides = []
    for checkpoint, framework in zip(checkpoints, (framework_a, framework_b), strict=True):
        framework = framework or framework_of(checkpoint)
        sides.append((framework, RUNS[framework](config, checkpoint.ours, batches)))
    named = [f"{checkpoint.folder} ({name})" for checkpoint, (name, _) in zip(checkpoints, sides, strict=True)]
    return compare_steps(named[0], named[1], sides[0][1], sides[1][1], progress)


def run_config(checkpoint: Checkpoint) -> RunConfig:
    """The config of a run from a checkpoint: that of its training, or the default one, in float32, of one process."""
    assets = checkpoint.assets
    model = assets.model.with_runtime(dtype="float32", remat="none")
    if assets.training is not None:
        trained = RunConfig.from_dict(assets.training)
        config = dataclasses.replace(trained, model=model, param_dtype="float32", frozen_dtype="float32", accumulate=1)
        return dataclasses.replace(config, optimizer=dataclasses.replace(config.optimizer, moments_dtype="float32"))
    data = DataConfig("none", "none", action_tokenizer="none" if assets.subtasks else "")
    return RunConfig(model, data, recipe=RecipeConfig() if assets.subtasks else None)


def random_batches(config: RunConfig, steps: int, rows: int, seed: int) -> list[Batch]:
    """A random batch for each step."""
    draws, text = Draws(config.model, seed, config.rtc), config.recipe is not None
    batches = []
    for step in range(steps):
        inputs = Inputs.random(config.model, rows, seed * 1000 + step, text)
        batches.append((inputs.observation, inputs.actions, draws(step * rows + np.arange(rows))))
    return batches


def steps_in_jax(config: RunConfig, ours: Mapping[str, Tensor], batches: Sequence[Batch]) -> Iterator[Step]:
    """Train in JAX."""
    import jax
    import optax

    from pi0_jax.loading import flatten, unflatten
    from pi0_jax.training.optimizer import make_optimizer, make_schedule
    from pi0_jax.training.train import init_state, train_step

    optimizer = make_optimizer(config.optimizer, make_schedule(config.optimizer, config.steps))
    state = init_state(config, optimizer, unflatten({name: t.read(()) for name, t in ours.items()}))
    step = jax.jit(functools.partial(train_step, config, optimizer))
    for batch in batches:
        with exact_matmuls():
            state, scalars = step(state, batch)
        found = {"params": state["params"], "ema": state["ema"]}
        found |= {name: optax.tree.get(state["opt_state"], name) for name in ("mu", "nu", "trace")}
        tensors = {
            group: {name: np.asarray(x) for name, x in flatten(tree).items()} for group, tree in found.items() if tree
        }
        yield Step({name: float(value) for name, value in scalars.items()}, tensors)


def steps_in_torch(config: RunConfig, ours: Mapping[str, Tensor], batches: Sequence[Batch]) -> Iterator[Step]:
    """Train in PyTorch."""
    import torch

    from pi0_torch.loading import map_tensors, parameters_of
    from pi0_torch.training.optimizer import make_optimizer, make_schedule
    from pi0_torch.training.train import fill, init_state, mean_loss, train_step

    optimizer = make_optimizer(config.optimizer, make_schedule(config.optimizer, config.steps))
    root, state = init_state(config, optimizer, None, torch.device("cpu"))
    fill(state, LAYOUTS["pi0_torch"].from_ours(config.model, ours), root)
    step = functools.partial(train_step, config, optimizer, root, functools.partial(root, mean_loss), None)
    for batch in batches:
        with exact_matmuls():
            scalars = step(state, map_tensors(torch.as_tensor, batch))
        found = {"params": state["params"], "ema": state["ema"], **state["opt_state"]}
        tensors = {
            group: in_our_names(config.model, parameters_of(map_tensors(torch.clone, found[group])))
            for group in ("params", "ema", "mu", "nu", "trace")
            if found.get(group)
        }
        yield Step({name: float(value) for name, value in scalars.items()}, tensors)


def in_our_names(model: ModelConfig, tensors: Mapping[str, Tensor]) -> dict[str, np.ndarray]:
    """Tensors of any shape of some parameters of a model in PyTorch, by our names."""
    ours = in_layout(model, tensors, LAYOUTS["pi0_torch"], LAYOUTS["pi0_jax"])
    return {name.replace("/", "."): tensor.read(()) for name, tensor in ours.items()}


RUNS: dict[str, Callable[[RunConfig, Mapping[str, Tensor], Sequence[Batch]], Iterator[Step]]] = {
    "jax": steps_in_jax,
    "torch": steps_in_torch,
}


def compare_steps(
    a: str,
    b: str,
    steps_a: Iterator[Step],
    steps_b: Iterator[Step],
    progress: Callable[[str], None] = lambda line: None,
) -> TrainingReport:
    """Compare two trainings, step by step; the one ends with the other."""
    rows: list[dict[str, Difference]] = []
    first: Difference | None = None
    for number, (one, other) in enumerate(zip(steps_a, steps_b, strict=True), 1):
        differences = list(step_differences(number, one, other))
        if first is None:
            first = next((d for d in differences if not d.value <= allowed(d.name)), None)
        row: dict[str, Difference] = {}
        for difference in differences:
            group = difference.name.partition("/")[0]
            if group not in row or not difference.value <= row[group].value:
                row[group] = difference
        rows.append(row)
        progress(f"step {number}: loss {one.scalars['loss']:.6f} and {other.scalars['loss']:.6f}")
    return TrainingReport(a, b, rows, first)


def step_differences(number: int, a: Step, b: Step) -> Iterator[Difference]:
    """How far all that is compared after a step is apart, in the order of computation.

    Raises ParityError where the parameters are not the same ones.
    """
    for name in COMPARED:
        first, second = a.scalars[name], b.scalars[name]
        yield Difference(number, name, abs(first - second) / max(abs(first), 1e-30))
    noisy = _noise(a.tensors) & _noise(b.tensors)
    for group in sorted(a.tensors, key=["mu", "nu", "trace", "params", "ema"].index):
        if a.tensors[group].keys() != b.tensors[group].keys():
            raise ParityError(f"{group} is of different parameters")
        whole = _norm(a.tensors[group].values())
        for name, one in a.tensors[group].items():
            if name not in noisy:
                apart = _norm([one.astype(np.float64) - b.tensors[group][name]])
                yield Difference(number, f"{group}/{name}", apart / max(_norm([one]), FLOOR * whole, 1e-30))


def allowed(name: str) -> float:
    """How far a scalar or a tensor, by its name with its group, may be apart."""
    return MOMENTS.get(name.partition("/")[0], TOLERANCE)


def _noise(tensors: Mapping[str, Mapping[str, np.ndarray]]) -> set[str]:
    """The parameters whose gradient is rounding alone."""
    moments = tensors.get("mu", tensors.get("trace", {}))
    whole = _norm(moments.values())
    return {name for name, moment in moments.items() if _norm([moment]) <= NOISE * whole}


def _norm(arrays: Any) -> float:
    return math.sqrt(sum(float(np.square(x.astype(np.float64)).sum()) for x in arrays))
