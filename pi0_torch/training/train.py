"""Train a model: config, mesh, data, state, step, loop."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule

import convert.tensors
from convert.checkpoints import open_checkpoint
from pi0.datasets.identity import contents_of
from pi0.plugins import require_extra
from pi0.run_config import RecipeConfig, RunConfig
from pi0.storage import as_path
from pi0.training.data import Loader, load_data
from pi0.training.draws import Batch
from pi0.training.metrics import Metrics, Window, require_finite
from pi0.training.preemption import Preempted, Preemption
from pi0.training.trainable import table
from pi0.training.validation import action_dims, show_cameras, validate
from pi0.training.workdir import RunFolder, check_workdir
from pi0_torch.loading import Model, abstract_model, make_model, map_tensors, parameters_of, to_torch
from pi0_torch.training.checkpoints import Checkpoints
from pi0_torch.training.metrics import Trace, device_metrics
from pi0_torch.training.optimizer import Optimizer, accumulate, global_norm, make_optimizer, make_schedule, update_ema
from pi0_torch.training.sharding import (
    agree_to_stop,
    barrier,
    check_batch,
    check_config,
    find_mesh_device,
    local_box,
    local_part,
    local_rows,
    make_mesh,
    mean_over_processes,
    process_index,
    shard,
    sharded_norm,
)
from pi0_torch.training.trainable import join, kernels, shapes, split
from pi0_torch.training.validation import action_metrics
from pi0_torch.training.validation import local_part as local_array

# params (that train), frozen, ema (or None): by name, what this process has of each; opt_state: see `Optimizer`.
State = dict[str, Any]


class Root(nn.Module):
    """A model whose parameters may be sharded; `forward` computes any function of it."""

    def __init__(self, model: Model):
        super().__init__()
        self.model = model

    def forward(self, function: Callable[..., Any], *args: Any) -> Any:
        """`function` of the model and `args`."""
        return function(self.model, *args)

    def parameter_of(self) -> dict[str, nn.Parameter]:
        """The model's parameters by name."""
        return dict(self.model.named_parameters())


def train(
    config: RunConfig,
    workdir: str | Path,
    *,
    profile: bool = False,
    overwrite: bool = False,
    device: str | torch.device | None = None,
    compile: bool = False,
) -> dict[str, float]:
    """Train in `workdir`, resuming from its newest checkpoint if there is one, and return the last metrics.

    Writes `config.json`, `metrics.jsonl`, `tensorboard/`, `images/` and `checkpoints/<step>` to `workdir`, and with
    `profile` a trace of a few steps. With `overwrite`, a run in `workdir` is deleted once this one has a checkpoint.
    `compile` compiles loss and gradients (`torch.compile`), which changes them by rounding. All processes of a run
    call this (`sharding.start_processes`).
    Raises ValueError for a config that cannot run, before anything is written; FloatingPointError for a loss, gradient
    or parameters that are not finite, which are never saved; and Preempted after SIGTERM, once a checkpoint is saved.
    """
    # config
    workdir = as_path(workdir)
    schedule = make_schedule(config.optimizer, config.steps)
    optimizer = make_optimizer(config.optimizer, schedule)
    if config.wandb:
        require_extra("wandb", "wandb")
    check_config(config)
    check_workdir(workdir, config, overwrite, framework="torch")

    # mesh
    place = find_mesh_device(device)
    mesh = make_mesh(config.mesh, place)
    check_batch(config.batch_size, config.accumulate)
    root, state = init_state(config, optimizer, mesh, place)
    lead = process_index() == 0

    # data
    assets, training, validation = load_data(config)
    contents = [contents_of(source) for source in config.data.sources] if lead else []
    load = functools.partial(
        Loader,
        model=config.model,
        rows=local_rows(config.batch_size),
        place=functools.partial(map_tensors, lambda x: torch.as_tensor(x).to(place)),
        workers=config.data.workers,
    )

    with (
        repeatable(),
        RunFolder(workdir, config, overwrite, contents, index=process_index(), barrier=barrier) as folder,
        closing(
            Checkpoints(workdir / "checkpoints", config.keep_checkpoints, config.keep_best, (config.keep_every,))
        ) as checkpoints,
    ):
        # state
        start = checkpoints.restore_newest(state, root.parameter_of())
        if not start:
            fill(state, read_base(config), root)
        if lead:
            whole = root.parameter_of()
            print(table(*(shapes({name: whole[name] for name in state[part]}) for part in ("params", "frozen"))))

        # step
        loss_fn = functools.partial(root, mean_loss)
        step_fn = functools.partial(
            train_step, config, optimizer, root, torch.compile(loss_fn) if compile else loss_fn, mesh
        )
        action_fn = None
        if not config.model.family.action_tokens and config.recipe is None:  # text is evaluated by pi0-eval-offline
            action_fn = functools.partial(root, action_metrics, action_dims(assets))

        # loop
        last: dict[str, float] = {}
        stop = False
        with (
            load(training, start=start) as batches,
            load(validation) if validation else nullcontext() as held_out,
            Metrics(
                workdir, start, config.to_dict(), total_steps=config.steps, wandb=config.wandb, silent=not lead
            ) as metrics,
            Trace(workdir / "profile" if profile else None, start) as trace,
            Preemption(agree_to_stop()) as preempted,
        ):
            window = Window(batches, config.batch_size)
            done = start
            for step in range(start, config.steps):
                batch = next(batches)
                if step == start:
                    flops = count_flops(root, batch, config) if device_metrics(place, 1, 1) else 0.0
                    show_cameras(metrics, {name: local_array(x) for name, x in batch[0].images.items()}, step)
                trace.before(step)
                scalars = step_fn(state, batch)
                trace.after(step, scalars)
                window.rows.append(scalars)
                metrics.advance()
                done = step + 1
                stop = preempted(done)
                log = step == start or done % config.log_every == 0 or done == config.steps
                save = done % config.save_every == 0 or done == config.steps or stop
                if log or save:
                    require_finite(window.rows, done, workdir, training, lead)
                if log:
                    means = window.means(functools.partial(device_metrics, place, flops))
                    means |= {"learning_rate": schedule(step)}
                    metrics.write(done, means)
                    last |= means
                    metrics.publish()
                    window.restart()
                validated: dict[str, float] = {}
                if held_out and config.eval_every and (done % config.eval_every == 0 or done == config.steps):
                    with window.paused(), inference_params(state, root):
                        loss = functools.partial(validation_loss, config, root)
                        validated = validate(held_out, loss, action_fn, local_array, metrics, done)
                        metrics.write(done, validated)
                    last |= validated
                if save:
                    metrics.publish(wait=True)  # not behind the checkpoint: its steps are not done again
                    folder.settle()
                    checkpoints.save(done, state, root.parameter_of(), assets, validated)
                if stop:
                    break
    if stop:
        raise Preempted(f"stopped by a signal after step {done} of {config.steps}; start it again to go on")
    return last


@contextmanager
def repeatable() -> Iterator[None]:
    """Compute the same bits each time, where PyTorch can: a run that goes on is the one left alone."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    filled = torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        torch.utils.deterministic.fill_uninitialized_memory = filled  # type: ignore[attr-defined]


def init_state(
    config: RunConfig, optimizer: Optimizer, mesh: DeviceMesh | None, device: torch.device
) -> tuple[Root, State]:
    """The model on its devices, and the state, whose values are still to be read (`fill`, `Checkpoints.restore`).

    Parameters that are trained are `config.param_dtype`, frozen ones `config.frozen_dtype`. The moving average and the
    optimizer's state are of the trained ones alone.
    """
    model = abstract_model(config.model)
    trained, frozen = split(dict(model.named_parameters()), config.model, config.freeze_pattern)
    for part, dtype in ((trained, config.param_dtype), (frozen, config.frozen_dtype)):
        for parameter in part.values():
            parameter.data = parameter.data.to(getattr(torch, dtype))
            parameter.requires_grad_(part is trained)
    root = Root(model)
    shard(root, model, mesh)
    root.to_empty(device=device)
    local = {name: local_part(p.detach()) for name, p in root.parameter_of().items()}
    params = {name: local[name] for name in trained}
    ema = {name: torch.zeros_like(p) for name, p in params.items()} if config.ema_decay else None
    frozen = {name: local[name] for name in frozen}
    return root, {"params": params, "frozen": frozen, "ema": ema, "opt_state": optimizer.init(params)}


def read_base(config: RunConfig) -> Mapping[str, convert.tensors.Tensor]:
    """The parameters of `config.base_checkpoint`, read lazily; fresh ones where there is none.

    Parameters that the checkpoint lacks are fresh: LoRA, and the action expert for PaliGemma's own weights. Raises what
    `open_checkpoint` does.
    """
    if not config.base_checkpoint:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            return parameters_of(make_model(config.model).state_dict())
    checkpoint = open_checkpoint(config.base_checkpoint, config.model, fresh=config.seed, in_place=True)
    if checkpoint.fresh and process_index() == 0:
        print(f"newly initialized: {len(checkpoint.fresh)} parameters, {checkpoint.fresh[0]} and others")
    return checkpoint.in_layout("pi0_torch")


@torch.no_grad()
def fill(state: State, base: Mapping[str, convert.tensors.Tensor], root: Root) -> None:
    """Set the parameters of a state to those of `base`, of which each process reads its part, and start its average."""
    parameters = root.parameter_of()
    for name, local in join(state["params"], state["frozen"]).items():
        local.copy_(to_torch(base[name].part(local_box(parameters[name]))))
    if state["ema"] is not None:
        for name, average in state["ema"].items():
            average.copy_(state["params"][name])


@contextmanager
def inference_params(state: State, root: Root) -> Iterator[None]:
    """Give the model the parameters that are evaluated, the moving average where there is one."""

    @torch.no_grad()
    def swap() -> None:
        for module in root.modules():
            if isinstance(module, FSDPModule):
                module.reshard()
        for name, average in (state["ema"] or {}).items():
            kept = state["params"][name].clone()
            state["params"][name].copy_(average)
            average.copy_(kept)

    swap()
    try:
        yield
    finally:
        swap()


def mean_loss(model: Model, batch: Batch, recipe: RecipeConfig | None = None) -> tuple[Tensor, dict[str, Tensor]]:
    """The mean loss of a batch, a scalar, and a recipe's parts.

    The loss is the weighted sum of its parts; each is the mean over the whole batch, to which an example without it
    adds nothing.
    """
    observation, actions, (noise, time, delay) = batch
    losses = model.loss_parts(observation, actions, noise, time, recipe, delay)
    parts = {name: loss.mean() for name, loss in losses.items()}
    if recipe is None:
        return torch.stack(list(parts.values())).sum(), {}
    loss = torch.stack([recipe.weights[name] * part for name, part in parts.items()]).sum()
    return loss, {f"{name}_loss": part for name, part in parts.items()}


def train_step(
    config: RunConfig,
    optimizer: Optimizer,
    root: Root,
    loss_fn: Callable[..., tuple[Tensor, dict[str, Tensor]]],
    mesh: DeviceMesh | None,
    state: State,
    batch: Batch,
) -> dict[str, Tensor]:
    """One update of the state, in place; returns its scalars.

    `param_norm` is the global norm of all parameters that train; `kernel_norm` is what openpi logs as `param_norm`:
    that of kernels and LoRA alone, frozen ones too, without embeddings, norms and biases.
    """
    parameters = root.parameter_of()
    for parameter in parameters.values():
        parameter.grad = None

    def value_and_grad(rows: Batch) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        loss, parts = loss_fn(rows, config.recipe)
        loss.backward()
        grads = {}
        for name in state["params"]:
            if parameters[name].grad is None:  # it has no part in the loss
                parameters[name].grad = torch.zeros_like(parameters[name])
            grads[name] = local_part(parameters[name].grad)
        return {"loss": loss.detach(), **parts}, grads

    values, grads = accumulate(value_and_grad, batch, config.accumulate)
    with torch.no_grad():
        grad_norm = sharded_norm(global_norm(grads), mesh)
        optimizer.update(grads, grad_norm, state["opt_state"], state["params"])
        if state["ema"] is not None and config.ema_decay is not None:
            update_ema(state["ema"], state["params"], config.ema_decay)
        norms = {"param_norm": state["params"]}
        norms |= {"kernel_norm": kernels(join(state["params"], state["frozen"]), config.model)}
        scalars = {name: sharded_norm(global_norm(tensors), mesh) for name, tensors in norms.items()}
    loss = mean_over_processes({name: value.detach() for name, value in values.items()})
    return {"loss": loss.pop("loss"), "grad_norm": grad_norm, **scalars, **loss}


@torch.no_grad()
def validation_loss(config: RunConfig, root: Root, batch: Batch) -> Tensor:
    """The mean loss of a batch, a scalar."""
    return mean_over_processes({"loss": root(mean_loss, batch, config.recipe)[0]})["loss"]


def count_flops(root: Root, batch: Batch, config: RunConfig) -> float:
    """Operations of the loss and its gradient on this device's rows, without what is computed again."""
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        root(mean_loss, batch, config.recipe)[0].backward()
    return float(counter.get_total_flops())
