"""Train a model: config, mesh, data, state, step, loop."""

from __future__ import annotations

import functools
import json
from contextlib import closing, nullcontext
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from convert.checkpoints import open_checkpoint
from pi0 import numerics
from pi0.datasets.batches import Batches
from pi0.datasets.identity import contents_of
from pi0.observation import Observation
from pi0.plugins import require_extra
from pi0.policy.rtc import RTCTraining
from pi0.run_config import RecipeConfig, RunConfig
from pi0.storage import as_path, write_text
from pi0_jax.loading import Model, flatten, make_model, merge, unflatten
from pi0_jax.planning import hlo
from pi0_jax.training.checkpoints import Checkpoints
from pi0_jax.training.data import Loader, load_data
from pi0_jax.training.exports import Exports
from pi0_jax.training.metrics import Metrics, Trace, Window, device_metrics
from pi0_jax.training.optimizer import accumulate, make_optimizer, make_schedule, update_ema
from pi0_jax.training.preemption import Preempted, Preemption
from pi0_jax.training.sharding import (
    barrier,
    check_batch,
    check_remat,
    global_batch,
    local_box,
    local_rows,
    make_mesh,
    state_shardings,
)
from pi0_jax.training.trainable import join, kernels, split, table
from pi0_jax.training.validation import action_dims, action_metrics, show_cameras, validate
from pi0_jax.training.workdir import RunFolder, check_workdir

FINITE = {"loss": "loss", "grad_norm": "gradient", "param_norm": "norm of the parameters"}
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
    check_workdir(workdir, config, overwrite)

    # mesh
    mesh = make_mesh(config.mesh)
    check_batch(config.batch_size, config.accumulate, mesh)
    check_remat(config.model.runtime.remat, mesh)
    init = functools.partial(init_state, config, optimizer)
    shapes = jax.eval_shape(init)
    shardings = state_shardings(shapes, config.model, config.sharding, mesh)
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
        RunFolder(workdir, config, overwrite, contents) as folder,
        closing(Checkpoints(workdir / "checkpoints", config.keep_checkpoints, config.keep_best, kept)) as checkpoints,
    ):
        # state
        abstract = jax.tree.map(
            lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), shapes, shardings
        )
        start, state = checkpoints.restore_newest(abstract)
        if not start:
            base = read_base(config, join(shardings["params"], shardings["frozen"]))
            state = jax.jit(init, out_shardings=shardings)(base)
        if lead:
            print(table(abstract["params"], abstract["frozen"]))

        # step
        step_fn = jax.jit(
            functools.partial(train_step, config, optimizer), donate_argnums=0, out_shardings=(shardings, None)
        )
        loss_fn = jax.jit(functools.partial(validation_loss, config))
        action_fn = None
        if not config.model.family.action_tokens and config.recipe is None:  # text is evaluated by pi0-eval-offline
            action_fn = jax.jit(functools.partial(action_metrics, config.model, action_dims(assets)))
        key = jax.random.key(config.seed)

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
            Preemption() as preempted,
        ):
            window = Window(batches, config.batch_size)
            done = start
            for step in range(start, config.steps):
                batch = next(batches)
                if step == start:
                    compiled = step_fn.lower(state, batch, key).compile()
                    barrier("compiled")
                    flops = hlo.count(compiled.as_text() or "").flops if device_metrics(1, 1) else 0.0
                    show_cameras(metrics, batch[0], step)
                trace.before(step)
                state, scalars = compiled(state, batch, jax.random.fold_in(key, step))
                trace.after(step, scalars)
                window.rows.append(scalars)
                metrics.advance()
                done = step + 1
                stop = preempted(done)
                log = step == start or done % config.log_every == 0 or done == config.steps
                save = done % config.save_every == 0 or done == config.steps or stop
                if log or save:
                    require_finite(window.rows, done, workdir, training)
                if log:
                    means = window.means(flops) | {"learning_rate": float(schedule(step))}
                    metrics.write(done, means)
                    last |= means
                    metrics.publish()
                    window.restart()
                validated: dict[str, float] = {}
                if held_out and config.eval_every and (done % config.eval_every == 0 or done == config.steps):
                    with window.paused():
                        validated = validate(inference_params(state), held_out, loss_fn, action_fn, metrics, done)
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


def require_finite(rows: list[dict[str, jax.Array]], done: int, workdir: Path, training: Batches) -> None:
    """Raise FloatingPointError unless loss, gradient norm and parameter norm of the steps up to `done` are finite.

    `rows` are the scalars of these steps. The frames of the first bad step's batch are written to `non_finite.json`.
    """
    finite = {name: np.isfinite(jax.device_get([row[name] for row in rows])) for name in FINITE}
    if all(x.all() for x in finite.values()):
        return
    what = min((name for name, x in finite.items() if not x.all()), key=lambda name: int(np.argmin(finite[name])))
    step = done - len(rows) + int(np.argmin(finite[what]))
    frames = [{"dataset": dataset, "frame": frame} for dataset, frame in training.frames(step)]
    if jax.process_index() == 0:
        write_text(workdir / "non_finite.json", json.dumps({"step": step, "frames": frames}, indent=2) + "\n")
    raise FloatingPointError(
        f"the {FINITE[what]} of step {step + 1} is not finite, and nothing was saved after it; its frames are in "
        f"{workdir / 'non_finite.json'}. Look at them and at the norm stats (pi0-stats warns of dimensions that hardly "
        "vary), or lower optimizer.peak_lr"
    )


def init_state(config: RunConfig, optimizer: optax.GradientTransformation, base: dict[str, Any] | None = None) -> State:
    """The initial state from the parameters `base`, or from fresh ones.

    Parameters that are trained are float32, frozen ones `config.frozen_dtype`. The moving average and the optimizer's
    state are of the trained ones alone.
    """
    if base is None:
        base = nnx.to_pure_dict(nnx.state(make_model(config.model, rngs=nnx.Rngs(config.seed))))
    params, frozen = split(base, config.freeze_pattern)
    params = jax.tree.map(lambda x: x.astype(jnp.float32), params)
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


def noise_and_time(key: jax.Array, actions: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Gaussian noise [B, T, A] and flow time [B] = Beta(1.5, 1)·0.999 + 0.001 (openpi `Pi0.compute_loss`)."""
    noise_key, time_key = jax.random.split(key)
    time = jax.random.beta(time_key, *numerics.TIME_BETA, actions.shape[:1])
    return jax.random.normal(noise_key, actions.shape), time * numerics.TIME_SCALE + numerics.TIME_OFFSET


def delays(key: jax.Array, batch_size: int, rtc: RTCTraining | None) -> jax.Array | None:
    """The delay of each example [B], for real-time chunking; None where none is trained.

    Noise and times are as without delays: they are drawn from `key` split in two, the delays from a third part.
    """
    if rtc is None or not rtc.max_delay:
        return None
    probabilities = jnp.asarray(rtc.probabilities())
    return jax.random.choice(jax.random.fold_in(key, 2), rtc.max_delay + 1, (batch_size,), p=probabilities)


def mean_loss(
    model: Model,
    batch: tuple[Observation, jax.Array],
    drawn: tuple[jax.Array, jax.Array, jax.Array | None],
    recipe: RecipeConfig | None = None,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """The mean loss of a batch, given the noise [B, T, A], flow times [B] and delays [B] `drawn`; and a recipe's parts.

    The loss is the weighted sum of its parts; each is the mean over the whole batch, to which an example without it
    adds nothing.
    """
    noise, time, delay = drawn
    parts = {name: loss.mean() for name, loss in model.loss_parts(*batch, noise, time, recipe, delay).items()}
    if recipe is None:
        return jnp.stack(list(parts.values())).sum(), {}
    loss = jnp.stack([recipe.weights[name] * part for name, part in parts.items()]).sum()
    return loss, {f"{name}_loss": part for name, part in parts.items()}


def train_step(
    config: RunConfig,
    optimizer: optax.GradientTransformation,
    state: State,
    batch: tuple[Observation, jax.Array],
    key: jax.Array,
) -> tuple[State, dict[str, jax.Array]]:
    """One update; returns the new state and its scalars.

    `param_norm` is the global norm of all parameters that train; `kernel_norm` is what openpi logs as `param_norm`:
    that of kernels and LoRA alone, frozen ones too, without embeddings, norms and biases.
    """

    def loss_of(params: Any, rows: tuple[Any, Any]) -> tuple[jax.Array, dict[str, jax.Array]]:
        return mean_loss(merge(config.model, join(params, state["frozen"])), *rows, config.recipe)

    drawn = (*noise_and_time(key, batch[1]), delays(key, len(batch[1]), config.rtc))
    rows = (batch, drawn)  # drawn for the whole batch: it may be cut in any way
    value_and_grad = jax.value_and_grad(loss_of, has_aux=True)
    (loss, parts), grads = accumulate(value_and_grad, state["params"], rows, config.accumulate)
    updates, opt_state = optimizer.update(grads, state["opt_state"], state["params"])
    params = optax.apply_updates(state["params"], updates)
    decay = config.ema_decay
    ema = update_ema(state["ema"], params, decay) if state["ema"] is not None and decay is not None else None
    norms = {"grad_norm": grads, "param_norm": params, "kernel_norm": kernels(join(params, state["frozen"]))}
    scalars = {"loss": loss} | {name: optax.tree.norm(tree) for name, tree in norms.items()} | parts
    return {"params": params, "frozen": state["frozen"], "ema": ema, "opt_state": opt_state}, scalars


def validation_loss(config: RunConfig, params: Any, batch: tuple[Observation, jax.Array]) -> jax.Array:
    """The mean loss of a batch, with the same noise and times at every evaluation, and no delays."""
    noise, time = noise_and_time(jax.random.key(0), batch[1])
    return mean_loss(merge(config.model, params), batch, (noise, time, None), config.recipe)[0]
