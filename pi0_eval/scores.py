"""Say how well a checkpoint predicts recorded episodes, part by part, in either framework: `pi0-eval-offline`.

Axes: N frames, B batch, T action horizon, A action dim, D tokens of a subtask, L text tokens.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from convert.checkpoints import Checkpoint, open_checkpoint
from pi0.assets import Assets
from pi0.command import output_path
from pi0.datasets.annotations import AnnotatedDataset, Questions
from pi0.datasets.lerobot import LeRobotDataset
from pi0.masks import FAST, SUBTASK
from pi0.observation import Observation
from pi0.robots.pipeline import Pipeline
from pi0_eval.parity.compare import FRAMEWORKS

Call = Callable[..., Any]  # (method, observation, *arrays, **options): a model's method, NumPy in and out
COLUMNS = ("count", "exact", "tokens", "mse", "mae", "within")


@dataclasses.dataclass(frozen=True)
class Score:
    """How good one part is over `count` examples; what it does not have is None.

    `exact` is the share of texts that were written exactly right, `tokens` that of tokens predicted right after the
    true ones before them; `mse`, `mae` and the share `within` the threshold are those of normalized actions.
    """

    count: int
    exact: float | None = None
    tokens: float | None = None
    mse: float | None = None
    mae: float | None = None
    within: float | None = None


@dataclasses.dataclass(frozen=True)
class Frames:
    """Rows of the model's input, stacked by key; and which actions [N, T] are real, not past an episode's end."""

    arrays: dict[str, np.ndarray]
    real: np.ndarray

    @classmethod
    def read(cls, items: Any, pipeline: Pipeline, horizon: int) -> Frames:
        """All rows of a dataset's items."""
        items = [items[i] for i in range(len(items))]
        rows = [pipeline(item) for item in items]
        real = [~np.asarray(item.get("action_is_pad", np.ones(horizon, bool))) for item in items]
        black = {key: np.zeros_like(row[key]) for row in rows for key in row if key.startswith("image/")}
        return cls({key: np.stack([(black | row)[key] for row in rows]) for key in rows[0] | black}, np.stack(real))

    def __len__(self) -> int:
        return len(self.real)

    def chosen(self, which: np.ndarray) -> Frames:
        """Some of the frames."""
        return Frames({key: array[which] for key, array in self.arrays.items()}, self.real[which])


def evaluate(
    source: str | Path,
    *,
    framework: str = "torch",
    dataset: str | None = None,
    episodes: Sequence[int] | None = None,
    subtasks: str | None = None,
    questions: Sequence[str] = (),
    threshold: float = 0.1,
    every: int = 1,
    batch: int = 16,
    num_steps: int | None = None,
) -> dict[str, Score]:
    """The scores of a checkpoint by part. What is not given is as in training: the dataset, its file of subtasks, and
    the episodes held out. Every `every`-th frame is looked at. All sampling starts at the same noise.

    Raises ValueError where the checkpoint does not say what to read, and what reading raises.
    """
    checkpoint = open_checkpoint(source)
    assets, data = checkpoint.assets, (checkpoint.assets.training or {}).get("data", {})
    dataset = dataset or data.get("root")
    episodes = data.get("validation_episodes") if episodes is None else episodes
    if not dataset or not episodes:
        raise ValueError(f"{source} does not say which episodes to look at; give --dataset and --episodes")
    if assets.model.kind == "pi0_fast":
        raise ValueError("pi0-eval-offline scores π0 and π0.5; π0-FAST's loss is its tokens' already")
    model, file = assets.model, subtasks or data.get("subtasks")
    recorded: Any = LeRobotDataset(dataset, action_horizon=model.action_horizon, episodes=episodes)
    recorded = AnnotatedDataset(recorded, file) if file else recorded
    items = [recorded[i] for i in range(0, len(recorded), every)]
    call = _runner(checkpoint, framework)
    scores: dict[str, Score] = {}
    pipeline = Pipeline.from_assets(assets)
    if pipeline.recipe is not None:
        frames = Frames.read(items, pipeline, model.action_horizon)
        scores |= _text_scores(partial(_batches, call, assets, batch), frames, ("subtask", "FAST tokens"))
        if assets.subtasks:
            scores |= _planned(call, assets, frames, scores, threshold, batch, num_steps)
        for name in questions:
            asked = Frames.read(Questions(name, model.image_keys[0]), pipeline, model.action_horizon)
            scores |= _answers(call, assets, asked, f"answers, {Path(name).stem}", batch, num_steps)
    plain = Pipeline.from_assets(dataclasses.replace(assets, subtasks=False, action_tokenizer=None, training=None))
    frames = Frames.read(items, plain, model.action_horizon)
    noise = _noise(frames)
    actions = _batches(call, assets, batch, frames, "sample_actions", noise, num_steps=num_steps)
    scores["actions, directly"] = _action_score(actions, frames, plain, threshold)
    return scores


def _planned(
    call: Call,
    assets: Assets,
    frames: Frames,
    scores: dict[str, Score],
    threshold: float,
    batch: int,
    num_steps: int | None,
) -> dict[str, Score]:
    """Of frames that have a subtask: was it written as recorded, and the actions after it, and after the true one."""
    frames = frames.chosen((frames.arrays["token_group"] == SUBTASK).any(axis=1))
    run = partial(_batches, call, assets, batch, frames, "sample", _noise(frames), num_steps=num_steps)
    written, predicted = run()
    truth = _written(frames, assets.model.runtime.max_decoding_steps)
    _, given = run(truth)
    pipeline = Pipeline.from_assets(assets)
    return {
        "subtask": dataclasses.replace(scores["subtask"], exact=_exact(written, truth)),
        "actions, predicted subtask": _action_score(predicted, frames, pipeline, threshold),
        "actions, true subtask": _action_score(given, frames, pipeline, threshold),
    }


def _answers(
    call: Call, assets: Assets, frames: Frames, name: str, batch: int, num_steps: int | None
) -> dict[str, Score]:
    """Of questions: was the answer written as recorded."""
    score = _text_scores(partial(_batches, call, assets, batch), frames, (name, ""))[name]
    written, _ = _batches(call, assets, batch, frames, "sample", _noise(frames), num_steps=num_steps)
    truth = _written(frames, assets.model.runtime.max_decoding_steps)
    return {name: dataclasses.replace(score, exact=_exact(written, truth))}


def _exact(written: np.ndarray, truth: np.ndarray) -> float:
    """The share of texts [N, D] that are the same, token by token."""
    return float((written == truth).all(axis=1).mean())


def _text_scores(run: Call, frames: Frames, names: tuple[str, str]) -> dict[str, Score]:
    """Which tokens of the subtask and which FAST tokens are the likeliest ones after the true ones before them."""
    predicted = run(frames, "next_tokens")
    text = {key: frames.arrays[key][:, 1:] for key in ("tokenized_prompt", "tokenized_prompt_mask", "token_group")}
    scores = {}
    for name, group in zip(names, (SUBTASK, FAST), strict=True):
        wanted = text["tokenized_prompt_mask"] & (text["token_group"] == group)
        if wanted.any():
            right = (predicted == text["tokenized_prompt"])[wanted]
            scores[name] = Score(int(wanted.any(axis=1).sum()), tokens=float(right.mean()))
    return scores


def _action_score(actions: np.ndarray, frames: Frames, pipeline: Pipeline, threshold: float) -> Score:
    """Over the robot's own dimensions of those actions that are not past an episode's end."""
    error = np.abs(actions - frames.arrays["actions"])[frames.real][:, : pipeline.robot.action_dim]
    within = float((error <= threshold).mean())
    return Score(len(frames), mse=float(np.square(error).mean()), mae=float(error.mean()), within=within)


def _written(frames: Frames, width: int) -> np.ndarray:
    """The subtasks (or answers) of training rows as a model writes them, int32 [N, D]; longer ones are cut."""
    texts = np.zeros((len(frames), width), np.int32)
    groups = frames.arrays["token_group"]
    for row, (ids, group) in enumerate(zip(frames.arrays["tokenized_prompt"], groups, strict=True)):
        own = ids[group == SUBTASK][:width]
        texts[row, : len(own)] = own
    return texts


def _noise(frames: Frames) -> np.ndarray:
    """The same for the same frames."""
    return np.random.default_rng(0).standard_normal(frames.arrays["actions"].shape).astype(np.float32)


def _batches(
    call: Call, assets: Assets, batch: int, frames: Frames, method: str, *arrays: np.ndarray, **options: Any
) -> Any:
    """A method's result over all frames, in batches of one size: the last one repeats frames from the start."""
    results = []
    for start in range(0, len(frames), batch):
        indices = np.arange(start, start + batch) % len(frames)
        data = {key: array[indices] for key, array in frames.arrays.items() if key != "actions"}
        observation = Observation.from_dict(data, assets.model)
        results.append(call(method, observation, *(array[indices] for array in arrays), **options))
    if isinstance(results[0], tuple):
        return tuple(np.concatenate(parts)[: len(frames)] for parts in zip(*results, strict=True))
    return np.concatenate(results)[: len(frames)]


def _runner(checkpoint: Checkpoint, framework: str) -> Call:
    """How to call the methods of a checkpoint's model in a framework."""
    config = checkpoint.assets.model
    if framework == "jax":
        import jax

        from pi0_jax.loading import Model
        from pi0_jax.loading import load as load_jax

        @partial(jax.jit, static_argnames=("method", "num_steps"))
        def jitted(model: Model, method: str, observation: Observation, *arrays: Any, **options: Any) -> Any:
            return getattr(model, method)(observation, *arrays, **options)

        ours = load_jax(checkpoint.folder, config=config)
        return lambda method, *inputs, **options: jax.tree.map(np.asarray, jitted(ours, method, *inputs, **options))
    import torch

    import pi0_torch
    from pi0_torch.loading import to_numpy

    theirs = pi0_torch.load(checkpoint.folder, config=config)

    def run(method: str, observation: Observation, *arrays: np.ndarray, **options: Any) -> Any:
        with torch.no_grad():
            inputs = map(torch.from_numpy, arrays)
            result = getattr(theirs, method)(pi0_torch.to_device(observation), *inputs, **options)
        return tuple(map(to_numpy, result)) if isinstance(result, tuple) else to_numpy(result)

    return run


def table(scores: dict[str, Score], threshold: float) -> str:
    """The scores as text."""
    heads = ["frames", "exact", "tokens", "MSE", "MAE", f"within {threshold:g}"]
    width = max(map(len, scores))
    lines = [" " * width + "".join(f"{head:>13}" for head in heads)]
    for name, score in scores.items():
        values = [getattr(score, column) for column in COLUMNS]
        cells = [
            f"{'' if v is None else f'{v:.1%}' if c in ('exact', 'tokens', 'within') else f'{v:.4g}':>13}"
            for c, v in zip(COLUMNS, values, strict=True)
        ]
        lines.append(f"{name:<{width}}" + "".join(cells))
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    """The command `pi0-eval-offline`."""
    parser = argparse.ArgumentParser(
        prog="pi0-eval-offline",
        description="Compare what a π0 or π0.5 predicts on recorded episodes with what was recorded: subtasks (written "
        "exactly, and token by token), answers, FAST tokens, and normalized actions, sampled directly, after the "
        "predicted subtask and after the true one.",
        epilog="examples:\n"
        "  pi0-eval-offline runs/posttrain                    # the episodes that training held out\n"
        "  pi0-eval-offline runs/posttrain --framework jax --episodes 3 7 --every 5 --json scores.json\n"
        "  pi0-eval-offline runs/pi05_torch --dataset data/droid --episodes 0 1 --questions data/vqa.jsonl",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("checkpoint", help="any checkpoint or run's folder with assets, gs:// or hf://")
    parser.add_argument("--framework", choices=FRAMEWORKS, default="torch", help="what it runs in (default: torch)")
    parser.add_argument("--dataset", help="a LeRobot dataset (default: training's)")
    parser.add_argument("--episodes", type=int, nargs="+", help="episodes (default: those that training held out)")
    parser.add_argument("--subtasks", help="JSONL file of subtasks (default: training's)")
    parser.add_argument("--questions", nargs="+", default=[], help="JSONL files of questions")
    parser.add_argument("--threshold", type=float, default=0.1, help="how near counts, in normalized units (0.1)")
    parser.add_argument("--every", type=int, default=1, help="look at every so many frames (default: 1)")
    parser.add_argument("--batch", type=int, default=16, help="frames at once (default: 16)")
    parser.add_argument("--num-steps", type=int, help="Euler steps (default: the config's)")
    parser.add_argument("--json", type=output_path, help="also write the scores to this file")
    args = parser.parse_args(arguments)
    options = {key: value for key, value in vars(args).items() if key not in ("checkpoint", "json")}
    try:
        if min(args.every, args.batch) < 1:
            raise ValueError("--every and --batch must be at least 1")
        scores = evaluate(args.checkpoint, **options)
        print(table(scores, args.threshold))
        if args.json is not None:
            values = {name: dataclasses.asdict(score) for name, score in scores.items()}
            content = {"checkpoint": args.checkpoint, "framework": args.framework, "threshold": args.threshold}
            temporary = args.json.with_name(f".{args.json.name}.tmp")
            temporary.write_text(json.dumps(content | {"scores": values}, indent=2) + "\n")
            temporary.rename(args.json)
    except (OSError, ValueError) as error:
        print(f"pi0-eval-offline: {error}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
