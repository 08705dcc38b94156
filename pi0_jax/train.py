"""Train a model: config, mesh, data, state, step, loop."""

from __future__ import annotations

import argparse
import functools
import json
import logging
import sys
import time
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
from pi0.assets import Assets, fetch_norm_stats
from pi0.config import ConfigError, ModelConfig
from pi0.datasets import Annotated, LeRobotDataset, Mixture, Questions
from pi0.fetch import fetch
from pi0.observation import Observation
from pi0.pipeline import Pipeline
from pi0.recipe import RecipeConfig
from pi0.robots import make_robot
from pi0.statistics import dataset_statistics
from pi0.tokenizers import FASTTokenizer, TextTokenizer
from pi0_jax.checkpoints import Checkpoints
from pi0_jax.data import FrameData, batch_indices, epoch_indices
from pi0_jax.loading import Model, flatten, make_model, merge, unflatten
from pi0_jax.metrics import Metrics
from pi0_jax.models.pi0_fast import Pi0Fast
from pi0_jax.models.pi05 import Pi05
from pi0_jax.optimizer import accumulate, make_optimizer, make_schedule, update_ema
from pi0_jax.preemption import Preempted, Preemption
from pi0_jax.sharding import check_batch, global_batch, local_rows, make_mesh, start_processes, state_shardings
from pi0_jax.trainable import freeze_pattern, join, split, table

State = dict[str, Any]  # params (that train), frozen, ema (or None), opt_state: plain nested dicts of arrays


def train(config: ml_collections.ConfigDict, workdir: str | Path) -> dict[str, float]:
    """Run an experiment in `workdir`, going on from its newest checkpoint if there is one.

    Leaves `config.json`, `metrics.jsonl`, `tensorboard/` and `checkpoints/<step>` in `workdir`, and returns the last
    metrics. Raises ValueError for a config that cannot run, before anything is written, FloatingPointError where the
    loss is not finite, and Preempted where SIGTERM stopped it, once it has saved.
    """
    # config
    workdir = Path(workdir)
    model_config = ModelConfig.from_dict(config.model.to_dict())
    schedule = make_schedule(config.optimizer, config.steps)
    optimizer = make_optimizer(config.optimizer, schedule)
    freeze = freeze_pattern(model_config, config.freeze)
    recipe = read_recipe(config, model_config)

    # mesh
    mesh = make_mesh(config.mesh)
    check_batch(config.batch_size, config.accumulate, mesh)
    init = functools.partial(init_state, config, model_config, optimizer, freeze)
    shardings = state_shardings(jax.eval_shape(init), model_config, config.sharding, mesh)
    rows = local_rows(config.batch_size, mesh)
    lead = jax.process_index() == 0

    # data
    assets, training, validation = load_data(config.data, model_config, config.to_dict())
    batch_indices(training.order, config.batch_size, config.seed, 0)  # refuses a batch larger than the data

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
    key = jax.random.key(config.seed)

    # loop
    last: dict[str, float] = {}
    with (
        jax.set_mesh(mesh),
        Metrics(workdir, start, config.steps, silent=not lead) as metrics,
        Preemption() as preempted,
    ):
        window, window_start = [], time.perf_counter()
        for step in range(start, config.steps):
            batch = training.batch(batch_indices(training.order, config.batch_size, config.seed, step)[rows])
            batch = global_batch(batch, config.batch_size, mesh)
            state, scalars = step_fn(state, batch, jax.random.fold_in(key, step))
            window.append(scalars)
            metrics.advance()
            done = step + 1
            if step == start or done % config.log_every == 0 or done == config.steps:
                means = {name: float(np.mean([row[name] for row in window])) for name in scalars}
                if not np.isfinite(means["loss"]):
                    raise FloatingPointError(f"the loss is {means['loss']} at step {done}; lower optimizer.peak_lr?")
                means["samples_per_second"] = len(window) * config.batch_size / (time.perf_counter() - window_start)
                means["learning_rate"] = float(schedule(step))
                metrics.write(done, means)
                last |= means
                window, window_start = [], time.perf_counter()
            if validation and (done % config.eval_every == 0 or done == config.steps):
                losses = []
                for indices in epoch_indices(len(validation), config.batch_size):
                    batch = global_batch(validation.batch(indices[rows]), config.batch_size, mesh)
                    losses.append(loss_fn(inference_params(state), batch))
                last["validation_loss"] = float(np.mean(losses))
                metrics.write(done, {"validation_loss": last["validation_loss"]})
                window_start = time.perf_counter()
            stop = preempted(done)
            if done % config.save_every == 0 or done == config.steps or stop:
                checkpoints.save(done, inference_params(state), state, assets, last)
            if stop:
                break
        checkpoints.close()
    if start < config.steps and stop:
        raise Preempted(f"stopped by a signal after step {done} of {config.steps}; start it again to go on")
    return last


def load_data(
    config: ml_collections.ConfigDict, model: ModelConfig, training: dict[str, Any]
) -> tuple[Assets, FrameData, FrameData | None]:
    """The run's assets and its training and validation frames.

    Norm stats are those that a base checkpoint, `config.norm_stats_from`, has under `asset_id`; where that is not
    given, those of the training episodes.
    """
    if not config.root:
        raise ValueError("data.root names no dataset; give a folder or an address: --config.data.root=data/libero")
    root, held_out = fetch(config.root), set(config.validation_episodes)
    reference = config.robot if isinstance(config.robot, str) else config.robot.to_dict()
    robot = make_robot(reference)
    every = [episode.index for episode in LeRobotDataset(root).episodes]
    if not held_out < set(every):
        raise ValueError(f"data.validation_episodes {sorted(held_out)} must leave some of the episodes {every}")

    def read(episodes: list[int]) -> LeRobotDataset:
        return LeRobotDataset(root, action_horizon=model.action_horizon, episodes=episodes)

    def described(dataset: LeRobotDataset) -> LeRobotDataset | Annotated:
        return Annotated(dataset, config.subtasks) if config.get("subtasks", "") else dataset

    kept = read([e for e in every if e not in held_out])
    if config.get("norm_stats_from"):
        norm_stats = fetch_norm_stats(config.norm_stats_from, config.asset_id)
    else:
        norm_stats = {key: stats.norm_stats() for key, stats in dataset_statistics(kept, robot).items()}
    fast = config.get("action_tokenizer")
    mixture: Any = described(kept)
    assets = Assets(
        model,
        norm_stats=norm_stats,
        asset_id=config.asset_id,
        normalization=config.normalization,
        tokenizer=TextTokenizer(config.tokenizer).reference(),
        robot=reference,
        action_tokenizer=FASTTokenizer(fast).reference() if fast else None,
        subtasks=bool(training.get("recipe") and training["recipe"]["text_weight"] and "subtask" in mixture[0]),
        training=training,
    )
    pipeline = Pipeline.from_assets(assets)
    validation = FrameData(described(read(sorted(held_out))), pipeline, model) if held_out else None
    if config.get("questions", ()):
        questions = [Questions(file, model.image_keys[0]) for file in config.questions]
        mixture = Mixture([mixture, *questions], list(config.weights) or None, training["seed"])
    return assets, FrameData(mixture, pipeline, model), validation


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
    losses = model.compute_losses(observation, actions, *drawn, recipe)
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
    parser.add_argument("--workdir", required=True, type=Path, help="the run's folder")
    processes = parser.add_argument_group("many processes", "found out on TPU pods, GKE and SLURM; else all three")
    processes.add_argument("--coordinator", metavar="HOST:PORT", help="where process 0 can be reached")
    processes.add_argument("--process-count", type=int, metavar="N", help="how many processes there are")
    processes.add_argument("--process-index", type=int, metavar="I", help="which of them this is, from 0")
    args, overrides = parser.parse_known_args(arguments)
    logging.getLogger("absl").setLevel(logging.WARNING)
    try:
        config = read_config(args.config, overrides)
        start_processes(args.coordinator, args.process_count, args.process_index)
        train(config, args.workdir)
    except Preempted as stopped:
        print(f"pi0-train: {stopped}", file=sys.stderr)
        sys.exit(stopped.exit_code)
    except (ValueError, OSError, flags.Error) as error:
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
