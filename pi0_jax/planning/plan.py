"""Memory and time of a training step, or of sampling, on a topology: compiled for it, without its chips.

For TPUs by the real compiler, of the `libtpu` package; for GPUs by the CPU's compiler, for as many virtual devices. It
computes some bfloat16 values in float32 and so overestimates memory. Nothing is allocated: all inputs are shapes.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import os
import re
import time
from collections import Counter
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from pi0.config import ModelConfig
from pi0.observation import Observation
from pi0.policy.rtc import RTCTraining
from pi0.run_config import RunConfig
from pi0.training.draws import Drawn, Draws
from pi0_jax.loading import make_model, merge
from pi0_jax.planning import hlo
from pi0_jax.training.optimizer import make_optimizer, make_schedule
from pi0_jax.training.sharding import ROWS, check_batch, check_remat, make_mesh, state_shardings
from pi0_jax.training.train import init_state, train_step

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """What JAX has as one device: a chip, of v7x each of its two halves.

    GiB of memory that programs may use; peaks per second: bfloat16 operations, bytes of memory, bytes sent to other
    devices. `topology` and `options` are how libtpu calls it.
    """

    memory: float
    flops: float = math.nan
    bandwidth: float = math.nan
    links: float = math.nan
    topology: str = ""
    options: tuple[tuple[str, str], ...] = ()


# Peaks: docs.cloud.google.com/tpu/docs/v4 and so on, of links one direction. Memory: what libtpu compiles for.
CHIPS = {
    "v4": Chip(30.75, 275e12, 1228e9, 300e9, "v4", (("chip_config_name", "megacore"),)),  # two cores as one device
    "v5e": Chip(15.75, 197e12, 819e9, 200e9, "v5e"),
    "v5p": Chip(95.74, 459e12, 2765e9, 600e9, "v5p"),
    "v6e": Chip(31.25, 918e12, 1640e9, 448e9, "v6e"),
    "v7x": Chip(94.75, 2307e12 / 2, 7380e9 / 2, 600e9 / 2, "tpu7x"),
}
TOO_LARGE = (  # what libtpu says of a program, or of its temporaries alone, that need more memory than there is
    r"Used ([\d.]+)([GM]) of ([\d.]+)G hbm",
    r"required for HLO temporaries \(([\d.]+)([GM])\) exceeds available HBM \(([\d.]+)G\)",
)
TPU_ENVIRONMENT = {  # libtpu as a compiler alone: no chip, no query of the host, no lock on either
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5p-8",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_WORKER_ID": "0",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_STDERR_LOG_LEVEL": "3",
    "TPU_MIN_LOG_LEVEL": "3",
}


@dataclasses.dataclass(frozen=True)
class Plan:
    """Memory (bytes) and cost of a training step, or of sampling, on one device.

    `held` is the memory of arrays that persist between steps, by name. `refused` is the compiler's error where the
    program is too large for the chip: `temporaries` are then what it reports, and `cost` is None.
    `temporaries` have the program itself, on TPUs. `compiled_in` is in seconds.
    """

    topology: str
    chip: Chip
    mesh: dict[str, int]
    batch_size: int
    held: dict[str, int]
    temporaries: int
    cost: hlo.Cost | None
    refused: str = ""
    compiled_in: float = math.nan

    @property
    def total(self) -> int:
        """Peak memory in bytes."""
        return sum(self.held.values()) + self.temporaries

    @property
    def fits(self) -> bool:
        """Whether what is held and computed fits the chip's memory."""
        return not self.refused and self.total <= self.chip.memory * GIB

    @property
    def seconds(self) -> dict[str, float]:
        """At the chip's peaks: arithmetic, memory, links."""
        if self.cost is None:
            return {}
        sent = sum(self.cost.sent.values())
        times = self.cost.flops / self.chip.flops, self.cost.traffic / self.chip.bandwidth, sent / self.chip.links
        return dict(zip(("arithmetic", "memory", "links"), times, strict=True))


def parse_topology(name: str) -> tuple[str, Chip, int]:
    """The generation, the chip and, for GPUs, their number, of "v5e:4x4", or of "gpu:8x80", 8 GPUs of 80 GB.

    Raises ValueError for anything else.
    """
    generation, _, shape = name.partition(":")
    generation = "v7x" if generation == CHIPS["v7x"].topology else generation
    if generation == "gpu" and re.fullmatch(r"\d+x\d+", shape):
        number, gigabytes = map(int, shape.split("x"))
        return generation, Chip(gigabytes * 1e9 / GIB), number
    if generation in CHIPS and re.fullmatch(r"\d+(x\d+){1,2}", shape):
        return generation, CHIPS[generation], 0
    raise ValueError(f"topology is {name!r}; it is like v5p:2x2x2, of {', '.join(CHIPS)}, or gpu:8x80: 8 GPUs of 80 GB")


def devices_of(topology: str) -> list[Any]:
    """The devices of a topology, to compile for. Raises ValueError where the compiler does not know it."""
    generation, chip, number = parse_topology(topology)
    if generation == "gpu":
        if len(jax.devices()) < number:
            raise ValueError(f"{topology} is planned on {number} virtual devices, and JAX has started without them")
        return jax.devices()[:number]
    try:
        name = f"{chip.topology}:{topology.partition(':')[2]}"
        return list(topologies.get_topology_desc(name, platform="tpu", **dict(chip.options)).devices)
    except Exception as error:  # of any type: jaxlib's own, or for a missing libtpu
        raise ValueError(f"no compiler for {topology}: {str(error).splitlines()[0]}. pip install libtpu?") from error


def abstract_batch(
    model: ModelConfig, batch_size: int, *inputs: str, rtc: RTCTraining | None = None
) -> tuple[Observation, jax.ShapeDtypeStruct, Drawn]:
    """The shapes of an observation, with the fields `inputs` of training, of actions, and of what is drawn."""

    def rows(dtype: Any, *shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((batch_size, *shape), dtype)

    tokens = model.max_token_len
    training = {
        "token_ar_mask": rows(jnp.int32, tokens),
        "token_loss_mask": rows(jnp.bool, tokens),
        "token_group": rows(jnp.int32, tokens),
        "has_actions": rows(jnp.bool),
    }
    observation = Observation(
        images={key: rows(jnp.uint8, *model.image_resolution, 3) for key in model.image_keys},
        image_masks={key: rows(jnp.bool) for key in model.image_keys},
        state=rows(jnp.float32, model.state_size),
        tokenized_prompt=rows(jnp.int32, tokens),
        tokenized_prompt_mask=rows(jnp.bool, tokens),
        **{name: training[name] for name in inputs},
    )
    drawn = jax.tree.map(lambda x: rows(x.dtype, *x.shape[1:]), Draws(model, 0, rtc)(np.zeros(1, int)))
    return observation, rows(jnp.float32, model.action_horizon, model.action_dim), drawn


def sample(model: ModelConfig, params: Any, batch: tuple[Observation, jax.Array]) -> Any:
    """What the model samples for an observation and noise [B, T, A]."""
    return merge(model, params).sample(*batch)


def plan(config: RunConfig, topology: str, *, sampling: bool = False) -> Plan:
    """Compile a run's training step, or its model's sampling in its compute dtype, for a topology.

    Raises ValueError for a config that cannot run there; where it does not fit, the plan says so.
    """
    model = config.model
    mesh = make_mesh(config.mesh, devices_of(topology))
    trained = not sampling and (model.family.action_tokens or config.recipe is not None)
    inputs = model.family.training_inputs if trained else ()
    batch: Any = abstract_batch(model, config.batch_size, *inputs, rtc=config.rtc)
    if sampling:
        batch = batch[:2]
    rows, everywhere = NamedSharding(mesh, ROWS), NamedSharding(mesh, PartitionSpec())
    if sampling:
        init = functools.partial(_inference_params, model)
    else:
        check_batch(config.batch_size, config.accumulate, mesh)
        check_remat(model.runtime.remat, mesh)
        optimizer = make_optimizer(config.optimizer, make_schedule(config.optimizer, config.steps))
        init = functools.partial(init_state, config, optimizer)
    state = jax.eval_shape(init)
    shardings = state_shardings(state, model, config.sharding, mesh)
    state = jax.tree.map(_with_sharding, state, shardings)
    ways = mesh.shape["data"] * mesh.shape["fsdp"]
    batch = jax.tree.map(lambda x: _with_sharding(x, everywhere if config.batch_size % ways else rows), batch)
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        if sampling:
            lowered = jax.jit(functools.partial(sample, model)).lower(state, batch)
        else:
            step = functools.partial(train_step, config, optimizer)
            jitted = jax.jit(step, donate_argnums=0, out_shardings=(shardings, None))
            lowered = jitted.lower(state, batch)
    parts = {"parameters": state} if sampling else {k: v for k, v in state.items() if v}
    names = {"params": "parameters", "ema": "moving average", "opt_state": "optimizer"}
    held = {names.get(name, name): _bytes_per_device(part) for name, part in parts.items()}
    return _compile(lowered, topology, mesh, config.batch_size, held | {"batch": _bytes_per_device(batch)})


def _compile(lowered: jax.stages.Lowered, topology: str, mesh: Mesh, batch_size: int, held: dict[str, int]) -> Plan:
    _, chip, _ = parse_topology(topology)
    made = functools.partial(Plan, topology, chip, dict(mesh.shape), batch_size, held)
    start = time.monotonic()
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        used, temporaries = (re.search(pattern, str(error)) for pattern in TOO_LARGE)
        found = used or temporaries
        if found is None:
            raise
        size = round(float(found[1]) * (GIB if found[2] == "G" else 2**20))
        refused = f"{found[1]}{found[2]}iB of {found[3]}GiB"
        return made(size - sum(held.values()) if used else size, None, refused, time.monotonic() - start)
    seconds = time.monotonic() - start
    memory, text = compiled.memory_analysis(), compiled.as_text()
    assert memory is not None and text is not None, "TPU and CPU compilers give both"
    if chip.topology:  # temp_size_in_bytes of libtpu has the memory of the cores in it, and more
        temporaries = memory.peak_memory_in_bytes + memory.generated_code_size_in_bytes - sum(held.values())
    else:
        temporaries = memory.temp_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    return made(temporaries, hlo.count(text), compiled_in=seconds)


def _inference_params(model: ModelConfig) -> Any:
    params = nnx.to_pure_dict(nnx.state(make_model(model, rngs=nnx.Rngs(0))))
    return jax.tree.map(lambda x: x.astype(model.runtime.dtype), params)


def _with_sharding(x: jax.ShapeDtypeStruct, sharding: NamedSharding) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)


def _bytes_per_device(tree: Any) -> int:
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree))


def suggest(config: RunConfig, plan: Plan, *, sampling: bool = False) -> list[str]:
    """Overrides to try where a plan does not fit, in the order of what they cost."""
    chips, mesh = math.prod(plan.mesh.values()), plan.mesh
    changes = []
    if not sampling and config.model.runtime.remat != "full":
        changes.append("--config.model.runtime.remat=full")
    wider = [n for n in range(mesh["fsdp"] + 1, chips + 1) if chips % (n * mesh["tensor"]) == 0 and n <= 128]
    if wider:
        n = next(
            (n for n in wider if sum(plan.held.values()) * mesh["fsdp"] / n < plan.chip.memory * GIB / 2), wider[-1]
        )
        changes.append(f"--config.mesh.data=-1 --config.mesh.fsdp={n}")
    rows = config.batch_size // (mesh["data"] * mesh["fsdp"])
    if not sampling and rows > config.accumulate:
        more = next(n for n in range(config.accumulate + 1, rows + 1) if rows % n == 0)
        changes.append(f"--config.accumulate={more}")
    if not sampling and config.optimizer.moments_dtype == "float32":
        changes.append("--config.optimizer.moments_dtype=bfloat16")
    return changes or ["a larger topology"]


def report(plan: Plan, title: str) -> str:
    """A plan as text."""
    mesh = " × ".join(f"{axis} {size}" for axis, size in plan.mesh.items())
    chips = math.prod(plan.mesh.values())
    lines = [f"{title}, batch {plan.batch_size}, on {plan.topology}: {chips} devices, mesh {mesh}", ""]
    lines.append("memory of a device       GiB")
    rows = plan.held | {"temporaries": plan.temporaries, "all": plan.total}
    lines += [f"  {name:<16} {size / GIB:>9.2f}" for name, size in rows.items()]
    verdict = "it fits" if plan.fits else f"IT DOES NOT FIT{f' ({plan.refused})' if plan.refused else ''}"
    lines += [f"  {'it has':<16} {plan.chip.memory:>9.2f}  {verdict}", "", f"compiled in {plan.compiled_in:.0f} s"]
    if plan.cost is None:
        return "\n".join(lines)
    lines.append(f"operations of a device   {plan.cost.flops / 1e12:.2f} TFLOP")
    lines.append("collectives of a device  number     GB sent")
    names = Counter(plan.cost.collectives)
    lines += [f"  {name:<20} {n:>8} {plan.cost.sent[name] / 1e9:>11.3f}" for name, n in names.most_common()]
    lines += _uncounted(plan)
    seconds = plan.seconds
    if math.isnan(seconds["arithmetic"]):
        return "\n".join(lines)
    times = ", ".join(f"{name} {value * 1e3:.1f}" for name, value in seconds.items())
    low, high = max(seconds.values()) * 1e3, sum(seconds.values()) * 1e3
    lines += ["", f"milliseconds at the chip's peaks: {times}", f"at least {low:.0f} ms, {high:.0f} if none overlap"]
    return "\n".join(lines)


def table(plans: list[Plan]) -> str:
    """Several plans as text, one line each."""
    lines = [
        "topology   devices  data×fsdp×tensor  batch  held GiB  temporary GiB  TFLOP  GB moved  GB sent  ms (peak)  "
        "compiled s  fits"
    ]
    for plan in plans:
        cost, mesh = plan.cost or hlo.Cost(math.nan, math.nan), "×".join(map(str, plan.mesh.values()))
        slowest = max(plan.seconds.values(), default=math.nan) * 1e3
        lines.append(
            f"{plan.topology:<10} {math.prod(plan.mesh.values()):>7}  {mesh:>16} {plan.batch_size:>6} "
            f"{sum(plan.held.values()) / GIB:>9.2f} {plan.temporaries / GIB:>14.2f} {cost.flops / 1e12:>6.2f} "
            f"{cost.traffic / 1e9:>9.0f} {sum(cost.sent.values()) / 1e9:>8.2f} {slowest:>10.0f} "
            f"{plan.compiled_in:>11.0f}  {'yes' if plan.fits else 'no'}"
        )
    return "\n".join(lines + [f"{plan.topology}: {line}" for plan in plans for line in _uncounted(plan)])


def _uncounted(plan: Plan) -> list[str]:
    calls = ", ".join(f"{n} × {name}" for name, n in plan.cost.unknown.most_common()) if plan.cost else ""
    return [f"not among the operations, because their cost is unknown: {calls}"] if calls else []


def prepare(names: list[str]) -> None:
    """Configure JAX, before its first use, to compile for topologies on the CPU."""
    numbers = [number for generation, _, number in map(parse_topology, names) if generation == "gpu"]
    for name, value in TPU_ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    jax.config.update("jax_platforms", "cpu")
    if numbers:
        jax.config.update("jax_num_cpu_devices", max(numbers))
