"""Where every array lies: a mesh of devices, and rules that map the axes of parameters and batches to it.

The mesh has three axes. Along `data`, devices have their own rows of the batch. Along `fsdp` too, and parameters,
optimizer state and moving average are sharded. Along `tensor`, devices compute their own heads and part of the MLP.

Parameters have logical axes, the letters of `pi0.parameters`. A table of rules in a run's config maps letters to mesh
axes:

    {"n": "tensor", "k": "tensor?", "m": "tensor", "l": ""}

The size of an axis `n` must divide by the mesh axis; with "?" it may, and is replicated otherwise; "" replicates it.
`vision/n` is a rule for one scope and precedes `n`. Of the axes without a rule, the largest that divides by `fsdp` is
sharded along it, where a layer has at least 64 KB of the parameter: fewer are not worth a collective. Constraints act
only inside `jax.set_mesh(mesh)`; without it, models run as they are.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from orbax.checkpoint import multihost

from pi0.config import ModelConfig
from pi0.parameters import Parameter, parameters, scope_of
from pi0.run_config import MeshConfig
from pi0_jax.models.layers import AXES, ROWS

MUST_BE_SHARDED = 2**20  # parameters of at least as many elements, along fsdp
STAYS_WHOLE = 2**14  # parameters of fewer elements in each layer: 64 KB in float32


def start_processes(coordinator: str | None, count: int | None, index: int | None) -> None:
    """Connect to the other processes of a run, before JAX is used: by the flags, or those of the cluster.

    JAX detects TPU pods, GKE and SLURM; on any other machine, a run without flags is a single process. Raises
    ValueError where only some of the flags are given.
    """
    flags = (coordinator, count, index)
    if any(flag is not None for flag in flags):
        if any(flag is None for flag in flags) or not 0 <= index < count:  # type: ignore[operator]
            raise ValueError(
                f"--coordinator {coordinator}, --process-count {count} and --process-index {index} go together: the "
                f"address and port of process 0, how many there are, and which of them, from 0, this one is"
            )
        jax.distributed.initialize(coordinator, count, index)
    elif not jax.distributed.is_initialized():
        try:
            jax.distributed.initialize()
        except ValueError as error:  # of JAX, where it detects no cluster
            if "coordinator_address should be defined" not in str(error):
                raise


def barrier(name: str) -> None:
    """Wait, up to an hour, until all processes of the run are here.

    To be called between work that takes one of them longer, such as compilation, and their first collective, which
    waits half a minute only.
    """
    multihost.get_barrier_sync_fn()(key=name, timeout_ms=3_600_000)


def agree_to_stop() -> Callable[[int, bool], bool] | None:
    """Whether all processes are to stop after a step, as JAX's coordination service says; None for a single process."""
    if jax.process_count() == 1:
        return None
    from jax.experimental import multihost_utils

    return lambda step, signalled: multihost_utils.reached_preemption_sync_point(step)


def make_mesh(config: MeshConfig, devices: Sequence[Any] | None = None) -> Mesh:
    """The mesh over `devices` (default: all). Raises ValueError unless the product of its sizes is their number."""
    devices = jax.devices() if devices is None else devices
    shape = [getattr(config, axis) for axis in AXES]
    known = math.prod(n for n in shape if n != -1)
    if len(devices) % known or (-1 not in shape and known != len(devices)):
        raise ValueError(
            f"mesh is {dataclasses.asdict(config)}, which does not fit {len(devices)} devices; the product must be "
            f"their number, and one of {', '.join(AXES)} may be -1: all devices that remain"
        )
    shape = [len(devices) // known if n == -1 else n for n in shape]
    return Mesh(mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True), AXES)


def check_batch(batch_size: int, accumulate: int, mesh: Mesh) -> None:
    """Raise ValueError unless a batch divides into micro-batches, and these over the devices."""
    ways = mesh.shape["data"] * mesh.shape["fsdp"]
    if batch_size % (accumulate * ways):
        raise ValueError(
            f"batch_size is {batch_size}; it must be a multiple of {accumulate * ways}: accumulate {accumulate} × mesh "
            f"data {mesh.shape['data']} × fsdp {mesh.shape['fsdp']}. Change batch_size, or give devices to mesh.tensor"
        )


def check_remat(remat: str, mesh: Mesh) -> None:
    """Raise ValueError for "offload" on devices without a host whose memory is another than their own."""
    if remat == "offload" and mesh.devices.flat[0].platform == "cpu":
        raise ValueError(
            "model.runtime.remat is offload, which moves activations to the host's memory; a CPU has no other, and "
            "pi0-plan compiles for GPUs as for a CPU. Take full"
        )


def partition_specs(model: ModelConfig, rules: Mapping[str, str], sizes: Mapping[str, int]) -> dict[str, PartitionSpec]:
    """The partition of each parameter on a mesh of `sizes`. Raises ValueError where the rules do not fit it."""
    wrong = {axis: rule for axis, rule in rules.items() if rule.removesuffix("?") not in ("", *AXES)}
    if wrong:
        raise ValueError(f"sharding has {wrong}; a rule is one of {', '.join(AXES)}, with ? at its end, or empty")
    return {name: _partition_spec(name, parameter, rules, sizes) for name, parameter in parameters(model).items()}


def _partition_spec(
    name: str, parameter: Parameter, rules: Mapping[str, str], sizes: Mapping[str, int]
) -> PartitionSpec:
    spec: list[str | None] = [None] * len(parameter.axes)
    free = []
    for i, (letter, size) in enumerate(zip(parameter.axes, parameter.shape, strict=True)):
        scoped = f"{scope_of(name)}/{letter}"
        rule = rules.get(scoped, rules.get(letter))
        if rule is None:
            free.append(i)
        elif rule and size % sizes[rule.removesuffix("?")] == 0:
            spec[i] = rule.removesuffix("?")
        elif rule and not rule.endswith("?"):
            raise ValueError(
                f"mesh.{rule} is {sizes[rule]}, which does not divide axis {letter} = {size} of {name} "
                f"{list(parameter.shape)}; change the mesh, or replicate the axis: sharding['{scoped}'] = ''"
            )
    fits = [i for i in free if parameter.shape[i] % sizes["fsdp"] == 0]
    in_a_layer = math.prod(n for letter, n in zip(parameter.axes, parameter.shape, strict=True) if letter != "l")
    if in_a_layer < STAYS_WHOLE:
        return PartitionSpec(*spec)
    if fits and "fsdp" not in spec:
        spec[max(fits, key=lambda i: parameter.shape[i])] = "fsdp"
    elif sizes["fsdp"] > 1 and "fsdp" not in spec and math.prod(parameter.shape) >= MUST_BE_SHARDED:
        raise ValueError(
            f"mesh.fsdp is {sizes['fsdp']}, which divides none of the axes {[parameter.axes[i] for i in free]} of "
            f"{name} {list(parameter.shape)}; take a smaller one, and give the other devices to mesh.data"
        )
    return PartitionSpec(*spec)


def state_shardings(state: Any, model: ModelConfig, rules: Mapping[str, str], mesh: Mesh) -> Any:
    """The sharding of every array of a training state: that of the parameter whose dotted name its path ends in.

    Arrays of no parameter are replicated.
    """
    specs = partition_specs(model, rules, mesh.shape)

    def sharding(path: tuple[Any, ...], _: Any) -> NamedSharding:
        keys = [str(key.key) for key in path if isinstance(key, jax.tree_util.DictKey)]
        ends = (".".join(keys[i:]) for i in range(len(keys)))
        return NamedSharding(mesh, next((specs[end] for end in ends if end in specs), PartitionSpec()))

    return jax.tree_util.tree_map_with_path(sharding, state)


def local_rows(batch_size: int, mesh: Mesh) -> np.ndarray:
    """The rows of a global batch that are on this process's devices, int [R], in order."""
    parts = NamedSharding(mesh, ROWS).addressable_devices_indices_map((batch_size,)).values()
    return np.unique(np.concatenate([np.arange(batch_size)[index] for index in parts]))


def local_box(sharding: jax.sharding.Sharding, shape: tuple[int, ...]) -> tuple[slice, ...]:
    """The smallest box of an array that contains all parts of it which are on this process's devices."""
    parts: Any = sharding.addressable_devices_indices_map(shape).values()
    bounds = [[axis.indices(size)[:2] for axis, size in zip(part, shape, strict=True)] for part in parts]
    return tuple(slice(min(a for a, _ in axis), max(b for _, b in axis)) for axis in zip(*bounds, strict=True))


def global_batch(local: Any, batch_size: int, mesh: Mesh) -> Any:
    """The global arrays of which every process has its `local_rows`."""
    rows = NamedSharding(mesh, ROWS)
    return jax.tree.map(
        lambda x: jax.make_array_from_process_local_data(rows, np.asarray(x), (batch_size, *x.shape[1:])), local
    )
