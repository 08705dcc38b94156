"""The whole road on the bundled recordings: train in JAX, export to PyTorch, compare, predict; `pi0-demo`."""

from __future__ import annotations

import argparse
import shutil
import sys
import time
from pathlib import Path

import numpy as np

from convert.conversion import convert
from convert.parity import compare
from pi0.assets import Assets
from pi0.datasets import LeRobotDataset
from pi0.fetch import fetch
from pi0.observation import Observation
from pi0.pipeline import Pipeline
from pi0.plots import plot_actions, plot_loss

LOSS_RATIO, ERROR_RATIO = 1 / 3, 0.6  # what the demo has to reach: final against first loss, error against the mean's


def demo(workdir: Path, steps: int | None = None, episode: int = 3) -> dict[str, float]:
    """Run the demo in an empty `workdir` and return its figures.

    `episode` is one that training holds out. Leaves checkpoints, an `export` folder, `metrics.jsonl`, `parity.json`,
    `loss.png` and `actions.png`. Raises RuntimeError where the frameworks differ.
    """
    import jax

    from configs.metaworld_demo import get_config
    from pi0_jax.train import train

    jax.config.update("jax_compilation_cache_dir", str(Path.home() / ".cache" / "pi0" / "jax"))
    start = time.perf_counter()
    config = get_config()
    if steps is not None:
        config.steps = steps
    if episode not in config.data.validation_episodes:
        raise ValueError(f"episode {episode} is trained on; choose one of {list(config.data.validation_episodes)}")

    say("1. Train a small π0 in JAX on recordings of a simulated robot")
    metrics = train(config, workdir)
    plot_loss(workdir / "metrics.jsonl", workdir / "loss.png")

    say("2. Export it to PyTorch; every byte is read again and compared")
    checkpoint, export = workdir / "checkpoints" / str(config.steps), workdir / "export"
    result = convert(checkpoint, export, to="ours_torch")
    size = (export / "model.safetensors").stat().st_size / 2**20
    print(f"{len(result.in_layout('ours_torch'))} tensors, {size:.1f} MiB in {export}")

    say("3. Compare the two, stage by stage, on the same inputs")
    report = compare(checkpoint, export)
    print(report.table())
    (workdir / "parity.json").write_text(report.to_json() + "\n")
    if not report.passed:
        raise RuntimeError("the exported model does not compute what the trained one does")

    say(f"4. Predict the actions of episode {episode}, which training did not see, in both frameworks")
    root = fetch(config.data.root)
    figures = evaluate(checkpoint, export, root, episode, workdir / "actions.png")
    figures |= {"first_loss": first_loss(workdir), "last_loss": metrics["loss"]}
    figures["seconds"] = time.perf_counter() - start
    summarize(figures, workdir)
    return figures


def evaluate(checkpoint: Path, export: Path, root: Path, episode: int, picture: Path) -> dict[str, float]:
    """Mean squared error over a recorded episode, open loop: a new chunk of actions whenever the last one is used up.

    In units of each dimension's standard deviation in training, so that all dimensions count alike; against that of
    always predicting the mean action.
    """
    assets = Assets.load(export)
    assert assets is not None and assets.norm_stats is not None
    pipeline, model = Pipeline.from_assets(assets), assets.model
    dataset = LeRobotDataset(root, action_horizon=model.action_horizon, episodes=[episode])
    frames = [dataset[i] for i in range(0, len(dataset), model.action_horizon)]
    rows = [pipeline(frame) for frame in frames]
    data = {key: np.stack([row[key] for row in rows]) for key in rows[0] if key != "actions"}
    observation = Observation.from_dict(data, model)
    shape = (len(rows), model.action_horizon, model.action_dim)
    noise = np.random.default_rng(0).normal(size=shape).astype(np.float32)

    recorded = dataset.table("action")
    stats = assets.norm_stats["actions"]
    predicted = {}
    for name, sample in (("JAX", sample_jax), ("PyTorch", sample_torch)):
        actions = sample(checkpoint if name == "JAX" else export, observation, noise)
        chunks = np.stack([pipeline.actions(chunk) for chunk in actions])
        predicted[name] = chunks.reshape(-1, chunks.shape[-1])[: len(recorded)]
    names = dataset.features["action"]["names"]
    task = frames[0]["task"]
    plot_actions(recorded, predicted, names, picture, f"episode {episode}: {task}")

    def error(actions: np.ndarray) -> float:
        return float(np.mean(np.square((actions - recorded) / (stats.std + 1e-6))))

    difference = np.linalg.norm(predicted["PyTorch"] - predicted["JAX"]) / np.linalg.norm(predicted["JAX"])
    return {
        "jax_error": error(predicted["JAX"]),
        "torch_error": error(predicted["PyTorch"]),
        "mean_error": error(np.broadcast_to(stats.mean, recorded.shape)),
        "framework_difference": float(difference),
    }


def sample_jax(path: Path, observation: Observation, noise: np.ndarray) -> np.ndarray:
    """Actions [B, T, A] of a checkpoint, sampled in JAX."""
    import jax

    import pi0_jax

    model = pi0_jax.load(path)
    with jax.default_matmul_precision("highest"):
        return np.asarray(jax.jit(pi0_jax.Pi0.sample_actions)(model, observation, noise))


def sample_torch(path: Path, observation: Observation, noise: np.ndarray) -> np.ndarray:
    """Actions [B, T, A] of a checkpoint, sampled in PyTorch."""
    import torch

    import pi0_torch

    model = pi0_torch.load(path)
    return model.sample_actions(pi0_torch.to_device(observation), torch.from_numpy(noise)).numpy()


def first_loss(workdir: Path) -> float:
    """The loss of the first step of a run."""
    import json

    return json.loads((workdir / "metrics.jsonl").read_text().splitlines()[0])["loss"]


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
        "prove the two equal and predict the actions of an episode that training did not see. A few minutes on two "
        "CPU cores; nothing is downloaded.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--workdir", type=Path, default=Path("runs/demo"), help="the run's folder (default runs/demo)")
    parser.add_argument("--steps", type=int, help="training steps (default: the config's)")
    parser.add_argument("--episode", type=int, default=3, help="the held-out episode to predict (default 3)")
    parser.add_argument("--keep", action="store_true", help="go on from the checkpoints in the folder")
    args = parser.parse_args(arguments)
    if args.workdir.exists() and not args.keep:
        if not (args.workdir / "metrics.jsonl").exists() and any(args.workdir.iterdir()):
            print(f"pi0-demo: {args.workdir} is not a run's folder; choose another --workdir", file=sys.stderr)
            sys.exit(1)
        shutil.rmtree(args.workdir)
    try:
        demo(args.workdir, args.steps, args.episode)
    except (ValueError, OSError, RuntimeError) as error:
        print(f"pi0-demo: {error}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
