"""Train a model: config, mesh, data, state, step, loop."""

from __future__ import annotations

import argparse
import functools
import json
import logging
import shutil
import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax
from absl import flags
from flax import nnx
from ml_collections import config_flags

from convert.checkpoints import open_checkpoint
from pi0 import numerics
from pi0.assets import Assets
from pi0.command import output_path
from pi0.config import ConfigError, ModelConfig
from pi0.datasets.batches import Batches
from pi0.observation import Observation
from pi0.plots import plot_actions, plot_cameras
from pi0.run_config import RecipeConfig
from pi0.storage import local_path
from pi0_jax.loading import Model, flatten, make_model, merge, unflatten
from pi0_jax.models.pi0_fast import Pi0Fast
from pi0_jax.models.pi05 import Pi05
from pi0_jax.planning import hlo
from pi0_jax.training.checkpoints import Checkpoints
from pi0_jax.training.data import Loader, load_data
from pi0_jax.training.metrics import Metrics, Trace, Window, check_wandb, device_metrics
from pi0_jax.training.optimizer import accumulate, make_optimizer, make_schedule, update_ema
from pi0_jax.training.preemption import Preempted, Preemption
from pi0_jax.training.sharding import (
    check_batch,
    global_batch,
    local_rows,
    make_mesh,
    meet,
    start_processes,
    state_shardings,
)
from pi0_jax.training.trainable import freeze_pattern, join, split, table
from pi0_jax.training.validation import action_metrics

SHOWN = 4  # rows of a batch in pictures

State = dict[str, Any]  # params (that train), frozen, ema (or None), opt_state: plain nested dicts of arrays


def train(config: ml_collections.ConfigDict, workdir: str | Path, *, profile: bool = False) -> dict[str, float]:
    """Run an experiment in `workdir`, going on from its newest checkpoint if there is one.

    Leaves `config.json`, `metrics.jsonl`, `tensorboard/`, `pictures/` and `checkpoints/<step>` in `workdir`, with
    `profile` a trace of a few steps too, and returns the last metrics. Raises ValueError for a config that cannot run,
    before anything is written, FloatingPointError where the loss is not finite, and Preempted where SIGTERM stopped it,
    once it has saved.
    """
    # config
    workdir = local_path(workdir)
    model_config = ModelConfig.from_dict(config.model.to_dict())
    schedule = make_schedule(config.optimizer, config.steps)
    optimizer = make_optimizer(config.optimizer, schedule)
    freeze = freeze_pattern(model_config, config.freeze)
    recipe = read_recipe(config, model_config)

    check_wandb(config.wandb)
    check_same_run(workdir, config)

    # mesh
    mesh = make_mesh(config.mesh)
    check_batch(config.batch_size, config.accumulate, mesh)
    init = functools.partial(init_state, config, model_config, optimizer, freeze)
    shardings = state_shardings(jax.eval_shape(init), model_config, config.sharding, mesh)
    lead = jax.process_index() == 0

    # data
    assets, training, validation = load_data(config, model_config)
    load = functools.partial(
        Loader,
        model=model_config,
        rows=local_rows(config.batch_size, mesh),
        place=functools.partial(global_batch, batch_size=config.batch_size, mesh=mesh),
        workers=config.data.workers,
    )

    # state
    workdir.mkdir(parents=True, exist_ok=True)
    if lead:
        (workdir / "config.json").write_text(json.dumps(config.to_dict(), indent=2) + "\n")
    checkpoints = Checkpoints(workdir / "checkpoints", config.keep_checkpoints, config.keep_best, config.keep_every)
    abstract = jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), jax.eval_shape(init), shardings
    )
    start, state = checkpoints.restore_newest(abstract)
    if not start:
        base = read_base(config, model_config, join(shardings["params"], shardings["frozen"]))
        state = jax.jit(init, out_shardings=shardings)(base)
    if lead:
        print(table(abstract["params"], abstract["frozen"]))

    # step
    step_fn = jax.jit(
        functools.partial(train_step, config, model_config, optimizer),
        donate_argnums=0,
        out_shardings=(shardings, None),
    )
    loss_fn = jax.jit(functools.partial(validation_loss, model_config, recipe))
    action_fn = None
    if model_config.kind != "pi0_fast" and recipe is None:  # what writes text is scored by pi0-eval-offline
        action_fn = jax.jit(functools.partial(action_metrics, model_config, action_dims(assets)))
    key = jax.random.key(config.seed)

    # loop
    last: dict[str, float] = {}
    with (
        jax.set_mesh(mesh),
        load(training, start=start) as batches,
        load(validation) if validation else nullcontext() as held_out,
        Metrics(
            workdir, start, config.to_dict(), total_steps=config.steps, wandb=config.wandb, silent=not lead
        ) as metrics,
        Trace(workdir / "profile" if profile else None, start) as trace,
        Preemption() as preempted,
    ):
        window = Window(batches, config.batch_size)
        for step in range(start, config.steps):
            batch = next(batches)
            if step == start:
                compiled = step_fn.lower(state, batch, key).compile()
                meet("compiled")
                flops = hlo.count(compiled.as_text() or "").flops if device_metrics(1, 1) else 0.0
                show_cameras(metrics, batch[0], step)
            trace.before(step)
            state, scalars = compiled(state, batch, jax.random.fold_in(key, step))
            trace.after(step, scalars)
            window.rows.append(scalars)
            metrics.advance()
            done = step + 1
            if step == start or done % config.log_every == 0 or done == config.steps:
                means = window.means(flops) | {"learning_rate": float(schedule(step))}
                if not np.isfinite(means["loss"]):
                    bad = next(i for i, row in enumerate(window.rows) if not np.isfinite(row["loss"]))
                    raise not_finite(workdir, done - len(window.rows) + bad, training)
                metrics.write(done, means)
                last |= means
                window.restart()
            if held_out and config.eval_every and (done % config.eval_every == 0 or done == config.steps):
                with window.paused():
                    scalars = validate(inference_params(state), held_out, loss_fn, action_fn, metrics, done)
                    metrics.write(done, scalars)
                last |= scalars
            stop = preempted(done)
            if done % config.save_every == 0 or done == config.steps or stop:
                checkpoints.save(done, inference_params(state), state, assets, last)
            if stop:
                break
        checkpoints.close()
    if start < config.steps and stop:
        raise Preempted(f"stopped by a signal after step {done} of {config.steps}; start it again to go on")
    return last


def validate(
    params: Any,
    held_out: Loader,
    loss_fn: Callable[[Any, Any], jax.Array],
    action_fn: Callable[[Any, Any], tuple[dict[str, jax.Array], jax.Array]] | None,
    metrics: Metrics,
    step: int,
) -> dict[str, float]:
    """The mean loss over all held-out frames, and of the first batch what `action_metrics` gives, drawn too."""
    losses, scalars = [], {}
    for i, batch in enumerate(held_out.one_pass()):
        losses.append(loss_fn(params, batch))
        if i == 0 and action_fn is not None:
            found, sampled = action_fn(params, batch)
            scalars = {name: float(value) for name, value in found.items()}
            show_actions(metrics, batch[1], sampled, step)
    return {"validation_loss": float(np.mean(losses)), **scalars}


def action_dims(assets: Assets) -> int:
    """How many of the model's action dimensions the robot has."""
    assert assets.norm_stats is not None
    return min(len(assets.norm_stats["actions"].mean), assets.model.action_dim)


def show_cameras(metrics: Metrics, observation: Observation, step: int) -> None:
    """Draw what the model sees of this process's first rows, augmented as it is."""
    file = metrics.picture("cameras", step)
    if file is not None:
        plot_cameras({name: local_part(x)[:SHOWN] for name, x in observation.images.items()}, file)
        metrics.show("cameras", step, file)


def show_actions(metrics: Metrics, recorded: jax.Array, sampled: jax.Array, step: int) -> None:
    """Draw the first rows' recorded and sampled chunks, one after the other, in normalized units."""
    file = metrics.picture("actions", step)
    if file is not None:
        dims = sampled.shape[-1]
        chunks = [local_part(x)[:SHOWN, :, :dims].reshape(-1, dims) for x in (recorded, sampled)]
        names, title = [f"action {i}" for i in range(dims)], f"{SHOWN} held-out chunks, step {step}"
        plot_actions(chunks[0], {"sampled": chunks[1]}, names, file, title)
        metrics.show("actions", step, file)


def local_part(x: jax.Array) -> np.ndarray:
    """The rows of a batch that lie on this process's first device."""
    return np.asarray(x.addressable_data(0))


def not_finite(workdir: Path, step: int, training: Batches) -> FloatingPointError:
    """The error for a loss that is not finite; which frames it was of is left in `non_finite.json`."""
    frames = [{"dataset": dataset, "frame": frame} for dataset, frame in training.frames(step)]
    if jax.process_index() == 0:
        (workdir / "non_finite.json").write_text(json.dumps({"step": step, "frames": frames}, indent=2) + "\n")
    return FloatingPointError(
        f"the loss of step {step + 1} is not finite; its frames are in {workdir / 'non_finite.json'}. Look at them and "
        "at the norm stats (pi0-stats warns of dimensions that hardly vary), or lower optimizer.peak_lr"
    )


def check_same_run(workdir: Path, config: ml_collections.ConfigDict) -> None:
    """Raise ValueError where `workdir` has a run of another config, but for what does not change its result."""
    file = workdir / "config.json"
    if not file.exists():
        return
    free = ("steps", "log_every", "eval_every", "save_every", "keep_", "mesh", "sharding", "wandb", "data.workers")
    before, now = (flatten(json.loads(text)) for text in (file.read_text(), json.dumps(config.to_dict())))
    names = sorted(before.keys() | now.keys())
    changed = [n for n in names if before.get(n) != now.get(n) and not n.startswith(free)]
    if changed:
        said = ", ".join(f"{n} was {before.get(n)!r} and is {now.get(n)!r}" for n in changed[:5])
        raise ValueError(f"{workdir} has a run of another config: {said}; choose another --workdir, or --overwrite it")


def read_recipe(config: ml_collections.ConfigDict, model: ModelConfig) -> RecipeConfig | None:
    """The weights of π0.5's losses, where the config has a recipe. Raises ConfigError for one that cannot be."""
    if not config.get("recipe"):
        return None
    if model.kind != "pi05":
        raise ConfigError(f"a recipe is π0.5's; the model's kind is {model.kind}")
    recipe = RecipeConfig.from_dict(config.recipe.to_dict())
    if recipe.fast_weight and not config.data.get("action_tokenizer"):
        raise ConfigError("recipe.fast_weight needs data.action_tokenizer, the FAST tokens' (pi0-fit-fast makes one)")
    return recipe


def init_state(
    config: ml_collections.ConfigDict,
    model: ModelConfig,
    optimizer: optax.GradientTransformation,
    freeze: str,
    base: dict[str, Any] | None = None,
) -> State:
    """The parameters `base`, or fresh ones; for those that train, their moving average and the optimizer's state.

    What trains is float32, what is frozen `config.frozen_dtype`.
    """
    if base is None:
        base = nnx.to_pure_dict(nnx.state(make_model(model, rngs=nnx.Rngs(config.seed))))
    params, frozen = split(base, freeze)
    params = jax.tree.map(lambda x: x.astype(jnp.float32), params)
    frozen = jax.tree.map(lambda x: x.astype(config.frozen_dtype), frozen)
    ema = jax.tree.map(jnp.copy, params) if config.ema_decay else None
    return {"params": params, "frozen": frozen, "ema": ema, "opt_state": optimizer.init(params)}


def read_base(
    config: ml_collections.ConfigDict, model: ModelConfig, shardings: dict[str, Any]
) -> dict[str, Any] | None:
    """Where a fine-tuning starts: the parameters of any checkpoint, nested and in their shardings.

    What it lacks of `model` is new: LoRA, and the action expert where it is PaliGemma's own weights. None where the
    config names no `base_checkpoint`. Raises what `open_checkpoint` does.
    """
    if not config.base_checkpoint:
        return None
    checkpoint = open_checkpoint(config.base_checkpoint, model, fresh=config.seed)
    if checkpoint.fresh and jax.process_index() == 0:
        print(f"newly initialized: {len(checkpoint.fresh)} parameters, {checkpoint.fresh[0]} and others")
    placed = flatten(shardings)

    def place(name: str) -> jax.Array:
        array = checkpoint.ours[name].read(())
        return jax.make_array_from_callback(array.shape, placed[name], lambda index: array[index])

    return unflatten({name: place(name) for name in checkpoint.ours})


def inference_params(state: State) -> Any:
    """What is evaluated and exported: the moving average where there is one, and what is frozen."""
    return join(state["params"] if state["ema"] is None else state["ema"], state["frozen"])


def noise_and_time(key: jax.Array, actions: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Gaussian noise [B, T, A] and flow time [B] = Beta(1.5, 1)·0.999 + 0.001 (openpi `Pi0.compute_loss`)."""
    noise_key, time_key = jax.random.split(key)
    time = jax.random.beta(time_key, *numerics.TIME_BETA, actions.shape[:1])
    return jax.random.normal(noise_key, actions.shape), time * numerics.TIME_SCALE + numerics.TIME_OFFSET


def mean_loss(
    model: Model,
    batch: tuple[Observation, jax.Array],
    drawn: tuple[jax.Array, jax.Array],
    recipe: RecipeConfig | None = None,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """The mean loss of a batch, with the noise and times `drawn` for it where the model flows; and a recipe's parts.

    A recipe's loss is the weighted sum of its parts; each is the mean over the whole batch, to which an example without
    it adds nothing.
    """
    observation, actions = batch
    if isinstance(model, Pi0Fast):
        return model.compute_loss(observation).mean(), {}
    if recipe is None:
        return model.compute_loss(observation, actions, *drawn).mean(), {}
    assert isinstance(model, Pi05)
    losses = model.loss_parts(observation, actions, *drawn, recipe)
    parts = {f"{name}_loss": loss.mean() for name, loss in losses.items()}
    return jnp.stack([weight * parts[f"{name}_loss"] for name, weight in recipe.weights.items() if weight]).sum(), parts


def train_step(
    config: ml_collections.ConfigDict,
    model: ModelConfig,
    optimizer: optax.GradientTransformation,
    state: State,
    batch: tuple[Observation, jax.Array],
    key: jax.Array,
) -> tuple[State, dict[str, jax.Array]]:
    """One update; returns the new state and its scalars."""

    recipe = read_recipe(config, model)

    def loss_of(params: Any, rows: tuple[Any, Any]) -> tuple[jax.Array, dict[str, jax.Array]]:
        return mean_loss(merge(model, join(params, state["frozen"])), *rows, recipe)

    rows = (batch, noise_and_time(key, batch[1]))  # drawn for the whole batch: it may be cut in any way
    value_and_grad = jax.value_and_grad(loss_of, has_aux=True)
    (loss, parts), grads = accumulate(value_and_grad, state["params"], rows, config.accumulate)
    updates, opt_state = optimizer.update(grads, state["opt_state"], state["params"])
    params = optax.apply_updates(state["params"], updates)
    ema = None if state["ema"] is None else update_ema(state["ema"], params, config.ema_decay)
    scalars = {"loss": loss, "grad_norm": optax.tree.norm(grads), "param_norm": optax.tree.norm(params)} | parts
    return {"params": params, "frozen": state["frozen"], "ema": ema, "opt_state": opt_state}, scalars


def validation_loss(
    model: ModelConfig, recipe: RecipeConfig | None, params: Any, batch: tuple[Observation, jax.Array]
) -> jax.Array:
    """The mean loss of a batch, with the same noise and times at every evaluation."""
    return mean_loss(merge(model, params), batch, noise_and_time(jax.random.key(0), batch[1]), recipe)[0]


def main(arguments: list[str] | None = None) -> None:
    """The command `pi0-train`."""
    parser = argparse.ArgumentParser(
        prog="pi0-train",
        description="Train a model as an experiment's config file says. Any value of the config can be set on the "
        "command line. A run whose folder has checkpoints goes on from the newest one.",
        epilog="examples:\n"
        "  pi0-train --config configs/metaworld_demo.py --workdir runs/metaworld\n"
        "  pi0-train --config configs/metaworld_demo.py:demo_pi05 --workdir runs/pi05 --config.steps=1000\n"
        "  pi0-train --config configs/metaworld_demo.py --config.model.action_horizon=20 --workdir runs/long\n"
        "  pi0-train --config configs/pi0_metaworld.py --config.mesh.fsdp=8 --workdir runs/pi0_metaworld\n\n"
        "what a run leaves in its folder:\n"
        "  config.json, metrics.jsonl, tensorboard/, checkpoints/<step>/{params,train_state,assets}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--config", required=True, metavar="FILE[:ARG]", help="experiment file; ARG goes to get_config")
    parser.add_argument("--workdir", required=True, type=output_path, help="the run's folder")
    processes = parser.add_argument_group("many processes", "found out on TPU pods, GKE and SLURM; else all three")
    processes.add_argument("--coordinator", metavar="HOST:PORT", help="where process 0 can be reached")
    processes.add_argument("--process-count", type=int, metavar="N", help="how many processes there are")
    processes.add_argument("--process-index", type=int, metavar="I", help="which of them this is, from 0")
    parser.add_argument("--overwrite", action="store_true", help="delete the run in the folder, if there is one")
    parser.add_argument("--profile", action="store_true", help="trace a few steps, for TensorBoard or Perfetto")
    args, overrides = parser.parse_known_args(arguments)
    logging.getLogger("absl").setLevel(logging.WARNING)
    try:
        config = read_config(args.config, overrides)
        start_processes(args.coordinator, args.process_count, args.process_index)
        if args.overwrite and (args.workdir / "config.json").exists() and jax.process_index() == 0:
            shutil.rmtree(args.workdir)
        train(config, args.workdir, profile=args.profile)
    except Preempted as stopped:
        print(f"pi0-train: {stopped}", file=sys.stderr)
        sys.exit(stopped.exit_code)
    except (ValueError, OSError, FloatingPointError, flags.Error) as error:
        print(f"pi0-train: {error}", file=sys.stderr)
        sys.exit(1)


def read_config(file: str, overrides: list[str]) -> ml_collections.ConfigDict:
    """The config of an experiment file, with `--config.name=value` applied. Raises flags.Error for unknown names."""
    values, arguments = flags.FlagValues(), ["pi0-train", f"--config={file}", *overrides]
    config_flags.DEFINE_config_file("config", flag_values=values, sys_argv=arguments)
    try:
        rest = values(arguments)[1:]
    except AttributeError as error:  # a name that the config does not have
        raise flags.Error(f"{file} has no value {error}") from error
    if rest:
        raise flags.Error(f"unknown arguments {rest}; a config's value is set by --config.name=value")
    return values.config


if __name__ == "__main__":
    main()
