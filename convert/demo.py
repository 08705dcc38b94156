"""The whole road on the bundled recordings: train in JAX, export to PyTorch, compare, predict; `pi0-demo`."""

from __future__ import annotations

import argparse
import dataclasses
import json
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from convert.conversion import convert
from convert.parity import Inputs, compare
from pi0.assets import Assets
from pi0.datasets import LeRobotDataset
from pi0.fetch import cache_dir, fetch
from pi0.observation import Observation
from pi0.pipeline import Pipeline
from pi0.plots import plot_actions, plot_loss

DRAWS = 8  # of noise: one alone can give 1.5 times the error
LOSS_RATIO, ERROR_RATIO = 1 / 3, 0.6  # what the demo has to reach: final against first loss, error against the mean's


def demo(workdir: Path, steps: int | None = None) -> dict[str, float]:
    """Run the demo in an empty `workdir` and return its figures.

    Leaves checkpoints, an `export` folder, `metrics.jsonl`, `parity.json`, `loss.png` and `actions.png`. Raises
    RuntimeError where the frameworks differ.
    """
    import jax

    from configs.metaworld_demo import get_config
    from pi0_jax.train import train

    jax.config.update("jax_compilation_cache_dir", str(cache_dir() / "jax"))
    start = time.perf_counter()
    config = get_config()
    if steps is not None:
        config.steps = steps

    say("1. Train a small π0 in JAX on recordings of a simulated robot")
    metrics = train(config, workdir)
    plot_loss(workdir / "metrics.jsonl", workdir / "loss.png")

    say("2. Export it to PyTorch; every byte is read again and compared")
    checkpoint, export = workdir / "checkpoints" / str(config.steps), workdir / "export"
    result = convert(checkpoint, export, to="pi0_torch", overwrite=True)
    size = (export / "model.safetensors").stat().st_size / 2**20
    print(f"{len(result.in_layout('pi0_torch'))} tensors, {size:.1f} MiB in {export}")

    say("3. Compare the two, stage by stage, on frames of episodes that training did not see")
    held_out = HeldOut.load(export, fetch(config.data.root), config.data.validation_episodes)
    report = compare(checkpoint, export, inputs=held_out.parity_inputs(rows=4))
    print(report.table())
    (workdir / "parity.json").write_text(report.to_json() + "\n")
    if not report.passed:
        raise RuntimeError("the exported model does not compute what the trained one does")

    say("4. Predict the actions of those episodes, in both frameworks")
    figures = evaluate(held_out, checkpoint, export, workdir / "actions.png")
    first = json.loads((workdir / "metrics.jsonl").read_text().splitlines()[0])["loss"]
    figures |= {"first_loss": first, "last_loss": metrics["loss"], "seconds": time.perf_counter() - start}
    summarize(figures, workdir)
    return figures


@dataclasses.dataclass(frozen=True)
class HeldOut:
    """Episodes that training did not see: every T-th frame of each as model input, F chunks in all."""

    assets: Assets
    pipeline: Pipeline
    datasets: list[LeRobotDataset]  # one per episode
    rows: list[dict[str, Any]]

    @classmethod
    def load(cls, export: Path, root: Path, episodes: Sequence[int]) -> HeldOut:
        """The episodes of a dataset, as the model in `export` sees them."""
        assets = Assets.load(export)
        if assets is None:
            raise ValueError(f"{export} has no config.json")
        pipeline, horizon = Pipeline.from_assets(assets), assets.model.action_horizon
        datasets = [LeRobotDataset(root, action_horizon=horizon, episodes=[episode]) for episode in episodes]
        return cls(assets, pipeline, datasets, [pipeline(d[i]) for d in datasets for i in range(0, len(d), horizon)])

    def observation(self, rows: Sequence[dict[str, Any]]) -> Observation:
        """Some rows as a batch."""
        data = {key: np.stack([row[key] for row in rows]) for key in rows[0] if key != "actions"}
        return Observation.from_dict(data, self.assets.model)

    def parity_inputs(self, rows: int) -> Inputs:
        """A few rows, spread over all, with their recorded actions."""
        chosen = [self.rows[i] for i in np.linspace(0, len(self.rows) - 1, rows).astype(int)]
        actions = np.stack([row["actions"] for row in chosen])
        rng = np.random.default_rng(0)
        noise, flow_time = rng.normal(size=actions.shape), rng.uniform(0.1, 0.9, rows)
        return Inputs(self.observation(chosen), actions, noise.astype(np.float32), flow_time.astype(np.float32))


def evaluate(held_out: HeldOut, checkpoint: Path, export: Path, picture: Path) -> dict[str, float]:
    """Predict every held-out episode open loop: a new chunk of actions whenever the last one is used up.

    Errors are mean squares in units of each dimension's standard deviation in training, so that all dimensions count
    alike, and means over DRAWS of noise, beside those of always predicting the mean action. Draws the last episode,
    with the first noise.
    """
    assets, pipeline = held_out.assets, held_out.pipeline
    assert assets.norm_stats is not None
    stats, observation = assets.norm_stats["actions"], held_out.observation(held_out.rows)
    shape = (DRAWS, len(held_out.rows), assets.model.action_horizon, assets.model.action_dim)
    noise = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    chunks = {"JAX": sample_jax(checkpoint, observation, noise), "PyTorch": sample_torch(export, observation, noise)}
    states = [row["state"] for row in held_out.rows]
    predicted = {
        name: np.stack([[pipeline.actions(a, state) for a, state in zip(draw, states, strict=True)] for draw in draws])
        for name, draws in chunks.items()
    }

    print(f"{'episode':>7}  {'task':<32}{'frames':>7}{'error':>9}{'mean action':>13}")
    start, errors = 0, []
    for dataset in held_out.datasets:
        recorded, count = dataset.table("action"), -(-len(dataset) // assets.model.action_horizon)
        own = {
            name: p[:, start : start + count].reshape(DRAWS, -1, p.shape[-1])[:, : len(recorded)]
            for name, p in predicted.items()
        }
        start += count
        # The order of frameworks is that of the columns returned below; the last one is the mean action.
        guesses = [*own.values(), np.broadcast_to(stats.mean, (1, *recorded.shape))]
        errors += [[np.square((guess - recorded) / stats.std).mean((0, 2)) for guess in guesses]]
        _, torch_error, mean_error = (float(e.mean()) for e in errors[-1])
        number, task = dataset.episodes[0].index, dataset[0]["task"]
        print(f"{number:>7}  {task:<32}{len(recorded):>7}{torch_error:>9.3f}{mean_error:>13.3f}")
    own = {name: draws[0] for name, draws in own.items()}
    plot_actions(recorded, own, dataset.features["action"]["names"], picture, f"episode {number}: {task}")

    jax_error, torch_error, mean_error = (float(np.concatenate(e).mean()) for e in zip(*errors, strict=True))
    difference = np.linalg.norm(predicted["PyTorch"] - predicted["JAX"]) / np.linalg.norm(predicted["JAX"])
    return {
        "jax_error": jax_error,
        "torch_error": torch_error,
        "mean_error": mean_error,
        "framework_difference": float(difference),
    }


def sample_jax(path: Path, observation: Observation, noise: np.ndarray) -> np.ndarray:
    """Actions [N, B, T, A] of a checkpoint from as much noise, sampled in JAX."""
    import jax

    import pi0_jax

    model, sample = pi0_jax.load(path), jax.jit(pi0_jax.Pi0.sample_actions)
    with jax.default_matmul_precision("highest"):
        return np.stack([sample(model, observation, draw) for draw in noise])


def sample_torch(path: Path, observation: Observation, noise: np.ndarray) -> np.ndarray:
    """Actions [N, B, T, A] of a checkpoint from as much noise, sampled in PyTorch."""
    import torch

    import pi0_torch

    model, on_device = pi0_torch.load(path), pi0_torch.to_device(observation)
    assert isinstance(model, pi0_torch.Pi0)
    return np.stack([model.sample_actions(on_device, torch.from_numpy(draw)).numpy() for draw in noise])


def say(title: str) -> None:
    """A heading on the console."""
    print(f"\n\033[1m{title}\033[0m\n" if sys.stdout.isatty() else f"\n{title}\n", flush=True)


def summarize(figures: dict[str, float], workdir: Path) -> None:
    """The figures against what they should reach, and where everything is."""
    loss, error = figures["last_loss"] / figures["first_loss"], figures["torch_error"] / figures["mean_error"]
    say("Done")
    print(
        f"loss            {figures['first_loss']:.3f} -> {figures['last_loss']:.3f}, "
        f"{loss:.0%} of its start (should be under {LOSS_RATIO:.0%})\n"
        f"action error    {figures['torch_error']:.3f}, predicting the mean action {figures['mean_error']:.3f}: "
        f"{error:.0%} of it (should be under {ERROR_RATIO:.0%})\n"
        f"JAX - PyTorch   {figures['framework_difference']:.1e} relative difference of the predicted actions\n"
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
    parser.add_argument("--workdir", type=Path, default=Path("runs/demo"), help="the run's folder (default runs/demo)")
    parser.add_argument("--steps", type=int, help="training steps (default: the config's)")
    parser.add_argument("--keep", action="store_true", help="go on from the checkpoints in the folder")
    args = parser.parse_args(arguments)
    if args.workdir.exists() and not args.keep:
        if not (args.workdir / "metrics.jsonl").exists() and any(args.workdir.iterdir()):
            print(f"pi0-demo: {args.workdir} is not a run's folder; choose another --workdir", file=sys.stderr)
            sys.exit(1)
        shutil.rmtree(args.workdir)
    try:
        demo(args.workdir, args.steps)
    except (ValueError, OSError, RuntimeError) as error:
        print(f"pi0-demo: {error}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
