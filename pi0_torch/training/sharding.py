"""Where every tensor lies: processes, one for each device, and FSDP over them (`torch.distributed.fsdp.fully_shard`).

The mesh has two axes. Along `data`, processes have their own rows of the batch. Along `fsdp` too, and parameters,
optimizer state and moving average are sharded, each along its first axis: with both it is what PyTorch calls hybrid
sharding. Each layer is gathered when it is computed. Without several processes, models run as they are.
"""

from __future__ import annotations

import dataclasses
import math
import os
import subprocess
from collections.abc import Callable, Mapping
from datetime import timedelta
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor

from pi0.run_config import SHARDING, MeshConfig, RunConfig
from pi0_torch.loading import Model, find_device

AXES = ("data", "fsdp")  # of the mesh
REMATS = ("none", "full")  # what is recomputed: nothing, or each layer
WAITING = timedelta(hours=1)  # for a process that compiles, or writes a checkpoint


def start_processes(
    coordinator: str | None = None, count: int | None = None, index: int | None = None, device: str | None = None
) -> torch.device:
    """Connect to the other processes of a run: by the flags, or those of torchrun or SLURM. Returns the device.

    On any other machine, a run without flags is a single process. `device` is cpu or cuda (default: cuda where there is
    one); each process of a machine has its own. Raises ValueError where only some of the flags are given.
    """
    flags, env = (coordinator, count, index), os.environ
    if any(flag is not None for flag in flags):
        if any(flag is None for flag in flags) or not 0 <= index < count:  # type: ignore[operator]
            raise ValueError(
                f"--coordinator {coordinator}, --process-count {count} and --process-index {index} go together: the "
                f"address and port of process 0, how many there are, and which of them, from 0, this one is"
            )
        assert coordinator is not None
        address, _, port = coordinator.rpartition(":")
        env |= {"MASTER_ADDR": address, "MASTER_PORT": port, "WORLD_SIZE": str(count), "RANK": str(index)}
    elif "RANK" not in env and int(env.get("SLURM_NTASKS", 1)) > 1 and "SLURM_PROCID" in env:
        nodes = subprocess.run(["scontrol", "show", "hostnames"], capture_output=True, text=True, check=True).stdout
        port = str(10_000 + int(env["SLURM_JOB_ID"]) % 50_000)  # the same for all processes of a job
        env |= {"MASTER_ADDR": nodes.split()[0], "MASTER_PORT": port}
        env |= {"WORLD_SIZE": env["SLURM_NTASKS"], "RANK": env["SLURM_PROCID"], "LOCAL_RANK": env["SLURM_LOCALID"]}
    found = find_device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if found.type == "cuda":
        local = int(env.get("LOCAL_RANK", env.get("RANK", 0))) % torch.cuda.device_count()
        found = torch.device("cuda", local if found.index is None else found.index)
        torch.cuda.set_device(found)
    if int(env.get("WORLD_SIZE", 1)) > 1 and not dist.is_initialized():
        dist.init_process_group("cpu:gloo,cuda:nccl" if found.type == "cuda" else "gloo", timeout=WAITING)
    return found


def find_mesh_device(device: str | torch.device | None) -> torch.device:
    """The device of this process: the given one, or the GPU that `start_processes` chose, or the CPU."""
    if device is None and torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    return find_device(device or "cpu")


def process_index() -> int:
    """The number of this process, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def process_count() -> int:
    """The number of processes of the run."""
    return dist.get_world_size() if dist.is_initialized() else 1


def barrier(name: str) -> None:
    """Wait, up to an hour, until all processes of the run are here."""
    if dist.is_initialized():
        dist.barrier()


def agree_to_stop() -> Callable[[int, bool], bool] | None:
    """Whether all processes are to stop after a step, as one of them was signalled; None for a single process."""
    if process_count() == 1:
        return None

    def agree(step: int, signalled: bool) -> bool:
        flag = torch.tensor(int(signalled))
        dist.all_reduce(flag, dist.ReduceOp.MAX)
        return bool(flag)

    return agree


def check_config(config: RunConfig) -> None:
    """Raise ValueError for settings of a run that only JAX has."""
    runtime = config.model.runtime
    if runtime.remat not in REMATS:
        raise ValueError(
            f"model.runtime.remat is {runtime.remat}, which is JAX's; PyTorch has {' and '.join(REMATS)}: each layer "
            "is computed again in the backward pass, or none"
        )
    if runtime.attention != "plain":
        raise ValueError(f"model.runtime.attention is {runtime.attention}, which is JAX's; take plain")
    if dict(config.sharding) != SHARDING:
        raise ValueError("sharding has rules for JAX's mesh; PyTorch shards every parameter along its first axis")
    if config.export_every:
        raise ValueError(
            "export_every compares checkpoints of JAX with their exports to PyTorch; those of this run are PyTorch's "
            "own. Set it to 0, and compare with pi0-parity"
        )


def make_mesh(config: MeshConfig, device: torch.device) -> DeviceMesh | None:
    """The mesh over all processes, None for a single one. Raises ValueError unless its sizes fit their number."""
    count, sizes = process_count(), dataclasses.asdict(config)
    known = math.prod(n for n in sizes.values() if n != -1)
    if count % known or (-1 not in sizes.values() and known != count):
        raise ValueError(
            f"mesh is {sizes}, which does not fit {count} processes; the product must be their number, and one of "
            f"{', '.join(sizes)} may be -1: all that remain"
        )
    sizes = {axis: count // known if n == -1 else n for axis, n in sizes.items()}
    if sizes["tensor"] > 1:
        raise ValueError(f"mesh.tensor is {sizes['tensor']}; in PyTorch it must be 1: take data or fsdp")
    if count == 1:
        return None
    return init_device_mesh(device.type, (sizes["data"], sizes["fsdp"]), mesh_dim_names=AXES)


def check_batch(batch_size: int, accumulate: int) -> None:
    """Raise ValueError unless a batch divides into micro-batches, and these over the processes."""
    ways = process_count()
    if batch_size % (accumulate * ways):
        raise ValueError(
            f"batch_size is {batch_size}; it must be a multiple of {accumulate * ways}: accumulate {accumulate} × "
            f"{ways} processes"
        )


def local_rows(batch_size: int) -> np.ndarray:
    """The rows of a global batch that this process has, int [R], in order."""
    own = batch_size // process_count()
    return np.arange(batch_size)[process_index() * own :][:own]


def shard(loss: nn.Module, model: Model, mesh: DeviceMesh | None) -> None:
    """Shard the parameters of `model`, of which `loss` computes the training loss, over the mesh."""
    if mesh is None:
        return
    experts = [getattr(model, name) for name in model.config.experts]
    for block in (block for expert in experts for block in expert.layers):
        fully_shard(block, mesh=mesh)
        register_fsdp_forward_method(block, "around")
    for block in model.vision.layers:
        fully_shard(block, mesh=mesh)
    fully_shard(loss, mesh=mesh)


def local_part(x: Any) -> Tensor:
    """What this process has of a tensor of any shape."""
    return x.to_local() if isinstance(x, DTensor) else x


def local_box(parameter: Tensor) -> tuple[slice, ...]:
    """The box of a parameter [N, ...] that this process has: rows of its first axis, where it is sharded."""
    box = [slice(0, n) for n in parameter.shape]
    if isinstance(parameter, DTensor) and box:
        mesh = parameter.device_mesh
        rows = -(-parameter.shape[0] // mesh.size(-1))
        start = min(mesh.get_local_rank(-1) * rows, parameter.shape[0])
        box[0] = slice(start, min(start + rows, parameter.shape[0]))
    return tuple(box)


def whole(local: Tensor, parameter: Tensor) -> Tensor:
    """The whole of a tensor that is sharded as `parameter`, of any shape, is; all processes call it."""
    if not isinstance(parameter, DTensor):
        return local
    mesh, placements = parameter.device_mesh, parameter.placements
    shape, stride = parameter.shape, parameter.stride()
    return DTensor.from_local(local, mesh, placements, run_check=False, shape=shape, stride=stride).full_tensor()


def mean_over_processes(values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The means of scalars over all processes."""
    if process_count() == 1:
        return dict(values)
    stacked = torch.stack([value.detach().float() for value in values.values()])
    dist.all_reduce(stacked)
    return dict(zip(values, (stacked / process_count()).unbind(), strict=True))


def sharded_norm(norm: Tensor, mesh: DeviceMesh | None) -> Tensor:
    """The global norm, a scalar, of tensors of which each process has its shard of that norm."""
    if mesh is None:
        return norm
    square = norm.square()
    dist.all_reduce(square, group=mesh.get_group("fsdp"))
    return square.sqrt()
