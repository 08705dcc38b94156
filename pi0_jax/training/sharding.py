"""Where every array lies: a mesh of devices, and rules that map the axes of parameters and batches onto it.

The mesh has three axes. `data`: each part has its own rows of the batch. `fsdp`: the same, and parameters, optimizer
state and moving average are cut in parts too. `tensor`: each part computes its own heads and its own part of the MLP.

Parameters have logical axes already: the letters of `convert.layouts.layout`. A table of rules, which is part of an
experiment's config, maps letters to mesh axes:

    {"n": "tensor", "k": "tensor?", "m": "tensor", "l": ""}

The size of an axis `n` must divide by the mesh axis; of a rule that ends in "?" it may, and else the axis stays whole;
"" keeps it whole. `vision/n` is a rule for one scope, and goes before `n`. Of the axes without a rule, the largest that
divides by `fsdp` is cut by it. Constraints act only inside of `jax.set_mesh(mesh)`; without, models run as they are.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from pi0.config import ModelConfig
from pi0.parameters import Parameter, parameters, scope_of
from pi0_jax.models.layers import AXES, ROWS

MUST_BE_CUT = 2**20  # parameters that have at least as many elements


def start_processes(coordinator: str | None, count: int | None, index: int | None) -> None:
    """Join the other processes of a run, before JAX is used: those that flags name, or those of the cluster.

    TPU pods, GKE and SLURM are recognized by JAX; on any other machine, a run without flags is this process alone.
    Raises ValueError for flags of which some are missing.
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
        except ValueError as error:  # of JAX, where it recognizes no cluster
            if "coordinator_address should be defined" not in str(error):
                raise


def meet(what: str) -> None:
    """Wait, up to an hour, until all processes of the run are here.

    To be called before they first exchange data after work that takes one of them longer, such as compilation: what
    they exchange it by waits half a minute for the others.
    """
    from orbax.checkpoint import multihost  # not above: models import this file, and need no Orbax

    multihost.get_barrier_sync_fn()(key=what, timeout_ms=3_600_000)


def make_mesh(sizes: Mapping[str, int], devices: Sequence[Any] | None = None) -> Mesh:
    """The mesh of `sizes` (of `AXES`; one may be -1: what is left) over all devices, or over `devices`.

    Raises ValueError unless the sizes' product is the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    if set(sizes) != set(AXES) or any(type(n) is not int or (n < 1 and n != -1) for n in sizes.values()):
        raise ValueError(f"mesh is {dict(sizes)}; it gives {', '.join(AXES)}, each at least 1, or -1: what is left")
    shape = [sizes[axis] for axis in AXES]
    known = math.prod(n for n in shape if n != -1)
    if shape.count(-1) > 1 or len(devices) % known or (-1 not in shape and known != len(devices)):
        raise ValueError(
            f"mesh is {dict(sizes)}, which does not fit {len(devices)} devices; the product must be their number, and "
            f"one of {', '.join(AXES)} may be -1: what is left"
        )
    shape = [len(devices) // known if n == -1 else n for n in shape]
    return Mesh(mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True), AXES)


def check_batch(batch_size: int, accumulate: int, mesh: Mesh) -> None:
    """Raise ValueError unless a batch divides into micro-batches, and these over the devices."""
    ways = mesh.shape["data"] * mesh.shape["fsdp"]
    if accumulate < 1 or batch_size < 1 or batch_size % (accumulate * ways):
        raise ValueError(
            f"batch_size is {batch_size}; it must be a multiple of {accumulate * ways}: accumulate {accumulate} × mesh "
            f"data {mesh.shape['data']} × fsdp {mesh.shape['fsdp']}. Change batch_size, or give devices to mesh.tensor"
        )


def partition_specs(model: ModelConfig, rules: Mapping[str, str], sizes: Mapping[str, int]) -> dict[str, PartitionSpec]:
    """How each of our parameters is cut on a mesh of `sizes`. Raises ValueError where the rules do not fit it."""
    wrong = {axis: rule for axis, rule in rules.items() if rule.removesuffix("?") not in ("", *AXES)}
    if wrong:
        raise ValueError(f"sharding has {wrong}; a rule is one of {', '.join(AXES)}, with ? at its end, or empty")
    return {name: _partition_spec(name, parameter, rules, sizes) for name, parameter in parameters(model).items()}


def _partition_spec(
    name: str, parameter: Parameter, rules: Mapping[str, str], sizes: Mapping[str, int]
) -> PartitionSpec:
    cuts: list[str | None] = [None] * len(parameter.axes)
    free = []
    for i, (letter, size) in enumerate(zip(parameter.axes, parameter.shape, strict=True)):
        scoped = f"{scope_of(name)}/{letter}"
        rule = rules.get(scoped, rules.get(letter))
        if rule is None:
            free.append(i)
        elif rule and size % sizes[rule.removesuffix("?")] == 0:
            cuts[i] = rule.removesuffix("?")
        elif rule and not rule.endswith("?"):
            raise ValueError(
                f"mesh.{rule} is {sizes[rule]}, which does not divide axis {letter} = {size} of {name} "
                f"{list(parameter.shape)}; change the mesh, or keep the axis whole: sharding['{scoped}'] = ''"
            )
    fits = [i for i in free if parameter.shape[i] % sizes["fsdp"] == 0]
    if fits and "fsdp" not in cuts:
        cuts[max(fits, key=lambda i: parameter.shape[i])] = "fsdp"
    elif sizes["fsdp"] > 1 and "fsdp" not in cuts and math.prod(parameter.shape) >= MUST_BE_CUT:
        raise ValueError(
            f"mesh.fsdp is {sizes['fsdp']}, which divides none of the axes {[parameter.axes[i] for i in free]} of "
            f"{name} {list(parameter.shape)}; take a smaller one, and give the other devices to mesh.data"
        )
    return PartitionSpec(*cuts)


def state_shardings(state: Any, model: ModelConfig, rules: Mapping[str, str], mesh: Mesh) -> Any:
    """The sharding of every array of a training state: whatever belongs to a parameter lies as the parameter does.

    An array belongs to the parameter whose dotted name its path ends in; what belongs to none is on every device.
    """
    specs = partition_specs(model, rules, mesh.shape)

    def sharding(path: tuple[Any, ...], _: Any) -> NamedSharding:
        keys = [str(key.key) for key in path if isinstance(key, jax.tree_util.DictKey)]
        ends = (".".join(keys[i:]) for i in range(len(keys)))
        return NamedSharding(mesh, next((specs[end] for end in ends if end in specs), PartitionSpec()))

    return jax.tree_util.tree_map_with_path(sharding, state)


def local_rows(batch_size: int, mesh: Mesh) -> np.ndarray:
    """Which rows of a global batch this process has to bring: those of its own devices, in order."""
    parts = NamedSharding(mesh, ROWS).addressable_devices_indices_map((batch_size,)).values()
    return np.unique(np.concatenate([np.arange(batch_size)[index] for index in parts]))


def global_batch(local: Any, batch_size: int, mesh: Mesh) -> Any:
    """The global arrays of which every process brings its `local_rows`."""
    rows = NamedSharding(mesh, ROWS)
    return jax.tree.map(
        lambda x: jax.make_array_from_process_local_data(rows, np.asarray(x), (batch_size, *x.shape[1:])), local
    )
