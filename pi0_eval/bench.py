"""Measure the speed of sampling, and of gradients, against the machine's roofline: `benchmark`, `pi0-bench`.

Every case runs in a process of its own, for its own peak memory, with random weights, on which speed does not depend.
The roofline of a stage is the time of its arithmetic at the speed of a large matrix product, or of reading its weights
and cache at the speed of a copy, whichever is longer; both speeds are measured in the same process.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import multiprocessing
import os
import resource
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import numpy as np

from pi0.command import exit_on_error, local_output_path, make_parser, output_path
from pi0.config import DTYPES, ModelConfig
from pi0.datasets.engine import end_with_parent
from pi0.quantization import FORMATS, WIDE
from pi0.storage import write_text
from pi0.variants import read_variant
from pi0_eval.parity.inputs import Inputs
from pi0_eval.random_models import jax_model, jax_sampler, random_inputs, torch_model, torch_sampler
from pi0_eval.roofline import costs

FRAMEWORKS, PATHS, BACKENDS = ("jax", "torch"), ("model", "sampler", "gradients"), ("sdpa", "flex", "flash", "eager")


@dataclasses.dataclass(frozen=True)
class Case:
    """One measurement.

    Attributes:
        path: "model" for `sample` of the model, "sampler" for that of the `Sampler`, "gradients" for those of the loss.
        backend: attention of PyTorch's sampler; empty for its default.
        compile: whether PyTorch's sampler is compiled; None for its default.
        steps: Euler steps, or decoded tokens of π0-FAST.
        repeats: number of timed calls.
        quantize: what PyTorch's sampler has its weights rounded to, a format of `pi0.quantization`; empty for nothing.
    """

    model: str
    framework: str
    path: str
    backend: str
    compile: bool | None
    dtype: str
    cameras: int
    batch: int
    steps: int
    repeats: int
    quantize: str = ""

    @property
    def config(self) -> ModelConfig:
        """The config of the case's model."""
        config = read_variant(self.model).with_runtime(dtype=self.dtype, remat="none")
        if config.family.masked_cameras:
            return config
        return dataclasses.replace(config, image_keys=config.image_keys[: self.cameras])

    @property
    def name(self) -> str:
        """What is measured, in words."""
        return " ".join(word for word in (self.framework, self.path, self.backend, self.quantize) if word)


@dataclasses.dataclass(frozen=True)
class Result:
    """Times of one case in milliseconds, memory in MiB, and the ceilings of the machine in FLOP/s and bytes/s.

    `first_ms` includes making the model and compilation. `stages_ms` has "vision", "prefix" and "step" of the sampler;
    of the model nothing, or for π0-FAST "prefix" (with vision) and "step".
    """

    case: Case
    device: str
    first_ms: float
    best_ms: float
    median_ms: float
    p99_ms: float
    stages_ms: dict[str, float]
    peak_mib: float
    flops: float
    bandwidth: float

    @property
    def tokens_per_second(self) -> float | None:
        """Decoded tokens of π0-FAST, summed over rows, without the prefix; None where none are."""
        decodes = self.case.config.family.action_tokens and "step" in self.stages_ms
        return 1e3 * self.case.batch / self.stages_ms["step"] if decodes else None


def roofline_ms(case: Case, flops: float, bandwidth: float) -> float:
    """The least time of one call on a machine with these ceilings; gradients cost twice as much as the loss."""
    times = {n: max(f / flops, b / bandwidth) for n, (f, b) in costs(case.config, case.cameras, case.batch).items()}
    if case.path == "gradients":  # no token is decoded, and no step repeated
        times, case = {n: 3 * t for n, t in times.items()}, dataclasses.replace(case, steps=1)
    return 1e3 * (times["vision"] + times["prefix"] + case.steps * times["step"])


@dataclasses.dataclass(frozen=True)
class Runs:
    """Blocking calls: the whole, up to the end of each stage, a matrix product and a copy."""

    device: str
    call: Callable[[], Any]
    until: dict[str, Callable[[], Any]]
    product: tuple[Callable[[], Any], float]  # and its floating-point operations
    copy: tuple[Callable[[], Any], float]  # and the bytes it reads and writes
    peak_mib: Callable[[], float]


def calls_of(
    case: Case,
    sample: Callable[[int], Callable[[], Any]],
    sampler: Callable[[], Any],
    gradients: Callable[[Inputs], Callable[[], Any]],
) -> tuple[Callable[[], Any], dict[str, Callable[[], Any]]]:
    """The call of a case and its stages: of the model, sampling `sample(steps)` or `gradients`, or of the sampler."""
    if case.path == "gradients":
        return gradients(Inputs.random(case.config, case.batch)), {}
    if case.path == "model":
        return sample(case.steps), {"prefix": sample(1)} if case.config.family.action_tokens else {}
    made, inputs = sampler(), random_inputs(case.config, case.cameras, case.batch)
    return lambda: made.sample(*inputs), made.stages(*inputs)


def product_shape(device: str) -> tuple[int, int, int]:
    """Rows, inner size and columns of a product that reaches the ceiling: large, but within the cache of a CPU."""
    return (1024, 1024, 1024) if device == "cpu" else (8192, 8192, 8192)


def jax_runs(case: Case) -> Runs:
    """The case in JAX."""
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # else the peak would be all memory
    import jax
    import jax.numpy as jnp

    config, device = case.config, jax.devices()[0]
    model = jax_model(config)

    def sample(steps: int) -> Callable[[], Any]:
        run = jax.jit(lambda model, observation, noise: model.sample(observation, noise, steps))
        inputs = random_inputs(config, case.cameras, case.batch)
        return lambda: run(model, *inputs)

    def gradients(inputs: Inputs) -> Callable[[], Any]:
        run = jax.jit(jax.grad(lambda model, *inputs: model.compute_loss(*inputs).mean()))
        return lambda: run(model, inputs.observation, inputs.actions, inputs.noise, inputs.time)

    call, until = calls_of(case, sample, lambda: jax_sampler(config, case.steps), gradients)
    rows, inner, columns = product_shape(device.platform)
    a, b = jnp.ones((rows, inner), case.dtype), jnp.ones((inner, columns), case.dtype)
    matmul, copy, big = jax.jit(jnp.matmul), jax.jit(lambda x: x + 1), jnp.ones(2**26, jnp.uint32)

    def wait(run: Callable[[], Any]) -> Callable[[], Any]:
        return lambda: jax.block_until_ready(run())

    def peak_mib() -> float:
        stats = device.memory_stats()
        return resident_mib() if not stats else stats["peak_bytes_in_use"] / 2**20

    return Runs(
        device.device_kind,
        wait(call),
        {name: wait(run) for name, run in until.items()},
        (wait(lambda: matmul(a, b)), 2 * rows * inner * columns),
        (wait(lambda: copy(big)), 2 * big.nbytes),
        peak_mib,
    )


def torch_runs(case: Case) -> Runs:
    """The case in PyTorch."""
    import torch

    from pi0_torch.loading import to_device

    config, model = case.config, torch_model(case.config)
    device: torch.device = model.paligemma.embedding.device
    dtype, cuda = getattr(torch, case.dtype), device.type == "cuda"

    def sample(steps: int) -> Callable[[], Any]:
        observation, noise = random_inputs(config, case.cameras, case.batch)
        inputs = to_device(observation, device), torch.from_numpy(noise).to(device)
        return lambda: model.sample(*inputs, steps)

    def gradients(inputs: Inputs) -> Callable[[], Any]:
        arrays = (torch.from_numpy(array).to(device) for array in (inputs.actions, inputs.noise, inputs.time))
        batch = to_device(inputs.observation, device), *arrays

        @torch.enable_grad()
        def run() -> None:
            model.zero_grad()
            model.requires_grad_().compute_loss(*batch).mean().backward()

        return run

    def sampler() -> Any:
        return torch_sampler(config, case.steps, case.backend or None, case.compile, case.quantize)

    call, until = calls_of(case, sample, sampler, gradients)
    rows, inner, columns = product_shape(device.type)
    a, b = torch.ones(rows, inner, dtype=dtype, device=device), torch.ones(columns, inner, dtype=dtype, device=device)
    big = torch.ones(2**26, dtype=torch.int32, device=device)

    def wait(run: Callable[[], Any]) -> Callable[[], Any]:
        def waiting() -> None:
            with torch.no_grad():
                run()
            if cuda:
                torch.cuda.synchronize()

        return waiting

    return Runs(
        torch.cuda.get_device_name() if cuda else "cpu",
        wait(call),
        {name: wait(run) for name, run in until.items()},
        (wait(lambda: torch.nn.functional.linear(a, b)), 2 * rows * inner * columns),
        (wait(big.clone), 2 * big.nbytes),
        lambda: torch.cuda.max_memory_allocated() / 2**20 if cuda else resident_mib(),
    )


def resident_mib() -> float:
    """The peak resident memory of this process."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


def runs_of(case: Case) -> Runs:
    """The calls of a case, in its framework."""
    return {"jax": jax_runs, "torch": torch_runs}[case.framework](case)


def measure(case: Case) -> Result:
    """Run one case in this process."""
    start = time.perf_counter()
    runs = runs_of(case)
    runs.call()
    return measure_runs(case, runs, 1e3 * (time.perf_counter() - start))


def measure_runs(case: Case, runs: Runs, first_ms: float) -> Result:
    """Time the calls of a case."""
    times = times_ms(runs.call, case.repeats)
    peak = runs.peak_mib()
    until = {name: statistics.median(times_ms(run, max(3, case.repeats // 3))) for name, run in runs.until.items()}
    median, stages, done = statistics.median(times), {}, 0.0
    for name, end in until.items():
        stages[name], done = end - done, end
    if stages:  # the first token is the prefix's
        stages["step"] = (median - done) / (case.steps - case.config.family.action_tokens)
    (product, operations), (copy, size) = runs.product, runs.copy
    return Result(
        case,
        runs.device,
        first_ms,
        min(times),
        median,
        float(np.quantile(times, 0.99)),
        stages,
        peak,
        1e3 * operations / min(times_ms(product, 20)),
        1e3 * size / min(times_ms(copy, 20)),
    )


def times_ms(run: Callable[[], Any], repeats: int) -> list[float]:
    """Wall times of calls in milliseconds, after two warm-up calls."""
    times = []
    for _ in range(repeats + 2):
        start = time.perf_counter()
        run()
        times.append(1e3 * (time.perf_counter() - start))
    return times[2:]


@dataclasses.dataclass(frozen=True)
class Report:
    """The results of one run. The ceilings of a dtype are the highest measured in any of its cases."""

    results: list[Result]

    def ceilings(self, dtype: str) -> tuple[float, float]:
        """Speed of a large matrix product in FLOP/s, and of a copy in bytes/s."""
        found = [r for r in self.results if r.case.dtype == dtype]
        return max(r.flops for r in found), max(r.bandwidth for r in found)

    def roofline_ms(self, result: Result) -> float:
        """The least time of a result's call on this machine, in milliseconds."""
        return roofline_ms(result.case, *self.ceilings(result.case.dtype))

    def to_json(self) -> str:
        """The results as a JSON list."""
        rows = []
        for result in self.results:
            least = self.roofline_ms(result)
            more = {"roofline_ms": least, "ratio": result.median_ms / least}
            rows.append(dataclasses.asdict(result) | more | {"tokens_per_second": result.tokens_per_second})
        return json.dumps(rows, indent=2)

    def table(self) -> str:
        """The report as text: a line per case, then the ceilings."""
        first = self.results[0]
        lines = [
            f"{first.device}, {first.case.steps} steps, {first.case.repeats} calls; milliseconds, stages by median",
            "",
            f"{'model':<12}{'':<20}{'dtype':<10}{'cameras':>7}{'batch':>6}{'best':>9}{'median':>9}{'p99':>9}"
            f"{'vision':>9}{'prefix':>9}{'step':>8}{'tokens/s':>10}{'MiB':>8}{'roofline':>10}{'ratio':>7}",
        ]
        for r in self.results:
            stages = [f"{r.stages_ms[n]:.1f}" if n in r.stages_ms else "" for n in ("vision", "prefix", "step")]
            rate = "" if r.tokens_per_second is None else f"{r.tokens_per_second:.1f}"
            least = self.roofline_ms(r)
            lines.append(
                f"{r.case.model:<12}{r.case.name:<20}{r.case.dtype:<10}{r.case.cameras:>7}{r.case.batch:>6}"
                f"{r.best_ms:>9.1f}{r.median_ms:>9.1f}{r.p99_ms:>9.1f}{stages[0]:>9}{stages[1]:>9}{stages[2]:>8}"
                f"{rate:>10}{r.peak_mib:>8.0f}{least:>10.1f}{r.median_ms / least:>7.1f}"
            )
        for dtype in dict.fromkeys(r.case.dtype for r in self.results):
            flops, bandwidth = self.ceilings(dtype)
            lines += ["", f"roofline in {dtype}: {flops / 1e9:.0f} GFLOP/s, {bandwidth / 1e9:.0f} GB/s"]
            for r in (r for r in self.results if r.case.dtype == dtype):
                lines.append(f"  {r.case.name:<20} reached {r.flops / 1e9:.0f} GFLOP/s, {r.bandwidth / 1e9:.0f} GB/s")
        return "\n".join(lines)


def benchmark(cases: Sequence[Case]) -> Report:
    """Measure the cases one after the other, each in a process of its own."""
    results = []
    for case in cases:
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), end_with_parent) as pool:
            results.append(pool.submit(measure, case).result())
    return Report(results)


@exit_on_error("pi0-bench")
def main(arguments: list[str] | None = None) -> None:
    """The command `pi0-bench`."""
    parser = make_parser(
        "pi0-bench",
        "Measure the time of sampling or gradients, with random weights, and compare it with the machine's roofline.",
        "examples:\n"
        "  pi0-bench                                                        58 M parameters, for a CPU\n"
        "  pi0-bench --model pi0 pi05 --dtype bfloat16 --cameras 1 2 3 --batch 1 8 32 --path sampler    for a GPU\n"
        "  pi0-bench --framework torch --backend sdpa flex --json bench.json --plot bench.png",
    )
    parser.add_argument("--model", nargs="+", default=["bench"], help="variants of pi0.variants, or JSON files")
    parser.add_argument("--framework", nargs="+", choices=FRAMEWORKS, default=list(FRAMEWORKS), help="default both")
    parser.add_argument("--path", nargs="+", choices=PATHS, default=list(PATHS[:2]), help="default model and sampler")
    parser.add_argument("--backend", nargs="+", choices=BACKENDS, help="attention of PyTorch's sampler")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, help="PyTorch's sampler (default: on GPUs)")
    formats = ["none", *(format for format in FORMATS if format != WIDE)]
    text = "weights of PyTorch's sampler (default none); the roofline stays that of the dtype"
    parser.add_argument("--quantize", nargs="+", choices=formats, default=["none"], help=text)
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=["float32"])
    parser.add_argument("--cameras", nargs="+", type=int, default=[3, 1], metavar="N")
    parser.add_argument("--batch", nargs="+", type=int, default=[1], metavar="N")
    parser.add_argument("--steps", type=int, default=10, help="Euler steps, or decoded tokens of π0-FAST (default 10)")
    parser.add_argument("--repeats", type=int, default=20, help="calls per case (default 20)")
    parser.add_argument("--json", type=output_path, help="write all numbers to this file")
    parser.add_argument("--plot", type=local_output_path, help="plot medians and rooflines to this PNG file")
    args = parser.parse_args(arguments)
    report = benchmark(cases_of(args))
    print(report.table())
    if args.json is not None:
        write_text(args.json, report.to_json() + "\n")
    if args.plot is not None:
        from pi0.plots import plot_latency

        label = "{0.model} {0.name}\n{0.dtype}, {0.cameras} cameras, batch {0.batch}".format
        plot_latency({label(r.case): (r.median_ms, report.roofline_ms(r)) for r in report.results}, args.plot)


def cases_of(args: argparse.Namespace) -> list[Case]:
    """All distinct combinations. Raises ValueError for impossible numbers, and for options without effect."""
    for name in ("cameras", "batch", "steps", "repeats"):
        values = getattr(args, name)
        for value in values if isinstance(values, list) else [values]:
            if value < 1:
                raise ValueError(f"--{name} is {value}; it must be at least 1")
    if (args.backend or args.compile is not None) and not ("torch" in args.framework and "sampler" in args.path):
        raise ValueError("--backend and --compile are for PyTorch's sampler: add --framework torch --path sampler")
    if args.quantize != ["none"] and not ("torch" in args.framework and "sampler" in args.path):
        raise ValueError("--quantize is for PyTorch's sampler: add --framework torch --path sampler")
    axes = (args.model, args.dtype, args.cameras, args.batch, args.framework, args.path, args.backend or [""])
    cases = []
    for model, dtype, cameras, batch, framework, path, backend, format in itertools.product(*axes, args.quantize):
        config = read_variant(model)
        if config.family.action_tokens and args.steps < 2:
            raise ValueError(f"--steps is {args.steps}; {model} decodes as many tokens, and the first is the prefix's")
        if cameras > len(config.image_keys):
            raise ValueError(f"--cameras is {cameras}; {model} has {len(config.image_keys)}")
        own = (backend, args.compile, format) if (framework, path) == ("torch", "sampler") else ("", None, "none")
        used, compiled, rounded = own
        case = Case(model, framework, path, used, compiled, dtype, cameras, batch, args.steps, args.repeats)
        cases.append(dataclasses.replace(case, quantize="" if rounded == "none" else rounded))
    return list(dict.fromkeys(cases))
