"""Train in JAX, export to PyTorch, compare, and replay, on bundled recordings: `demo`, `pi0-demo`."""

from __future__ import annotations

import dataclasses
import json
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from convert.conversion import convert
from pi0.command import exit_on_error, local_output_path, make_parser
from pi0.datasets.base import Dataset
from pi0.datasets.registry import open_dataset
from pi0.fetch import fetch
from pi0.observation import Observation
from pi0.plots import plot_actions, plot_loss
from pi0.plugins import require_extra
from pi0.policy.policy import Policy
from pi0.run_config import RunConfig
from pi0.storage import delete, write_text
from pi0.training.preemption import Preempted
from pi0_eval.parity.compare import compare
from pi0_eval.parity.frameworks import exact_matmuls
from pi0_eval.parity.inputs import Inputs
from pi0_eval.replay import action_names, replay

DRAWS = 8  # of noise: the error of a single one can be 1.5 times the mean
FAST_VOCABULARY = 640  # the model's 1280 less the bundled tokenizer's 512 pieces and the 128 skipped tokens
TASKS = ("reach-v3", "push-v3", "drawer-open-v3", "button-press-topdown-v3")  # of the recordings, in Meta-World
LOSS_RATIO, ERROR_RATIO = 1 / 3, 0.6  # targets: final to first loss, error to that of the mean action


def demo(
    workdir: Path,
    steps: int | None = None,
    variant: str = "demo",
    *,
    overwrite: bool = False,
    rollout: bool = False,
) -> dict[str, float]:
    """Run the demo in an empty `workdir` and return its figures. For π0-FAST it first fits an action tokenizer.

    `variant` is a model of `pi0.variants` that fits the bundled recordings. Writes checkpoints, `export/`,
    `metrics.jsonl`, `parity.json`, `loss.png` and `actions.png`; with `rollout`, which needs Meta-World, `rollout/`.
    Raises RuntimeError where the frameworks differ.
    """
    import pi0_jax
    import pi0_torch
    from configs.metaworld_demo import get_config
    from pi0_jax.sampler import use_compilation_cache
    from pi0_jax.training.train import train

    use_compilation_cache()
    start = time.perf_counter()
    config = RunConfig.from_dict(get_config(variant).to_dict())
    if steps is not None:
        config = dataclasses.replace(config, steps=steps)
    family = config.model.family
    if family.action_tokens:
        print_heading("0. Fit a FAST tokenizer on the actions of the recordings")
        config = fit_fast(config, workdir / "fast")

    print_heading(f"1. Train a small {family.title} in JAX on recordings of a simulated robot")
    metrics = train(config, workdir, overwrite=overwrite)
    plot_loss(workdir / "metrics.jsonl", workdir / "loss.png")

    print_heading("2. Export it to PyTorch; every byte is read back and compared")
    checkpoint, export = workdir / "checkpoints" / str(config.steps), workdir / "export"
    result = convert(checkpoint, export, to="pi0_torch", overwrite=True)
    size = (export / "model.safetensors").stat().st_size / 2**20
    print(f"{len(result.in_layout('pi0_torch'))} tensors, {size:.1f} MiB in {export}")

    print_heading("3. Compare the two, stage by stage, on frames of held-out episodes")
    policies = {
        "JAX": pi0_jax.Policy.from_pretrained(checkpoint, fallback=True),
        "PyTorch": pi0_torch.Policy.from_pretrained(export, fallback=True),
    }
    robot, horizon = policies["JAX"].pipeline.robot, policies["JAX"].config.action_horizon
    root = fetch(config.data.root)
    held_out = open_dataset(root, robot, action_horizon=horizon, episodes=config.data.validation_episodes)
    report = compare(checkpoint, export, inputs=parity_inputs(policies["JAX"], held_out, rows=4))
    print(report.table())
    write_text(workdir / "parity.json", report.to_json() + "\n")
    if not report.passed:
        raise RuntimeError("the exported model is not numerically equivalent to the trained one")

    print_heading("4. Predict the actions of those episodes in both frameworks")
    figures = evaluate(policies, held_out, workdir / "actions.png")
    first = json.loads((workdir / "metrics.jsonl").read_text().splitlines()[0])["loss"]
    figures |= {"first_loss": first, "last_loss": metrics["loss"], "seconds": time.perf_counter() - start}
    if rollout:
        print_heading("5. Let it act in simulation, in both frameworks, on the same seeds")
        figures |= roll_out(export, workdir / "rollout")
    summarize(figures, workdir)
    return figures


def roll_out(export: Path, folder: Path) -> dict[str, float]:
    """Compare both frameworks in a few episodes of the recorded tasks, rendered as they were; returns successes."""
    from pi0_eval.rollout import main as rollout

    delete(folder)
    tasks = [json.dumps({"name": f"metaworld/{task}", "full": True}) for task in TASKS]
    options = ["--episodes", "2", "--limit", "150", "--first", "100", "--side", "jax", "torch", "--out", str(folder)]
    rollout(["--compare", str(export), str(export), "--env", *tasks, *options])
    comparison = json.loads((folder / "comparison.json").read_text())
    return {"rollouts": comparison["pairs"], "successes": comparison["success_b"]}


def fit_fast(config: RunConfig, folder: Path) -> RunConfig:
    """Fit an action tokenizer on the training episodes into `folder`; returns the config with it."""
    from pi0.datasets.fit_fast import main as fit

    sizes = {"--action-horizon": config.model.action_horizon, "--vocab-size": FAST_VOCABULARY}
    options = [str(part) for pair in ({"--robot": config.data.robot} | sizes).items() for part in pair]
    assert isinstance(config.data.validation_episodes, tuple)
    held_out = map(str, config.data.validation_episodes)
    fit([config.data.root, str(folder), *options, "--held-out", *held_out, "--overwrite"])
    return dataclasses.replace(config, data=dataclasses.replace(config.data, action_tokenizer=str(folder)))


def parity_inputs(policy: Policy, dataset: Dataset, rows: int) -> Inputs:
    """Evenly spaced frames with their recorded actions."""
    frames = [dataset[int(i)] for i in np.linspace(0, len(dataset) - 1, rows)]
    inputs = [policy.pipeline(frame) for frame in frames]
    data = {key: np.stack([row[key] for row in inputs]) for key in inputs[0]}
    actions, rng = data.pop("actions"), np.random.default_rng(0)
    noise, flow_time = rng.normal(size=actions.shape), rng.uniform(0.1, 0.9, rows)
    observation = Observation.from_dict(data, policy.config)
    return Inputs(observation, actions, noise.astype(np.float32), flow_time.astype(np.float32))


def evaluate(policies: Mapping[str, Policy], dataset: Dataset, plot: Path) -> dict[str, float]:
    """Replay every episode in "JAX" and in "PyTorch", and plot the last one.

    Errors are mean squares in units of each dimension's standard deviation in training, averaged over DRAWS of noise,
    next to those of always predicting the mean action.
    """
    tokens = policies["JAX"].config.family.action_tokens  # decoded without noise
    with exact_matmuls():
        replays = [replay(policy, dataset, draws=1 if tokens else DRAWS, batch_size=64) for policy in policies.values()]
    stats = policies["JAX"].assets.norm_stats
    assert stats is not None
    mean, std = stats["actions"].mean, stats["actions"].std

    print(f"{'episode':>7}  {'task':<32}{'frames':>7}{'error':>9}{'mean action':>13}")
    errors = []
    for own in zip(*replays, strict=True):
        recorded = own[0].recorded
        # In the order of the figures below: JAX, PyTorch, the mean action.
        guesses = [*(e.predicted for e in own), np.broadcast_to(mean, (1, *recorded.shape))]
        errors += [[np.square((guess - recorded) / std).mean((0, 2)) for guess in guesses]]
        _, torch_error, mean_error = (float(e.mean()) for e in errors[-1])
        print(f"{own[0].episode:>7}  {own[0].task:<32}{len(recorded):>7}{torch_error:>9.3f}{mean_error:>13.3f}")
    shown = {name: episode.predicted[0] for name, episode in zip(policies, own, strict=True)}
    names, title = action_names(dataset, policies["JAX"].pipeline.robot), f"episode {own[0].episode}: {own[0].task}"
    plot_actions(recorded, shown, names, plot, title)

    jax_error, torch_error, mean_error = (float(np.concatenate(e).mean()) for e in zip(*errors, strict=True))
    in_jax, in_torch = (np.concatenate([e.predicted for e in episodes], axis=1) for episodes in replays)
    figures = compare_tokens(policies, dataset) if tokens else {}
    return figures | {
        "jax_error": jax_error,
        "torch_error": torch_error,
        "mean_error": mean_error,
        "framework_difference": float(np.linalg.norm(in_torch - in_jax) / np.linalg.norm(in_jax)),
    }


def compare_tokens(policies: Mapping[str, Policy], dataset: Dataset) -> dict[str, float]:
    """Decode π0-FAST's tokens in both frameworks at every T-th frame; returns the numbers of chunks and tokens.

    Raises RuntimeError where one token differs.
    """
    frames = [dataset[i] for i in range(0, len(dataset), policies["JAX"].config.action_horizon)]
    with exact_matmuls():
        in_jax, in_torch = (policy.sample(policy.inputs(frames), None) for policy in policies.values())
    if not np.array_equal(in_jax, in_torch):
        row = int(np.flatnonzero((in_jax != in_torch).any(axis=1))[0])
        raise RuntimeError(f"chunk {row}: JAX decodes {in_jax[row].tolist()}, PyTorch {in_torch[row].tolist()}")
    return {"chunks": len(frames), "tokens": int((in_jax != 0).sum())}


def print_heading(title: str) -> None:
    """Print a heading to the console."""
    print(f"\n\033[1m{title}\033[0m\n" if sys.stdout.isatty() else f"\n{title}\n", flush=True)


def summarize(figures: dict[str, float], workdir: Path) -> None:
    """Print the figures with their targets, and the files written."""
    loss, error = figures["last_loss"] / figures["first_loss"], figures["torch_error"] / figures["mean_error"]
    tokens = ""
    if "tokens" in figures:
        tokens = f"tokens          {figures['tokens']} in {figures['chunks']} chunks, the same in both frameworks\n"
    acted = ""
    if "rollouts" in figures:
        acted = f"rollouts        {figures['successes']} of {figures['rollouts']} episodes succeeded in simulation\n"
    print_heading("Done")
    print(
        f"loss            {figures['first_loss']:.3f} -> {figures['last_loss']:.3f}, "
        f"{loss:.0%} of its start (should be under {LOSS_RATIO:.0%})\n"
        f"action error    {figures['torch_error']:.3f}, predicting the mean action {figures['mean_error']:.3f}: "
        f"{error:.0%} of it (should be under {ERROR_RATIO:.0%})\n"
        f"JAX - PyTorch   {figures['framework_difference']:.1e} relative difference of the predicted actions\n{tokens}"
        f"{acted}time            {figures['seconds']:.0f} s\n\n"
        f"{workdir}/\n"
        f"  loss.png, actions.png      plots of the loss, and of predicted and recorded actions\n"
        f"  checkpoints/, export/      the trained model in JAX, and in PyTorch\n"
        f"  metrics.jsonl, tensorboard/, parity.json\n\n"
        f"next:\n"
        f"  pi0-parity {workdir}/export {workdir}/export --framework-b jax --dtype bfloat16\n"
        f"  pi0-train --config metaworld_demo:demo_pi05 --workdir runs/pi05\n"
        f"  docs/rollout.md: collect demonstrations in simulation, train on them, and measure success rates"
    )


@exit_on_error("pi0-demo", RuntimeError, FloatingPointError, Preempted)
def main(arguments: list[str] | None = None) -> None:
    """The command `pi0-demo`. Raises ValueError for a folder that is not a run's."""
    parser = make_parser(
        "pi0-demo",
        "Train a small model in JAX on the bundled recordings of a simulated robot, export it to PyTorch, compare the "
        "two and predict the actions of held-out episodes. A few minutes on two CPU cores; nothing is downloaded.",
    )
    parser.add_argument(
        "--workdir", type=local_output_path, default=Path("runs/demo"), help="the run's folder (default runs/demo)"
    )
    parser.add_argument("--variant", choices=("demo", "demo_pi05", "demo_pi0_fast"), default="demo", help="the model")
    parser.add_argument("--steps", type=int, help="training steps (default: the config's)")
    parser.add_argument(
        "--rollout",
        action="store_true",
        help="let it act in simulation too, closed loop (needs the extra sim-metaworld)",
    )
    parser.add_argument("--keep", action="store_true", help="resume from the checkpoints in the folder")
    args = parser.parse_args(arguments)
    require_extra("jax", "jax", "flax", "grain", "optax", "orbax")  # before the last run is deleted
    require_extra("torch", "torch")
    ours = not args.workdir.exists() or (args.workdir / "metrics.jsonl").exists() or not any(args.workdir.iterdir())
    if not (ours or args.keep):
        raise ValueError(f"{args.workdir} is not a run's folder; choose another --workdir")
    if args.rollout:
        require_extra("sim-metaworld", "metaworld", "mujoco")
    demo(args.workdir, args.steps, args.variant, overwrite=not args.keep, rollout=args.rollout)
