"""The whole road on the bundled recordings: train in JAX, export to PyTorch, compare, predict; `pi0-demo`."""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from convert.conversion import convert
from pi0.command import output_path
from pi0.datasets.base import Dataset
from pi0.datasets.registry import open_dataset
from pi0.fetch import cache_dir, fetch
from pi0.observation import Observation
from pi0.plots import plot_actions, plot_loss
from pi0.policy.policy import Policy
from pi0.run_config import RunConfig
from pi0_eval.parity.compare import Inputs, compare, exact_matmuls
from pi0_eval.replay import action_names, replay

DRAWS = 8  # of noise: one alone can give 1.5 times the error
NAMES = {"pi0": "π0", "pi05": "π0.5", "pi0_fast": "π0-FAST"}
FAST_VOCABULARY = 640  # beside the bundled tokenizer's 512 pieces and the 128 left out, the model's 1280
LOSS_RATIO, ERROR_RATIO = 1 / 3, 0.6  # what the demo has to reach: final against first loss, error against the mean's


def demo(workdir: Path, steps: int | None = None, variant: str = "demo") -> dict[str, float]:
    """Run the demo in an empty `workdir` and return its figures; π0-FAST's begins by fitting its action tokenizer.

    `variant` is a model of `pi0.config` that the bundled recordings fit. Leaves checkpoints, an `export` folder,
    `metrics.jsonl`, `parity.json`, `loss.png` and `actions.png`. Raises RuntimeError where the frameworks differ.
    """
    import jax

    import pi0_jax
    import pi0_torch
    from configs.metaworld_demo import get_config
    from pi0_jax.training.train import train

    jax.config.update("jax_compilation_cache_dir", str(cache_dir() / "jax"))
    start = time.perf_counter()
    config = get_config(variant)
    if steps is not None:
        config.steps = steps
    kind, held_out_episodes = config.model.kind, config.data.validation_episodes
    if kind == "pi0_fast":
        say("0. Fit a FAST tokenizer on the actions of the recordings")
        fit_fast(config, workdir / "fast")

    say(f"1. Train a small {NAMES[kind]} in JAX on recordings of a simulated robot")
    metrics = train(RunConfig.from_dict(config.to_dict()), workdir)
    plot_loss(workdir / "metrics.jsonl", workdir / "loss.png")

    say("2. Export it to PyTorch; every byte is read again and compared")
    checkpoint, export = workdir / "checkpoints" / str(config.steps), workdir / "export"
    result = convert(checkpoint, export, to="pi0_torch", overwrite=True)
    size = (export / "model.safetensors").stat().st_size / 2**20
    print(f"{len(result.in_layout('pi0_torch'))} tensors, {size:.1f} MiB in {export}")

    say("3. Compare the two, stage by stage, on frames of episodes that training did not see")
    policies = {
        "JAX": pi0_jax.Policy.from_pretrained(checkpoint, fallback=True),
        "PyTorch": pi0_torch.Policy.from_pretrained(export, fallback=True),
    }
    robot, horizon = policies["JAX"].pipeline.robot, policies["JAX"].config.action_horizon
    root = fetch(config.data.root)
    held_out = open_dataset(root, robot, action_horizon=horizon, episodes=held_out_episodes)
    report = compare(checkpoint, export, inputs=parity_inputs(policies["JAX"], held_out, rows=4))
    print(report.table())
    (workdir / "parity.json").write_text(report.to_json() + "\n")
    if not report.passed:
        raise RuntimeError("the exported model does not compute what the trained one does")

    say("4. Predict the actions of those episodes, in both frameworks")
    figures = evaluate(policies, held_out, workdir / "actions.png")
    first = json.loads((workdir / "metrics.jsonl").read_text().splitlines()[0])["loss"]
    figures |= {"first_loss": first, "last_loss": metrics["loss"], "seconds": time.perf_counter() - start}
    summarize(figures, workdir)
    return figures


def fit_fast(config: Any, folder: Path) -> None:
    """Fit the action tokenizer of a π0-FAST experiment on its training episodes, into `folder`, and use it."""
    from pi0.datasets.fit_fast import main as fit

    sizes = {"--action-horizon": config.model.action_horizon, "--vocab-size": FAST_VOCABULARY}
    options = [str(part) for pair in ({"--robot": config.data.robot} | sizes).items() for part in pair]
    held_out = [str(episode) for episode in config.data.validation_episodes]
    fit([config.data.root, str(folder), *options, "--held-out", *held_out, "--overwrite"])
    config.data.action_tokenizer = str(folder)


def parity_inputs(policy: Policy, dataset: Dataset, rows: int) -> Inputs:
    """A few frames, spread over all, with their recorded actions."""
    frames = [dataset[int(i)] for i in np.linspace(0, len(dataset) - 1, rows)]
    inputs = [policy.pipeline(frame) for frame in frames]
    data = {key: np.stack([row[key] for row in inputs]) for key in inputs[0]}
    actions, rng = data.pop("actions"), np.random.default_rng(0)
    noise, flow_time = rng.normal(size=actions.shape), rng.uniform(0.1, 0.9, rows)
    observation = Observation.from_dict(data, policy.config)
    return Inputs(observation, actions, noise.astype(np.float32), flow_time.astype(np.float32))


def evaluate(policies: Mapping[str, Policy], dataset: Dataset, picture: Path) -> dict[str, float]:
    """Predict every episode open loop in "JAX" and in "PyTorch".

    Errors are mean squares in units of each dimension's standard deviation in training, so that all dimensions count
    alike, and means over DRAWS of noise, beside those of always predicting the mean action. Draws the last episode,
    with the first noise.
    """
    tokens = policies["JAX"].config.kind == "pi0_fast"  # which takes no noise
    with exact_matmuls():
        replays = [replay(policy, dataset, draws=1 if tokens else DRAWS, batch_size=64) for policy in policies.values()]
    stats = policies["JAX"].assets.norm_stats
    assert stats is not None
    mean, std = stats["actions"].mean, stats["actions"].std

    print(f"{'episode':>7}  {'task':<32}{'frames':>7}{'error':>9}{'mean action':>13}")
    errors = []
    for own in zip(*replays, strict=True):
        recorded = own[0].recorded
        # The order of frameworks is that of the columns returned below; the last one is the mean action.
        guesses = [*(e.predicted for e in own), np.broadcast_to(mean, (1, *recorded.shape))]
        errors += [[np.square((guess - recorded) / std).mean((0, 2)) for guess in guesses]]
        _, torch_error, mean_error = (float(e.mean()) for e in errors[-1])
        print(f"{own[0].episode:>7}  {own[0].task:<32}{len(recorded):>7}{torch_error:>9.3f}{mean_error:>13.3f}")
    shown = {name: episode.predicted[0] for name, episode in zip(policies, own, strict=True)}
    names, title = action_names(dataset, policies["JAX"].pipeline.robot), f"episode {own[0].episode}: {own[0].task}"
    plot_actions(recorded, shown, names, picture, title)

    jax_error, torch_error, mean_error = (float(np.concatenate(e).mean()) for e in zip(*errors, strict=True))
    in_jax, in_torch = (np.concatenate([e.predicted for e in episodes], axis=1) for episodes in replays)
    figures = {} if not tokens else written_alike(policies, dataset)
    return figures | {
        "jax_error": jax_error,
        "torch_error": torch_error,
        "mean_error": mean_error,
        "framework_difference": float(np.linalg.norm(in_torch - in_jax) / np.linalg.norm(in_jax)),
    }


def written_alike(policies: Mapping[str, Policy], dataset: Dataset) -> dict[str, float]:
    """How many tokens π0-FAST writes for a chunk at every T-th frame, and how many of them the frameworks write alike.

    Raises RuntimeError where one differs.
    """
    frames = [dataset[i] for i in range(0, len(dataset), policies["JAX"].config.action_horizon)]
    with exact_matmuls():
        in_jax, in_torch = (policy.sample(policy.inputs(frames), None) for policy in policies.values())
    if not np.array_equal(in_jax, in_torch):
        row = int(np.flatnonzero((in_jax != in_torch).any(axis=1))[0])
        raise RuntimeError(f"chunk {row}: JAX writes {in_jax[row].tolist()}, PyTorch {in_torch[row].tolist()}")
    return {"chunks": len(frames), "tokens": int((in_jax != 0).sum())}


def say(title: str) -> None:
    """A heading on the console."""
    print(f"\n\033[1m{title}\033[0m\n" if sys.stdout.isatty() else f"\n{title}\n", flush=True)


def summarize(figures: dict[str, float], workdir: Path) -> None:
    """The figures against what they should reach, and where everything is."""
    loss, error = figures["last_loss"] / figures["first_loss"], figures["torch_error"] / figures["mean_error"]
    alike = ""
    if "tokens" in figures:
        alike = f"tokens          {figures['tokens']} in {figures['chunks']} chunks, the same in both frameworks\n"
    say("Done")
    print(
        f"loss            {figures['first_loss']:.3f} -> {figures['last_loss']:.3f}, "
        f"{loss:.0%} of its start (should be under {LOSS_RATIO:.0%})\n"
        f"action error    {figures['torch_error']:.3f}, predicting the mean action {figures['mean_error']:.3f}: "
        f"{error:.0%} of it (should be under {ERROR_RATIO:.0%})\n"
        f"JAX - PyTorch   {figures['framework_difference']:.1e} relative difference of the predicted actions\n{alike}"
        f"time            {figures['seconds']:.0f} s\n\n"
        f"{workdir}/\n"
        f"  loss.png, actions.png      pictures of the training and of predicted against recorded actions\n"
        f"  checkpoints/, export/      the trained model in JAX, and in PyTorch\n"
        f"  metrics.jsonl, tensorboard/, parity.json\n\n"
        f"next:\n"
        f"  pi0-parity {workdir}/export {workdir}/export --framework-b jax --dtype bfloat16\n"
        f"  pi0-train --config configs/metaworld_demo.py:demo_pi05 --workdir runs/pi05"
    )


def main(arguments: list[str] | None = None) -> None:
    """The command `pi0-demo`."""
    parser = argparse.ArgumentParser(
        prog="pi0-demo",
        description="Train a small π0 in JAX on the bundled recordings of a simulated robot, export it to PyTorch, "
        "prove the two equal and predict the actions of episodes that training did not see. A few minutes on two "
        "CPU cores; nothing is downloaded.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--workdir", type=output_path, default=Path("runs/demo"), help="the run's folder (default runs/demo)"
    )
    parser.add_argument("--variant", choices=("demo", "demo_pi05", "demo_pi0_fast"), default="demo", help="the model")
    parser.add_argument("--steps", type=int, help="training steps (default: the config's)")
    parser.add_argument("--keep", action="store_true", help="go on from the checkpoints in the folder")
    args = parser.parse_args(arguments)
    if args.workdir.exists() and not args.keep:
        if not (args.workdir / "metrics.jsonl").exists() and any(args.workdir.iterdir()):
            print(f"pi0-demo: {args.workdir} is not a run's folder; choose another --workdir", file=sys.stderr)
            sys.exit(1)
        shutil.rmtree(args.workdir)
    try:
        demo(args.workdir, args.steps, args.variant)
    except (ValueError, OSError, RuntimeError) as error:
        print(f"pi0-demo: {error}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
