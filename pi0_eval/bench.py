"""How fast sampling is, and how near to what the machine allows: `benchmark`, `pi0-bench`.

Every case runs in a process of its own, so that none takes another's memory, with random weights: speed does not depend
on them. The roofline is the time that the arithmetic would take at the speed of one large matrix product, or reading
weights and cache at the speed of a copy, whichever is longer, of each stage; both speeds are measured in the same run.
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

from pi0.command import output_path
from pi0.config import DTYPES, GemmaConfig, ModelConfig
from pi0.observation import Observation
from pi0.policy.buckets import compact
from pi0.variants import read_variant

NO_TOKEN = -1  # for π0-FAST to go on to the last step
FRAMEWORKS, PATHS, BACKENDS = ("jax", "torch"), ("plain", "fast"), ("sdpa", "flex", "flash", "eager")
ITEM_SIZE = {"float32": 4, "bfloat16": 2}


@dataclasses.dataclass(frozen=True)
class Case:
    """What is measured: `path` "plain" is `sample_actions` of the model itself, "fast" the `Sampler`."""

    model: str
    framework: str
    path: str
    backend: str  # attention in PyTorch
    compile: bool | None  # of PyTorch's fast path; None: as the sampler decides
    dtype: str
    cameras: int
    batch: int
    steps: int  # of Euler, or tokens of π0-FAST
    repeats: int

    @property
    def config(self) -> ModelConfig:
        config = read_variant(self.model).with_runtime(dtype=self.dtype, remat="none")
        if config.kind == "pi0_fast":  # which takes no camera that is masked
            config = dataclasses.replace(config, image_keys=config.image_keys[: self.cameras])
        return config

    @property
    def name(self) -> str:
        return f"{self.framework} {self.path} {self.backend}".rstrip()


@dataclasses.dataclass(frozen=True)
class Result:
    """Times of one case in milliseconds, memory in MiB, and the ceilings it met in FLOP/s and bytes/s."""

    case: Case
    device: str
    first_ms: float  # load, compilation and first call
    best_ms: float
    median_ms: float
    p99_ms: float
    stages_ms: dict[str, float]  # vision, prefix (of π0-FAST: both, and a token), step; none of a plain flow
    peak_mib: float
    flops: float
    bandwidth: float

    @property
    def tokens_per_second(self) -> float | None:
        """Of π0-FAST, all rows together, once the prefix is read."""
        return 1e3 * self.case.batch / self.stages_ms["step"] if self.case.config.kind == "pi0_fast" else None


def costs(config: ModelConfig, cameras: int, batch: int) -> dict[str, tuple[float, float]]:
    """Floating-point operations, and bytes of weights and cache, that each stage cannot do without."""
    vision, gemma, expert = config.vision, config.paligemma, config.action_expert
    size, image = ITEM_SIZE[config.runtime.dtype], config.image_tokens
    prefix = cameras * image + config.max_token_len
    suffix = config.action_horizon + (config.kind == "pi0")
    outputs = 2 * config.action_dim
    if expert is None:  # a token, and the logits of the next
        expert, suffix, outputs = gemma, 1, config.vocab_size
    patches = 3 * vision.patch_size**2 * vision.width + vision.width * gemma.width
    tower = vision.depth * (4 * vision.width**2 + 2 * vision.width * vision.mlp_dim) + patches
    see = vision.depth * 4 * image**2 * vision.width
    last = gemma.width * 2 * gemma.num_kv_heads * gemma.head_dim
    read = (gemma.depth - 1) * _layer(gemma) + last
    attend = (gemma.depth - 1) * 4 * prefix**2 * gemma.num_heads * gemma.head_dim
    act = expert.depth * _layer(expert) + outputs * expert.width
    attend_cache = expert.depth * 4 * suffix * (prefix + suffix) * expert.num_heads * expert.head_dim
    cache = 2 * expert.depth * (prefix + suffix) * expert.num_kv_heads * expert.head_dim
    return {
        "vision": (batch * cameras * (2 * image * tower + see), size * tower * (cameras > 0)),
        "prefix": (batch * (2 * prefix * read + attend), size * read),
        "step": (batch * (2 * suffix * act + attend_cache), size * (act + batch * cache)),
    }


def _layer(gemma: GemmaConfig) -> int:
    """Parameters of one layer's projections."""
    heads = gemma.num_heads * gemma.head_dim
    return gemma.width * (2 * heads + 2 * gemma.num_kv_heads * gemma.head_dim) + 3 * gemma.width * gemma.mlp_dim


def roofline_ms(case: Case, flops: float, bandwidth: float) -> float:
    """The least time of one call on a machine with these ceilings."""
    times = {n: max(f / flops, b / bandwidth) for n, (f, b) in costs(case.config, case.cameras, case.batch).items()}
    return 1e3 * (times["vision"] + times["prefix"] + case.steps * times["step"])


def random_inputs(config: ModelConfig, cameras: int, batch: int) -> tuple[Observation, np.ndarray]:
    """An observation with the first cameras and text of the full length, and noise, which π0-FAST does not take."""
    rng = np.random.default_rng(0)
    data: dict[str, np.ndarray] = {
        "state": rng.normal(size=(batch, config.action_dim)),
        "tokenized_prompt": rng.integers(0, config.vocab_size, (batch, config.max_token_len)),
        "tokenized_prompt_mask": np.ones((batch, config.max_token_len), bool),
    }
    for i, key in enumerate(config.image_keys):
        data[f"image/{key}"] = rng.integers(0, 256, (batch, *config.image_resolution, 3), np.uint8)
        data[f"image_mask/{key}"] = np.full(batch, i < cameras)
    noise = rng.normal(size=(batch, config.action_horizon, config.action_dim)).astype(np.float32)
    return Observation.from_dict(data, config), noise


@dataclasses.dataclass(frozen=True)
class Runs:
    """Calls that wait for their results: the whole, the stages up to one's end, a matrix product and a copy."""

    device: str
    call: Callable[[], Any]
    until: dict[str, Callable[[], Any]]
    product: tuple[Callable[[], Any], float]  # and its floating-point operations
    copy: tuple[Callable[[], Any], float]  # and the bytes it reads and writes
    peak_mib: Callable[[], float]


def product_shape(config: ModelConfig, device: str) -> tuple[int, int, int]:
    """Rows, inner size and columns of a product that reaches the ceiling: large, and on a CPU still in its cache."""
    return (1024, 1024, 1024) if device == "cpu" else (8192, 8192, 8192)


def jax_runs(case: Case) -> Runs:
    """The case in JAX."""
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # else the peak would be all memory
    import jax
    import jax.numpy as jnp
    from flax import nnx

    from pi0_jax import sampler as fast
    from pi0_jax.loading import make_model

    config, device = case.config, jax.devices()[0]
    cast = lambda x: x.astype(case.dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x  # noqa: E731
    model = jax.jit(lambda: jax.tree.map(cast, make_model(config, rngs=nnx.Rngs(0))))()
    observation, noise = random_inputs(config, case.cameras, case.batch)
    until = {}

    def writer(steps: int) -> Callable[[], Any]:
        if case.path == "fast":
            sampler = fast.TokenSampler(model, max_decoding_steps=steps, eos_token=NO_TOKEN)
            return lambda: sampler.sample(observation)
        write = jax.jit(lambda model, o: model.sample_tokens(o, steps, eos_token=NO_TOKEN))
        return lambda: write(model, observation)

    if config.kind == "pi0_fast":
        call, until = writer(case.steps), {"prefix": writer(1)}
    elif case.path == "plain":
        sample = jax.jit(lambda model, o, n: model.sample_actions(o, n, case.steps))
        call = lambda: sample(model, observation, noise)  # noqa: E731
    else:
        sampler = fast.Sampler(model, num_steps=case.steps, warm_up=False)
        call = lambda: sampler.sample(observation, noise)  # noqa: E731
        inputs = sampler.inputs(compact(observation, config), noise)
        vision = jax.jit(lambda w, i: fast.embed_prefix(w, config, i))

        def fill(w: dict[str, Any], i: dict[str, Any]) -> Any:
            tokens, valid = fast.embed_prefix(w, config, i)
            return fast.fill_cache(w, config, tokens, valid, room=0)

        prefix = jax.jit(fill)
        until = {"vision": lambda: vision(sampler.weights, inputs), "prefix": lambda: prefix(sampler.weights, inputs)}
    rows, inner, columns = product_shape(config, device.platform)
    a, b = jnp.ones((rows, inner), case.dtype), jnp.ones((inner, columns), case.dtype)
    matmul, big = jax.jit(jnp.matmul), jnp.ones(2**26, jnp.uint32)
    copy = jax.jit(lambda x: x + 1)

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

    from pi0_torch import sampler as fast
    from pi0_torch import to_device
    from pi0_torch.attention import ATTENTION
    from pi0_torch.loading import make_model

    config, device = case.config, torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype, cuda = getattr(torch, case.dtype), device.type == "cuda"
    torch.set_default_dtype(dtype)
    with device:
        model: Any = make_model(config).requires_grad_(False)
    torch.set_default_dtype(torch.float32)
    observation, noise = random_inputs(config, case.cameras, case.batch)
    until = {}

    def writer(steps: int) -> Callable[[], Any]:
        if case.path == "fast":
            sampler = fast.TokenSampler(model, max_decoding_steps=steps, eos_token=NO_TOKEN, compile=case.compile)
            return lambda: sampler.sample(observation)
        on_device = to_device(observation, device)
        return lambda: model.sample_tokens(on_device, steps, eos_token=NO_TOKEN)

    if config.kind == "pi0_fast":
        call, until = writer(case.steps), {"prefix": writer(1)}
    elif case.path == "plain":
        on_device, start = to_device(observation, device), torch.from_numpy(noise).to(device)
        call = lambda: model.sample_actions(on_device, start, case.steps)  # noqa: E731
    else:
        sampler = fast.Sampler(model, num_steps=case.steps, attention=case.backend, compile=case.compile, warm_up=False)
        call = lambda: sampler.sample(observation, noise)  # noqa: E731
        inputs, attend = sampler.inputs(compact(observation, config), noise), ATTENTION[case.backend]

        def vision() -> Any:
            return fast.embed_prefix(sampler.weights, config, attend, inputs)

        def prefix() -> Any:
            tokens, valid = vision()
            return fast.fill_cache(sampler.weights, config, attend, tokens, valid, room=0)

        until = {"vision": vision, "prefix": prefix}
        if sampler.compile:
            until = {n: torch.compile(run, fullgraph=True, mode=sampler.mode) for n, run in until.items()}
    rows, inner, columns = product_shape(config, device.type)
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
    """The most memory this process has had."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


def measure(case: Case) -> Result:
    """Run one case in this process."""
    start = time.perf_counter()
    runs = {"jax": jax_runs, "torch": torch_runs}[case.framework](case)
    runs.call()
    first = 1e3 * (time.perf_counter() - start)
    times = times_ms(runs.call, case.repeats)
    peak = runs.peak_mib()
    until = {name: statistics.median(times_ms(run, max(3, case.repeats // 3))) for name, run in runs.until.items()}
    median, stages, done = statistics.median(times), {}, 0.0
    for name, end in until.items():
        stages[name], done = end - done, end
    if stages:
        stages["step"] = (median - done) / (case.steps - (case.config.kind == "pi0_fast"))
    (product, operations), (copy, size) = runs.product, runs.copy
    return Result(
        case,
        runs.device,
        first,
        min(times),
        median,
        float(np.quantile(times, 0.99)),
        stages,
        peak,
        1e3 * operations / min(times_ms(product, 20)),
        1e3 * size / min(times_ms(copy, 20)),
    )


def times_ms(run: Callable[[], Any], repeats: int) -> list[float]:
    """Wall times of calls in milliseconds, after two that warm up."""
    times = []
    for i in range(repeats + 2):
        start = time.perf_counter()
        run()
        if i >= 2:
            times.append(1e3 * (time.perf_counter() - start))
    return times


@dataclasses.dataclass(frozen=True)
class Report:
    """Results of one run. Ceilings of a dtype are the highest that any of its cases met."""

    results: list[Result]

    def ceilings(self, dtype: str) -> tuple[float, float]:
        """FLOP/s of one large matrix product and bytes/s of a copy."""
        found = [r for r in self.results if r.case.dtype == dtype]
        return max(r.flops for r in found), max(r.bandwidth for r in found)

    def roofline_ms(self, result: Result) -> float:
        return roofline_ms(result.case, *self.ceilings(result.case.dtype))

    def to_json(self) -> str:
        rows = []
        for result in self.results:
            least = self.roofline_ms(result)
            more = {"roofline_ms": least, "ratio": result.median_ms / least}
            rows.append(dataclasses.asdict(result) | more | {"tokens_per_second": result.tokens_per_second})
        return json.dumps(rows, indent=2)

    def table(self) -> str:
        """A line per case, and the ceilings."""
        first = self.results[0]
        lines = [
            f"{first.device}, {first.case.steps} steps, {first.case.repeats} calls; milliseconds, of stages the median",
            "",
            f"{'model':<12}{'':<17}{'dtype':<10}{'cameras':>7}{'batch':>6}{'best':>9}{'median':>9}{'p99':>9}"
            f"{'vision':>9}{'prefix':>9}{'step':>8}{'tokens/s':>10}{'MiB':>8}{'roofline':>10}{'ratio':>7}",
        ]
        for r in self.results:
            stages = [f"{r.stages_ms[n]:.1f}" if n in r.stages_ms else "" for n in ("vision", "prefix", "step")]
            rate = "" if r.tokens_per_second is None else f"{r.tokens_per_second:.1f}"
            least = self.roofline_ms(r)
            lines.append(
                f"{r.case.model:<12}{r.case.name:<17}{r.case.dtype:<10}{r.case.cameras:>7}{r.case.batch:>6}"
                f"{r.best_ms:>9.1f}{r.median_ms:>9.1f}{r.p99_ms:>9.1f}{stages[0]:>9}{stages[1]:>9}{stages[2]:>8}"
                f"{rate:>10}{r.peak_mib:>8.0f}{least:>10.1f}{r.median_ms / least:>7.1f}"
            )
        for dtype in dict.fromkeys(r.case.dtype for r in self.results):
            flops, bandwidth = self.ceilings(dtype)
            lines += ["", f"roofline in {dtype}: {flops / 1e9:.0f} GFLOP/s, {bandwidth / 1e9:.0f} GB/s"]
            for r in (r for r in self.results if r.case.dtype == dtype):
                lines.append(f"  {r.case.name:<17} met {r.flops / 1e9:.0f} GFLOP/s, {r.bandwidth / 1e9:.0f} GB/s")
        return "\n".join(lines)


def benchmark(cases: Sequence[Case]) -> Report:
    """Measure the cases one after the other, each in a process of its own."""
    results = []
    for case in cases:
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
            results.append(pool.submit(measure, case).result())
    return Report(results)


def main(arguments: list[str] | None = None) -> None:
    """The command `pi0-bench`."""
    parser = argparse.ArgumentParser(
        prog="pi0-bench",
        description="Measure how long sampling takes, and what the machine would allow. Weights are random.",
        epilog="examples:\n"
        "  pi0-bench                                                        58 M parameters, for a CPU\n"
        "  pi0-bench --model pi0 pi05 --dtype bfloat16 --cameras 1 2 3 --batch 1 8 32 --path fast    for a GPU\n"
        "  pi0-bench --framework torch --backend sdpa flex --json bench.json --plot bench.png",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model", nargs="+", default=["bench"], help="variants of pi0.config, or JSON files")
    parser.add_argument("--framework", nargs="+", choices=FRAMEWORKS, default=list(FRAMEWORKS))
    parser.add_argument(
        "--path", nargs="+", choices=PATHS, default=list(PATHS), help="the model itself, or the sampler"
    )
    parser.add_argument("--backend", nargs="+", choices=BACKENDS, default=["sdpa"], help="PyTorch's attention")
    parser.add_argument(
        "--compile", action=argparse.BooleanOptionalAction, help="PyTorch's fast path (default: on a GPU)"
    )
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=["float32"])
    parser.add_argument("--cameras", nargs="+", type=int, default=[3, 1], metavar="N")
    parser.add_argument("--batch", nargs="+", type=int, default=[1], metavar="N")
    parser.add_argument("--steps", type=int, default=10, help="of Euler, or tokens of π0-FAST (default 10)")
    parser.add_argument("--repeats", type=int, default=20, help="calls per case (default 20)")
    parser.add_argument("--json", type=output_path, help="write all numbers here")
    parser.add_argument("--plot", type=output_path, help="draw the medians and rooflines here, a PNG")
    args = parser.parse_args(arguments)
    try:
        report = benchmark(cases_of(args))
    except (ValueError, OSError) as error:
        print(f"pi0-bench: {error}", file=sys.stderr)
        sys.exit(1)
    print(report.table())
    if args.json is not None:
        args.json.write_text(report.to_json() + "\n")
    if args.plot is not None:
        from pi0.plots import plot_latency

        bars = {
            f"{r.case.model} {r.case.name}\n{r.case.dtype}, {r.case.cameras} cameras, batch {r.case.batch}": r
            for r in report.results
        }
        plot_latency({n: (r.median_ms, report.roofline_ms(r)) for n, r in bars.items()}, args.plot)


def cases_of(args: argparse.Namespace) -> list[Case]:
    """All combinations that differ. Raises ValueError for numbers that no model can have."""
    for name in ("cameras", "batch", "steps", "repeats"):
        values = getattr(args, name)
        for value in values if isinstance(values, list) else [values]:
            if value < 1:
                raise ValueError(f"--{name} is {value}; it must be at least 1")
    axes = (args.model, args.dtype, args.cameras, args.batch, args.framework, args.path, args.backend)
    cases = []
    for model, dtype, cameras, batch, framework, path, backend in itertools.product(*axes):
        config = read_variant(model)
        if config.kind == "pi0_fast" and args.steps < 2:
            raise ValueError(f"--steps is {args.steps}; {model} writes that many tokens, and the first is the prefix's")
        if cameras > len(config.image_keys):
            raise ValueError(f"--cameras is {cameras}; {model} has {len(config.image_keys)}")
        sampler = (framework, path) == ("torch", "fast")
        used = backend if sampler and config.kind != "pi0_fast" else ""
        compiled = args.compile if sampler else None
        cases.append(Case(model, framework, path, used, compiled, dtype, cameras, batch, args.steps, args.repeats))
    return list(dict.fromkeys(cases))


if __name__ == "__main__":
    main()
