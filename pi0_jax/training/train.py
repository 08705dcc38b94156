"""Train a model: config, mesh, data, state, step, loop."""

from __future__ import annotations

import functools
from contextlib import closing, nullcontext
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

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
from pi0_jax.loading import Model, flatten, make_model, merge, unflatten
from pi0_jax.planning import hlo
from pi0_jax.training.checkpoints import Checkpoints
from pi0_jax.training.exports import Exports
from pi0_jax.training.metrics import Trace, device_metrics
from pi0_jax.training.optimizer import accumulate, make_optimizer, make_schedule, update_ema
from pi0_jax.training.sharding import (
    agree_to_stop,
    barrier,
    check_batch,
    check_remat,
    global_batch,
    local_box,
    local_rows,
    make_mesh,
    state_shardings,
)
from pi0_jax.training.trainable import join, kernels, shapes, split
from pi0_jax.training.validation import action_metrics, local_part

State = dict[str, Any]  # params (that train), frozen, ema (or None), opt_state: plain nested dicts of arrays


def train(
    config: RunConfig, workdir: str | Path, *, profile: bool = False, overwrite: bool = False
) -> dict[str, float]:
    """Train in `workdir`, resuming from its newest checkpoint if there is one, and return the last metrics.

    Writes `config.json`, `metrics.jsonl`, `tensorboard/`, `images/`, `checkpoints/<step>` and, of checkpoints that are
    exported, `exports/<step>` to `workdir`, and with `profile` a trace of a few steps. With `overwrite`, a run in
    `workdir` is deleted once this one has a checkpoint.
    Raises ValueError for a config that cannot run, before anything is written; FloatingPointError for a loss, gradient
    or parameters that are not finite, which are never saved; and Preempted after SIGTERM, once a checkpoint is saved.
    """
    # config
    workdir = as_path(workdir)
    schedule = make_schedule(config.optimizer, config.steps)
    optimizer = make_optimizer(config.optimizer, schedule)
    if config.wandb:
        require_extra("wandb", "wandb")
    if config.export_every:
        require_extra("torch", "torch")
    check_workdir(workdir, config, overwrite, framework="jax")

    # mesh
    mesh = make_mesh(config.mesh)
    check_batch(config.batch_size, config.accumulate, mesh)
    check_remat(config.model.runtime.remat, mesh)
    init = functools.partial(init_state, config, optimizer)
    wanted = jax.eval_shape(init)
    shardings = state_shardings(wanted, config.model, config.sharding, mesh)
    lead = jax.process_index() == 0

    # data
    assets, training, validation = load_data(config)
    contents = [contents_of(source) for source in config.data.sources] if lead else []
    load = functools.partial(
        Loader,
        model=config.model,
        rows=local_rows(config.batch_size, mesh),
        place=functools.partial(global_batch, batch_size=config.batch_size, mesh=mesh),
        workers=config.data.workers,
    )

    kept = (config.keep_every, config.export_every)
    with (
        RunFolder(workdir, config, overwrite, contents, index=jax.process_index(), barrier=barrier) as folder,
        closing(Checkpoints(workdir / "checkpoints", config.keep_checkpoints, config.keep_best, kept)) as checkpoints,
    ):
        # state
        abstract = jax.tree.map(
            lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), wanted, shardings
        )
        start, state = checkpoints.restore_newest(abstract)
        if not start:
            base = read_base(config, join(shardings["params"], shardings["frozen"]))
            state = jax.jit(init, out_shardings=shardings)(base)
        if lead:
            print(table(shapes(abstract["params"]), shapes(abstract["frozen"])))

        # step
        step_fn = jax.jit(
            functools.partial(train_step, config, optimizer), donate_argnums=0, out_shardings=(shardings, None)
        )
        loss_fn = jax.jit(functools.partial(validation_loss, config))
        action_fn = None
        if not config.model.family.action_tokens and config.recipe is None:  # text is evaluated by pi0-eval-offline
            action_fn = jax.jit(functools.partial(action_metrics, config.model, action_dims(assets)))

        # loop
        last: dict[str, float] = {}
        stop = False
        with (
            jax.set_mesh(mesh),
            load(training, start=start) as batches,
            load(validation) if validation else nullcontext() as held_out,
            Metrics(
                workdir, start, config.to_dict(), total_steps=config.steps, wandb=config.wandb, silent=not lead
            ) as metrics,
            Exports(workdir, config, checkpoints, metrics, silent=not lead) as exports,
            Trace(workdir / "profile" if profile else None, start) as trace,
            Preemption(agree_to_stop(), catch=jax.process_count() == 1) as preempted,
        ):
            window = Window(batches, config.batch_size)
            done = start
            for step in range(start, config.steps):
                batch = next(batches)
                if step == start:
                    compiled = step_fn.lower(state, batch).compile()
                    barrier("compiled")
                    flops = hlo.count(compiled.as_text() or "").flops if device_metrics(1, 1) else 0.0
                    show_cameras(metrics, {name: local_part(x) for name, x in batch[0].images.items()}, step)
                trace.before(step)
                state, scalars = compiled(state, batch)
                trace.after(step, scalars)
                window.rows.append(scalars)
                metrics.advance()
                done = step + 1
                stop = preempted(done)
                log = step == start or done % config.log_every == 0 or done == config.steps
                save = done % config.save_every == 0 or done == config.steps or stop
                if log or save:
                    require_finite(jax.device_get(window.rows), done, workdir, training, lead)
                if log:
                    means = window.means(functools.partial(device_metrics, flops))
                    means |= {"learning_rate": float(schedule(step))}
                    metrics.write(done, means)
                    last |= means
                    metrics.publish()
                    window.restart()
                validated: dict[str, float] = {}
                if held_out and config.eval_every and (done % config.eval_every == 0 or done == config.steps):
                    with window.paused():
                        params = inference_params(state)
                        loss = functools.partial(loss_fn, params)
                        actions = functools.partial(action_fn, params) if action_fn else None
                        validated = validate(held_out, loss, actions, local_part, metrics, done)
                        metrics.write(done, validated)
                    last |= validated
                if save:
                    metrics.publish(wait=True)  # not behind the checkpoint: its steps are not done again
                    folder.settle()
                    checkpoints.save(done, inference_params(state), state, assets, validated)
                    exports.start(done)
                last |= exports.log()
                if stop:
                    break
            if config.export_every and not stop:
                last |= exports.wait(lambda: preempted.signalled)
                barrier("exports")
                stop = preempted.signalled
    if stop:
        raise Preempted(f"stopped by a signal after step {done} of {config.steps}; start it again to go on")
    return last


def init_state(config: RunConfig, optimizer: optax.GradientTransformation, base: dict[str, Any] | None = None) -> State:
    """The initial state from the parameters `base`, or from fresh ones.

    Parameters that are trained are `config.param_dtype`, frozen ones `config.frozen_dtype`. The moving average and the
    optimizer's state are of the trained ones alone.
    """
    if base is None:
        base = nnx.to_pure_dict(nnx.state(make_model(config.model, rngs=nnx.Rngs(config.seed))))
    params, frozen = split(base, config.freeze_pattern)
    params = jax.tree.map(lambda x: x.astype(config.param_dtype), params)
    frozen = jax.tree.map(lambda x: x.astype(config.frozen_dtype), frozen)
    ema = jax.tree.map(jnp.copy, params) if config.ema_decay else None
    return {"params": params, "frozen": frozen, "ema": ema, "opt_state": optimizer.init(params)}


def read_base(config: RunConfig, shardings: dict[str, Any]) -> dict[str, Any] | None:
    """The nested parameters of `config.base_checkpoint`, in their shardings; None where there is none.

    Each process reads the parts that its devices hold, of a bucket straight from there. Parameters that the checkpoint
    lacks are fresh: LoRA, and the action expert for PaliGemma's own weights. Raises what `open_checkpoint` does.
    """
    if not config.base_checkpoint:
        return None
    checkpoint = open_checkpoint(config.base_checkpoint, config.model, fresh=config.seed, in_place=True)
    if checkpoint.fresh and jax.process_index() == 0:
        print(f"newly initialized: {len(checkpoint.fresh)} parameters, {checkpoint.fresh[0]} and others")
    placed = flatten(shardings)

    def place(name: str) -> jax.Array:
        tensor, sharding = checkpoint.ours[name], placed[name]
        box = local_box(sharding, tensor.shape)
        array, start = tensor.part(box), [axis.start for axis in box]

        def piece(index: Any) -> np.ndarray:
            bounds = (axis.indices(size)[:2] for axis, size in zip(index, tensor.shape, strict=True))
            return array[tuple(slice(a - at, b - at) for (a, b), at in zip(bounds, start, strict=True))]

        return jax.make_array_from_callback(tensor.shape, sharding, piece)

    return unflatten({name: place(name) for name in checkpoint.ours})


def inference_params(state: State) -> Any:
    """The parameters that are evaluated and exported: the moving average where there is one, and frozen ones."""
    return join(state["params"] if state["ema"] is None else state["ema"], state["frozen"])


def mean_loss(
    model: Model,
    batch: Batch,
    recipe: RecipeConfig | None = None,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """The mean loss of a batch, a scalar, and a recipe's parts.

    The loss is the weighted sum of its parts; each is the mean over the whole batch, to which an example without it
    adds nothing.
    """
    observation, actions, (noise, time, delay) = batch
    losses = model.loss_parts(observation, actions, noise, time, recipe, delay)
    parts = {name: loss.mean() for name, loss in losses.items()}
    if recipe is None:
        return jnp.stack(list(parts.values())).sum(), {}
    loss = jnp.stack([recipe.weights[name] * part for name, part in parts.items()]).sum()
    return loss, {f"{name}_loss": part for name, part in parts.items()}


def train_step(
    config: RunConfig,
    optimizer: optax.GradientTransformation,
    state: State,
    batch: Batch,
) -> tuple[State, dict[str, jax.Array]]:
    """One update; returns the new state and its scalars.

    `param_norm` is the global norm of all parameters that train; `kernel_norm` is what openpi logs as `param_norm`:
    that of kernels and LoRA alone, frozen ones too, without embeddings, norms and biases.
    """

    def loss_of(params: Any, rows: Batch) -> tuple[jax.Array, dict[str, jax.Array]]:
        return mean_loss(merge(config.model, join(params, state["frozen"])), rows, config.recipe)

    value_and_grad = jax.value_and_grad(loss_of, has_aux=True)
    (loss, parts), grads = accumulate(value_and_grad, state["params"], batch, config.accumulate)
    updates, opt_state = optimizer.update(grads, state["opt_state"], state["params"])
    params = optax.apply_updates(state["params"], updates)
    decay = config.ema_decay
    ema = update_ema(state["ema"], params, decay) if state["ema"] is not None and decay is not None else None
    norms = {"grad_norm": grads, "param_norm": params, "kernel_norm": kernels(join(params, state["frozen"]))}
    scalars = {"loss": loss} | {name: optax.tree.norm(tree) for name, tree in norms.items()} | parts
    return {"params": params, "frozen": state["frozen"], "ema": ema, "opt_state": opt_state}, scalars


def validation_loss(config: RunConfig, params: Any, batch: Batch) -> jax.Array:
    """The mean loss of a batch, a scalar."""
    return mean_loss(merge(config.model, params), batch, config.recipe)[0]
