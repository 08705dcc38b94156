"""Compare two checkpoints stage by stage on the same inputs, in either framework: `compare`, `pi0-parity`.

Stages follow the computation, so that the first one out of tolerance is where the two part. Axes: B batch, L layers,
T action horizon, A action dim, D decoded tokens.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import gc
import json
import math
import os
import sys
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from convert.checkpoints import Checkpoint, open_checkpoint
from convert.layouts.registry import LAYOUTS
from pi0.command import output_path
from pi0.config import ModelConfig
from pi0.observation import Observation, check_actions
from pi0_eval.parity.html import to_html

FRAMEWORKS = ("jax", "torch")

# float32: relative L2 error by stage. Two correct implementations differ by rounding, about 1e-6 after a whole model;
# a wrong operation shows as 1e-3 or more. Actions accumulate over the steps but start from shared noise.
# Tokens are equal or not: the error is the share of them that differ.
FLOAT32_TOLERANCE = {"stage": 1e-5, "gradients": 1e-5, "actions": 3e-6, "tokens": 0.0}
# A gradient whose norm is under this share of the whole gradient's is measured against that share of it.
GRADIENT_FLOOR = 1e-4
# Under this share, in both, it is nothing but rounding, of which only the size can be compared: SigLIP's key bias has
# no gradient in exact arithmetic (a softmax does not see a constant), and about 1e-9 of the whole in float32.
GRADIENT_NOISE = {"float32": 1e-7, "bfloat16": 1e-4}


class ParityError(ValueError):
    """Two checkpoints that cannot be compared; the message says why."""


@dataclasses.dataclass(frozen=True)
class Inputs:
    """One batch that both models get: observation, actions and noise [B, T, A], flow time [B].

    π0-FAST reads the observation alone.
    """

    observation: Observation
    actions: np.ndarray
    noise: np.ndarray
    time: np.ndarray

    @classmethod
    def random(cls, config: ModelConfig, batch: int = 2, seed: int = 0) -> Inputs:
        """Random images, prompts of different lengths and, from the second row on, now and then a missing camera.

        π0-FAST misses no camera, and is to predict the end of each text.
        """
        rng = np.random.default_rng(seed)
        lengths = rng.integers(1, config.max_token_len + 1, batch)
        data: dict[str, np.ndarray] = {
            "state": rng.normal(size=(batch, config.action_dim)),
            "tokenized_prompt": rng.integers(0, config.vocab_size, (batch, config.max_token_len)),
            "tokenized_prompt_mask": np.arange(config.max_token_len) < lengths[:, None],
        }
        for i, key in enumerate(config.image_keys):
            data[f"image/{key}"] = rng.integers(0, 256, (batch, *config.image_resolution, 3), np.uint8)
            data[f"image_mask/{key}"] = (np.arange(batch) == 0) | (rng.random(batch) < 0.5) | (i == 0)
        if config.kind == "pi0_fast":
            for key in config.image_keys:
                data[f"image_mask/{key}"] = np.ones(batch, bool)
            wanted = np.arange(config.max_token_len) >= rng.integers(0, lengths)[:, None]
            data["token_loss_mask"] = wanted & data["tokenized_prompt_mask"]
            data["token_ar_mask"] = data["token_loss_mask"].astype(int)
        shape = (batch, config.action_horizon, config.action_dim)
        actions, noise = rng.normal(size=shape), rng.normal(size=shape)
        return cls(
            Observation.from_dict(data, config),
            actions.astype(np.float32),
            noise.astype(np.float32),
            rng.uniform(0.1, 0.9, batch).astype(np.float32),
        )

    @classmethod
    def load(cls, file: Path, config: ModelConfig) -> Inputs:
        """The inputs in an npz file: an observation's flat keys, `actions`, `noise`, `time`. Raises ParityError."""
        with np.load(file) as arrays:
            data = dict(arrays)
        missing = sorted({"actions", "noise", "time"} - data.keys())
        if missing:
            raise ParityError(f"{file} lacks {missing}; it needs an observation's keys, actions, noise and time")
        actions, noise, time = (data.pop(key) for key in ("actions", "noise", "time"))
        observation = Observation.from_dict(data, config)
        batch = len(observation.state)
        if time.shape != (batch,):
            raise ParityError(f"{file}: time has shape {list(time.shape)}, expected [{batch}]")
        return cls(
            observation,
            check_actions(actions, config, batch),
            check_actions(noise, config, batch),
            time.astype(np.float32),
        )

    def of_loss(self, config: ModelConfig) -> dict[str, np.ndarray]:
        """What the loss takes beside the observation."""
        names = () if config.kind == "pi0_fast" else ("actions", "noise", "time")
        return {name: getattr(self, name) for name in names}


@dataclasses.dataclass(frozen=True)
class Results:
    """What one model computed: `stages` by name, in order, and `gradients` of the mean loss by our parameter names."""

    stages: dict[str, np.ndarray]
    gradients: dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Row:
    """The error of one stage: the largest, relative to the largest value of A, and in relative L2 norm."""

    stage: str
    max_error: float
    l2_error: float
    tolerance: float

    @property
    def passed(self) -> bool:
        return self.l2_error <= self.tolerance  # NaN fails


@dataclasses.dataclass(frozen=True)
class Report:
    """The comparison of B against A, and the actions [B, T, A] that each sampled; None where they wrote tokens."""

    a: str
    b: str
    dtype: str
    rows: list[Row]
    actions_a: np.ndarray | None = dataclasses.field(repr=False, compare=False)
    actions_b: np.ndarray | None = dataclasses.field(repr=False, compare=False)

    @property
    def first_failure(self) -> Row | None:
        """The first stage out of tolerance, None where all are within."""
        return next((row for row in self.rows if not row.passed), None)

    @property
    def passed(self) -> bool:
        return self.first_failure is None

    def to_json(self) -> str:
        """All of it but the actions as JSON, for CI."""
        rows = [dataclasses.asdict(row) | {"passed": row.passed} for row in self.rows]
        first = None if self.passed else self.first_failure.stage  # type: ignore[union-attr]
        values = {"a": self.a, "b": self.b, "dtype": self.dtype, "passed": self.passed, "first_failure": first}
        return json.dumps(values | {"stages": rows}, indent=2)

    def table(self) -> str:
        """All of it as text."""
        width = max(len(row.stage) for row in self.rows)
        lines = [f"A  {self.a}", f"B  {self.b}", f"computed in {self.dtype}", ""]
        lines.append(f"{'stage':<{width}}  {'max error':>10}  {'rel. L2':>10}  {'tolerance':>10}")
        for row in self.rows:
            numbers = f"{row.max_error:10.2e}  {row.l2_error:10.2e}  {row.tolerance:10.2e}"
            lines.append(f"{row.stage:<{width}}  {numbers}  {'ok' if row.passed else 'OUT'}")
        failure = self.first_failure
        verdict = "PASSED: every stage is within tolerance"
        if failure is not None:
            verdict = (
                f"FAILED: the first stage out of tolerance is {failure.stage} "
                f"({failure.l2_error:.2e}, allowed {failure.tolerance:.2e})"
            )
        return "\n".join([*lines, "", verdict])


def compare(
    a: str | Path,
    b: str | Path,
    *,
    dtype: str = "float32",
    framework_a: str | None = None,
    framework_b: str | None = None,
    inputs: Inputs | Path | None = None,
    batch: int = 2,
    seed: int = 0,
    num_steps: int = 10,
    gradients: bool = True,
) -> Report:
    """Run two checkpoints on the same inputs (given, in an npz file, or random) and compare every stage.

    Each runs in its layout's framework, or in the one given. In float32 the tolerances are `FLOAT32_TOLERANCE`. In
    bfloat16 both also run in float32, and the two may be no further apart than independent rounding errors of the
    size of their own distances from float32 would put them: √(dA² + dB²). `num_steps` are Euler steps, or the tokens
    that π0-FAST decodes, which are compared in float32 only. Raises ParityError for models of different sizes.
    """
    checkpoints = open_checkpoint(a), open_checkpoint(b)
    config = _common_config(*checkpoints)
    if inputs is None:
        inputs = Inputs.random(config, batch, seed)
    elif not isinstance(inputs, Inputs):
        inputs = Inputs.load(inputs, config)
    frameworks = tuple(
        given or _framework_of(c) for given, c in zip((framework_a, framework_b), checkpoints, strict=True)
    )

    def run(i: int, dtype: str) -> Results:
        model = config.with_runtime(dtype=dtype)
        with exact_matmuls():
            runner = {"jax": run_jax, "torch": run_torch}[frameworks[i]]
            results = runner(checkpoints[i], model, inputs, num_steps, gradients)
        gc.collect()
        return results

    result_a, result_b = run(0, dtype), run(1, dtype)
    if dtype == "float32":
        tolerances = None
    else:
        own = [errors(run(i, "float32"), r, dtype) for i, r in enumerate((result_a, result_b))]
        tolerances = {
            stage: math.hypot(own[0][stage][1], own[1][stage][1]) + _float32_tolerance(stage) for stage in own[0]
        }
    rows = [
        Row(stage, *error, _float32_tolerance(stage) if tolerances is None else tolerances[stage])
        for stage, error in errors(result_a, result_b, dtype).items()
    ]
    names = [f"{c.folder} ({c.layout.name}, run in {f})" for c, f in zip(checkpoints, frameworks, strict=True)]
    return Report(names[0], names[1], dtype, rows, result_a.stages.get("actions"), result_b.stages.get("actions"))


def assert_parity(a: str | Path, b: str | Path, **options: Any) -> Report:
    """`compare`, raising AssertionError with the whole table where a stage is out of tolerance; for pytest."""
    report = compare(a, b, **options)
    assert report.passed, "\n" + report.table()
    return report


def errors(a: Results, b: Results, dtype: str = "float32") -> dict[str, tuple[float, float]]:
    """Largest and relative L2 error of B against A: one entry per stage and layer, then gradients, then actions.

    Tokens are compared in float32 only: in bfloat16 a near tie may fall either way, and with it all that follows.
    """
    result = {}
    for stage, reference in a.stages.items():
        if stage not in ("actions", "tokens"):
            result[stage] = _error(reference, b.stages[stage])
    if a.gradients:
        result |= _gradient_errors(a.gradients, b.gradients, GRADIENT_NOISE[dtype])
    if "actions" in a.stages:
        result["actions"] = _error(a.stages["actions"], b.stages["actions"])
    elif dtype == "float32":
        different = float((a.stages["tokens"] != b.stages["tokens"]).mean())
        result["tokens"] = (different, different)
    return result


def _gradient_errors(
    a: Mapping[str, np.ndarray], b: Mapping[str, np.ndarray], noise: float
) -> dict[str, tuple[float, float]]:
    """Of all parameters together, and of the worst one; one parameter at a time, since together they are large."""
    norm, largest = _norm([_norm(g) for g in a.values()]), max(float(np.abs(g).max()) for g in a.values())
    each = [
        _error(a[name], b[name], GRADIENT_FLOOR * largest, GRADIENT_FLOOR * norm)
        for name in a
        if max(_norm(a[name]), _norm(b[name])) > noise * norm
    ]
    differences = [(float(np.abs(d).max()), _norm(d)) for d in (b[n].astype(np.float64) - a[n] for n in a)]
    return {
        "gradients, all": (max(d[0] for d in differences) / largest, _norm([d[1] for d in differences]) / norm),
        "gradients, worst parameter": max(each, key=lambda error: error[1]),
    }


def _error(a: np.ndarray, b: np.ndarray, floor: float = 0.0, norm_floor: float = 0.0) -> tuple[float, float]:
    """Largest error against the largest value, and error against value in L2 norm; values are at least the floors."""
    a, difference = a.astype(np.float64), b.astype(np.float64) - a
    tiny = float(np.finfo(np.float64).tiny)
    largest = float(np.abs(difference).max()) / max(float(np.abs(a).max()), floor, tiny)
    return largest, _norm(difference) / max(_norm(a), norm_floor, tiny)


def _norm(x: ArrayLike) -> float:
    return float(np.linalg.norm(np.asarray(x, np.float64).ravel()))


def _float32_tolerance(stage: str) -> float:
    return FLOAT32_TOLERANCE.get(stage.split(",")[0], FLOAT32_TOLERANCE["stage"])


def _common_config(a: Checkpoint, b: Checkpoint) -> ModelConfig:
    """The config both share; where one of them has none of its own, the other's."""
    ours = a.assets.model
    theirs = b.assets.model
    theirs = dataclasses.replace(theirs, runtime=ours.runtime)
    if ours != theirs:
        ours_fields, theirs_fields = dataclasses.asdict(ours), dataclasses.asdict(theirs)
        different = [
            f"{name}: {value} against {theirs_fields[name]}"
            for name, value in ours_fields.items()
            if value != theirs_fields[name]
        ]
        raise ParityError("the two checkpoints are of different models:\n  " + "\n  ".join(different))
    return ours


def _framework_of(checkpoint: Checkpoint) -> str:
    return "torch" if checkpoint.layout.format == "safetensors" else "jax"


@contextlib.contextmanager
def exact_matmuls() -> Iterator[None]:
    """float32 matrix products without shortcuts, in whichever of the frameworks is installed."""
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(ImportError):
            import jax

            stack.enter_context(jax.default_matmul_precision("highest"))
        with contextlib.suppress(ImportError):
            import torch

            flags = (torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32)
            torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
            stack.callback(_restore_tf32, *flags)
        yield


def _restore_tf32(matmul: bool, cudnn: bool) -> None:
    import torch

    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = matmul, cudnn


def run_jax(checkpoint: Checkpoint, config: ModelConfig, inputs: Inputs, num_steps: int, gradients: bool) -> Results:
    """All stages of a checkpoint in JAX."""
    import jax
    import jax.numpy as jnp

    import pi0_jax
    from pi0_jax.loading import Model, parameters_of, with_parameters

    # XLA may leave out a rounding to bfloat16 and back; here it is to compute what the model says.
    @partial(jax.jit, compiler_options={"xla_allow_excess_precision": False})
    def stages_of(model: Model, observation: Observation, noise: jax.Array, of_loss: dict[str, Any]) -> Any:
        def mean_loss(model: Model) -> tuple[jax.Array, dict[str, jax.Array]]:
            stages: dict[str, jax.Array] = {}
            return model.compute_loss(observation, stages=stages, **of_loss).mean(), stages

        if gradients:
            gradient, stages = jax.grad(mean_loss, has_aux=True)(model)
        else:
            gradient, stages = None, mean_loss(model)[1]
        if isinstance(model, pi0_jax.Pi0Fast):
            return stages, gradient, model.sample_tokens(observation.prompt_only(), num_steps)
        return stages, gradient, model.sample_actions(observation, noise, num_steps)

    model = with_parameters(config, {name: jnp.asarray(t.read(())) for name, t in checkpoint.ours.items()})
    stages, gradient, sampled = stages_of(model, inputs.observation, inputs.noise, inputs.of_loss(config))
    gradients_by_name = {} if gradient is None else {n: np.asarray(g) for n, g in parameters_of(gradient).items()}
    return Results(_ordered({n: np.asarray(x) for n, x in stages.items()}, np.asarray(sampled)), gradients_by_name)


def run_torch(checkpoint: Checkpoint, config: ModelConfig, inputs: Inputs, num_steps: int, gradients: bool) -> Results:
    """All stages of a checkpoint in PyTorch."""
    import torch

    from pi0_torch import Pi0Fast, to_device
    from pi0_torch.loading import parameters_of, to_numpy, to_torch, with_parameters

    tensors = {name: to_torch(t.read(())) for name, t in checkpoint.in_layout("pi0_torch").items()}
    model = with_parameters(config, tensors)
    observation, noise = to_device(inputs.observation), torch.from_numpy(inputs.noise)
    of_loss: dict[str, Any] = {name: torch.from_numpy(array) for name, array in inputs.of_loss(config).items()}
    stages: dict[str, torch.Tensor] = {}
    by_name: dict[str, np.ndarray] = {}
    with torch.set_grad_enabled(gradients):
        loss = model.compute_loss(observation, stages=stages, **of_loss)
    if gradients:
        names, params = zip(*model.named_parameters(), strict=True)
        values = torch.autograd.grad(loss.mean(), params, materialize_grads=True)
        theirs = parameters_of(dict(zip(names, values, strict=True)))
        ours = LAYOUTS["pi0_torch"].to_ours(config, theirs)
        by_name = {name: tensor.read(()) for name, tensor in ours.items()}
    if isinstance(model, Pi0Fast):
        sampled = model.sample_tokens(observation.prompt_only(), num_steps)
    else:
        sampled = model.sample_actions(observation, noise, num_steps)
    arrays = {name: to_numpy(x) for name, x in stages.items()}
    return Results(_ordered(arrays, to_numpy(sampled)), by_name)


def _ordered(stages: dict[str, np.ndarray], sampled: np.ndarray) -> dict[str, np.ndarray]:
    """The stages in the order of computation, layers apart, and of the prefix only what is valid."""
    valid = stages["prefix_valid"]

    def layers(name: str, key: str, mask: np.ndarray | None = None) -> dict[str, np.ndarray]:
        return {f"{name} {i}": x if mask is None else x[mask] for i, x in enumerate(stages[key])}

    seen = {
        **layers("vision layer", "vision.layers"),
        "image tokens": stages["image_tokens"],
        "prefix tokens": stages["prefix_tokens"][valid],
    }
    if "logits" in stages:
        return {
            **seen,
            **layers("prefix layer", "prefix_layers", valid),
            "pre-logits": stages["pre_logits"][valid],
            "logits": stages["logits"][valid[:, -stages["logits"].shape[1] :]],
            "loss": stages["loss"],
            "tokens": sampled,
        }
    return {
        **seen,
        "suffix tokens": stages["suffix_tokens"],
        **layers("prefix layer", "prefix_layers", valid),
        **layers("suffix layer", "suffix_layers"),
        "prefix out": stages["prefix_out"][valid],
        "suffix out": stages["suffix_out"],
        "velocity": stages["velocity"],
        "loss": stages["loss"],
        "actions": sampled,
    }


def main(arguments: list[str] | None = None) -> None:
    """The command `pi0-parity`; exits with 1 where a stage is out of tolerance, with 2 where there is no report."""
    parser = argparse.ArgumentParser(
        prog="pi0-parity",
        description="Compare two checkpoints, in either framework, on the same inputs: every layer's output, "
        "velocity or logits, loss, gradients, and sampled actions or tokens. Names the first stage that is out of "
        "tolerance.",
        epilog="examples:\n"
        "  pi0-parity run/checkpoints/400 exported                 JAX against its PyTorch export\n"
        "  pi0-parity exported exported --framework-b jax          one checkpoint in both frameworks\n"
        "  pi0-parity A B --dtype bfloat16 --json parity.json      rounding errors in bfloat16, for CI\n\n"
        "In float32 each stage has a fixed tolerance. In bfloat16 both also run in float32, and the two may be no\n"
        "further apart than independent roundings would put them: sqrt(dA^2 + dB^2), d their distance from float32.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("a", help="the reference: a checkpoint's folder, gs:// or hf://")
    parser.add_argument("b", help="the checkpoint to compare with it")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="compute dtype")
    parser.add_argument("--framework-a", choices=FRAMEWORKS, help="run A in this framework (default: its layout's)")
    parser.add_argument("--framework-b", choices=FRAMEWORKS, help="run B in this framework (default: its layout's)")
    parser.add_argument("--inputs", type=Path, help="npz with an observation's keys, actions, noise, time")
    parser.add_argument("--batch", type=int, default=2, help="rows of random inputs (default 2)")
    parser.add_argument("--seed", type=int, default=0, help="seed of random inputs (default 0)")
    parser.add_argument("--steps", type=int, default=10, help="Euler steps, or tokens to decode (default 10)")
    parser.add_argument("--no-gradients", action="store_true", help="leave gradients out: half the memory and time")
    parser.add_argument("--json", type=output_path, help="write the report as JSON to this file")
    parser.add_argument(
        "--html", type=output_path, help="write the report as one HTML file, with pictures, to this file"
    )
    args = parser.parse_args(arguments)
    try:
        for file in filter(None, (args.json, args.html)):  # before the work, not after it
            file.parent.mkdir(parents=True, exist_ok=True)
        report = compare(
            args.a,
            args.b,
            dtype=args.dtype,
            framework_a=args.framework_a,
            framework_b=args.framework_b,
            inputs=args.inputs,
            batch=args.batch,
            seed=args.seed,
            num_steps=args.steps,
            gradients=not args.no_gradients,
        )
        print(report.table())
        if args.json:
            _write(args.json, report.to_json() + "\n")
        if args.html:
            _write(args.html, to_html(report))
    except (ValueError, OSError) as error:
        print(f"pi0-parity: {error}", file=sys.stderr)
        sys.exit(2)
    sys.exit(0 if report.passed else 1)


def _write(file: Path, text: str) -> None:
    """Write under a temporary name, then rename: a reader finds all of the file or none of it."""
    temporary = file.with_name(f".{file.name}.{os.getpid()}.partial")
    try:
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, file)
    finally:
        temporary.unlink(missing_ok=True)
