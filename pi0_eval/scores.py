"""Score a checkpoint's subtasks, tokens and actions on recorded episodes, in either framework: `pi0-eval-offline`.

Axes: N frames, B batch, T action horizon, A action dim, D decoded tokens, L text tokens.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from convert.checkpoints import Checkpoint, open_checkpoint
from pi0.assets import Assets
from pi0.command import add_checkpoint, exit_on_error, make_parser, output_path
from pi0.datasets.annotations import AnnotatedDataset, Questions
from pi0.datasets.registry import open_dataset
from pi0.masks import FAST, SUBTASK
from pi0.observation import Observation
from pi0.robots.pipeline import Pipeline
from pi0.storage import write_text
from pi0_eval.parity.frameworks import FRAMEWORKS

CallModel = Callable[..., Any]  # (method, observation, *arrays, **options): a model's method, NumPy in and out
COLUMNS = ("count", "exact", "tokens", "mse", "mae", "within")


@dataclasses.dataclass(frozen=True)
class Score:
    """The quality of one part over `count` examples; None for metrics that do not apply.

    `exact` is the exact-match rate of texts, `tokens` the accuracy of next-token prediction (teacher forcing); `mse`,
    `mae` and `within`, the fraction of errors up to the threshold, are those of normalized actions.
    """

    count: int
    exact: float | None = None
    tokens: float | None = None
    mse: float | None = None
    mae: float | None = None
    within: float | None = None


@dataclasses.dataclass(frozen=True)
class Frames:
    """Model inputs stacked by key, and the mask `real` [N, T] of actions within their episode."""

    arrays: dict[str, np.ndarray]
    real: np.ndarray

    @classmethod
    def read(cls, items: Any, pipeline: Pipeline, horizon: int) -> Frames:
        """All items of a dataset; cameras that an item does not have are zero images."""
        items = [items[i] for i in range(len(items))]
        rows = [pipeline(item) for item in items]
        real = [~np.asarray(item.get("action_is_pad", np.ones(horizon, bool))) for item in items]
        zeros = {key: np.zeros_like(row[key]) for row in rows for key in row if key.startswith("image/")}
        return cls({key: np.stack([(zeros | row)[key] for row in rows]) for key in rows[0] | zeros}, np.stack(real))

    def __len__(self) -> int:
        return len(self.real)

    def select(self, which: np.ndarray) -> Frames:
        """The frames of an index int [M] or mask bool [N]."""
        return Frames({key: array[which] for key, array in self.arrays.items()}, self.real[which])

    def noise(self) -> np.ndarray:
        """Noise [N, T, A] to sample from, deterministic."""
        return np.random.default_rng(0).standard_normal(self.arrays["actions"].shape).astype(np.float32)

    def texts(self, width: int) -> np.ndarray:
        """The recorded subtasks (or answers) as a model decodes them, int32 [N, D], truncated to `width`."""
        texts = np.zeros((len(self), width), np.int32)
        rows = zip(self.arrays["tokenized_prompt"], self.arrays["token_group"], strict=True)
        for row, (ids, group) in enumerate(rows):
            own = ids[group == SUBTASK][:width]
            texts[row, : len(own)] = own
        return texts


@dataclasses.dataclass(frozen=True)
class Evaluator:
    """A model with the options that all scores share: how to call it, batch size, Euler steps, threshold."""

    call: CallModel
    assets: Assets
    batch: int
    num_steps: int | None
    threshold: float

    def run(self, frames: Frames, method: str, *arrays: np.ndarray, **options: Any) -> Any:
        """A method's results over all frames, in batches of one size; the last is padded with frames from the start."""
        results = []
        for start in range(0, len(frames), self.batch):
            indices = np.arange(start, start + self.batch) % len(frames)
            data = {key: array[indices] for key, array in frames.arrays.items() if key != "actions"}
            observation = Observation.from_dict(data, self.assets.model)
            results.append(self.call(method, observation, *(array[indices] for array in arrays), **options))
        if isinstance(results[0], tuple):
            return tuple(np.concatenate(parts)[: len(frames)] for parts in zip(*results, strict=True))
        return np.concatenate(results)[: len(frames)]

    def actions(self, frames: Frames, pipeline: Pipeline) -> Score:
        """Actions sampled directly, without a subtask."""
        return self._compare(self.run(frames, "sample", frames.noise(), num_steps=self.num_steps), frames, pipeline)

    def with_subtasks(self, frames: Frames, tokens: Score) -> dict[str, Score]:
        """The subtasks of frames that have one, and the actions after the predicted and after the recorded subtask."""
        frames = frames.select((frames.arrays["token_group"] == SUBTASK).any(axis=1))
        pipeline, sample = Pipeline.from_assets(self.assets), partial(self.run, frames, "sample_with_subtask")
        written, predicted = sample(frames.noise(), num_steps=self.num_steps)
        truth = frames.texts(self.assets.model.runtime.max_decoding_steps)
        _, given = sample(frames.noise(), truth, num_steps=self.num_steps)
        return {
            "subtask": dataclasses.replace(tokens, exact=exact_match(written, truth)),
            "actions, predicted subtask": self._compare(predicted, frames, pipeline),
            "actions, true subtask": self._compare(given, frames, pipeline),
        }

    def answers(self, frames: Frames) -> Score:
        """The answers to questions."""
        written, _ = self.run(frames, "sample_with_subtask", frames.noise(), num_steps=self.num_steps)
        truth = frames.texts(self.assets.model.runtime.max_decoding_steps)
        return dataclasses.replace(self.next_tokens(frames)["subtask"], exact=exact_match(written, truth))

    def next_tokens(self, frames: Frames) -> dict[str, Score]:
        """Next-token prediction of subtasks (or answers) and of FAST tokens."""
        predicted = self.run(frames, "next_tokens")
        text = {key: frames.arrays[key][:, 1:] for key in ("tokenized_prompt", "tokenized_prompt_mask", "token_group")}
        scores = {}
        for name, group in (("subtask", SUBTASK), ("FAST tokens", FAST)):
            wanted = text["tokenized_prompt_mask"] & (text["token_group"] == group)
            if wanted.any():
                right = (predicted == text["tokenized_prompt"])[wanted]
                scores[name] = Score(int(wanted.any(axis=1).sum()), tokens=float(right.mean()))
        return scores

    def _compare(self, actions: np.ndarray, frames: Frames, pipeline: Pipeline) -> Score:
        """Score actions [N, T, A] in the robot's dimensions, within episodes."""
        error = np.abs(actions - frames.arrays["actions"])[frames.real][:, : pipeline.robot.action_dim]
        within = float((error <= self.threshold).mean())
        return Score(len(frames), mse=float(np.square(error).mean()), mae=float(error.mean()), within=within)


def evaluate(
    source: str | Path,
    *,
    framework: str = "torch",
    asset_id: str | None = None,
    dataset: str | None = None,
    format: str | None = None,
    episodes: Sequence[int] | None = None,
    subtasks: str | None = None,
    questions: Sequence[str] = (),
    threshold: float = 0.1,
    every: int = 1,
    batch: int = 16,
    num_steps: int | None = None,
) -> dict[str, Score]:
    """The scores of a checkpoint by part, over every `every`-th frame.

    The dataset, its format, the file of subtasks and the held-out episodes default to those of training. Raises
    ValueError where the checkpoint does not name them, and the errors of reading.
    """
    checkpoint = open_checkpoint(source, asset_id=asset_id)
    assets, data = checkpoint.assets, (checkpoint.assets.training or {}).get("data", {})
    model, dataset, subtasks = assets.model, dataset or data.get("root"), subtasks or data.get("subtasks")
    episodes = data.get("validation_episodes") if episodes is None else episodes
    if model.family.action_tokens:
        raise ValueError(f"pi0-eval-offline scores sampled actions; {model.family.title} is scored by its token loss")
    if not dataset or not episodes:
        raise ValueError(f"{source} does not name a dataset and held-out episodes; pass --dataset and --episodes")
    pipeline, horizon = Pipeline.from_assets(assets), model.action_horizon
    options: dict[str, Any] = {"format": format or data.get("format") or "lerobot", "episodes": episodes}
    recorded: Any = open_dataset(dataset, pipeline.robot, action_horizon=horizon, **options)
    if subtasks:
        recorded = AnnotatedDataset(recorded, subtasks)
    items = [recorded[i] for i in range(0, len(recorded), every)]
    evaluator = Evaluator(load_model(checkpoint, framework), assets, batch, num_steps, threshold)
    scores: dict[str, Score] = {}
    if pipeline.recipe is not None:
        frames = Frames.read(items, pipeline, horizon)
        scores |= evaluator.next_tokens(frames)
        if assets.subtasks and "subtask" in scores:
            scores |= evaluator.with_subtasks(frames, scores["subtask"])
        for file in questions:
            asked = Frames.read(Questions(file, model.image_keys[0]), pipeline, horizon)
            scores[f"answers, {Path(file).stem}"] = evaluator.answers(asked)
    plain = Pipeline.from_assets(dataclasses.replace(assets, subtasks=False, action_tokenizer=None, training=None))
    scores["actions, directly"] = evaluator.actions(Frames.read(items, plain, horizon), plain)
    return scores


def exact_match(a: np.ndarray, b: np.ndarray) -> float:
    """The fraction of equal texts [N, D]."""
    return float((a == b).all(axis=1).mean())


def load_model(checkpoint: Checkpoint, framework: str) -> CallModel:
    """A function that calls the methods of a checkpoint's model in a framework."""
    if framework == "jax":
        import jax

        from pi0_jax.loading import load_model as load_jax

        @partial(jax.jit, static_argnames=("method", "num_steps"))
        def jitted(model: Any, method: str, observation: Observation, *arrays: Any, **options: Any) -> Any:
            return getattr(model, method)(observation, *arrays, **options)

        in_jax = load_jax(checkpoint)
        return lambda method, *inputs, **options: jax.tree.map(np.asarray, jitted(in_jax, method, *inputs, **options))
    import torch

    from pi0_torch.loading import load_model as load_torch
    from pi0_torch.loading import to_device, to_numpy

    in_torch = load_torch(checkpoint)

    @torch.no_grad()
    def run(method: str, observation: Observation, *arrays: np.ndarray, **options: Any) -> Any:
        result = getattr(in_torch, method)(to_device(observation), *map(torch.from_numpy, arrays), **options)
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


@exit_on_error("pi0-eval-offline")
def main(arguments: list[str] | None = None) -> None:
    """The command `pi0-eval-offline`. Raises ValueError for `--every` or `--batch` below 1."""
    parser = make_parser(
        "pi0-eval-offline",
        "Score the predictions of π0 or π0.5 on recorded episodes: subtasks (exact match and next tokens), answers, "
        "FAST tokens, and normalized actions, sampled directly, after the predicted and after the true subtask.",
        "examples:\n"
        "  pi0-eval-offline runs/posttrain                    # the episodes that training held out\n"
        "  pi0-eval-offline runs/posttrain --framework jax --episodes 3 7 --every 5 --json scores.json\n"
        "  pi0-eval-offline runs/pi05_torch --dataset data/droid --episodes 0 1 --questions data/vqa.jsonl",
    )
    add_checkpoint(parser)
    parser.add_argument("--framework", choices=FRAMEWORKS, default="torch", help="default torch")
    parser.add_argument("--dataset", help="a folder, hf://datasets/…, gs://… or bundled://… (default: training's)")
    parser.add_argument("--format", help='of the dataset: a name or "module:Name" (default: training\'s, or lerobot)')
    parser.add_argument("--episodes", type=int, nargs="+", help="episodes (default: those held out in training)")
    parser.add_argument("--subtasks", help="JSONL file of subtasks (default: training's)")
    parser.add_argument("--questions", nargs="+", default=[], help="JSONL files of questions")
    parser.add_argument("--threshold", type=float, default=0.1, help="of `within`, in normalized units (default 0.1)")
    parser.add_argument("--every", type=int, default=1, help="use every so many frames (default 1)")
    parser.add_argument("--batch", type=int, default=16, help="frames at a time (default 16)")
    parser.add_argument("--num-steps", type=int, help="Euler steps (default: the checkpoint's)")
    parser.add_argument("--json", type=output_path, help="write the scores to this file")
    args = parser.parse_args(arguments)
    if min(args.every, args.batch) < 1:
        raise ValueError("--every and --batch must be at least 1")
    options = {key: value for key, value in vars(args).items() if key not in ("checkpoint", "json")}
    scores = evaluate(args.checkpoint, **options)
    print(table(scores, args.threshold))
    if args.json is not None:
        values = {name: dataclasses.asdict(score) for name, score in scores.items()}
        content = {"checkpoint": args.checkpoint, "framework": args.framework, "threshold": args.threshold}
        write_text(args.json, json.dumps(content | {"scores": values}, indent=2) + "\n")
