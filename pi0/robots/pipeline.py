"""From a robot's frame to the model's inputs and back, as configured by a checkpoint's assets."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from pi0.assets import Assets, AssetsError
from pi0.robots import transforms as t
from pi0.robots.normalize import check_norm_stats
from pi0.robots.registry import make_robot
from pi0.robots.robot import Robot
from pi0.tokenizers.fast import FASTTokenizer
from pi0.tokenizers.prompts import FASTPromptTokenizer, RecipeTokenizer
from pi0.tokenizers.text import TextTokenizer


@dataclasses.dataclass(frozen=True)
class Pipeline:
    """A robot's adapter and the transforms between it and a model."""

    robot: Robot
    transforms: t.Transforms
    tokenizer: TextTokenizer  # of the transforms: it counts the prompts that were too long

    @classmethod
    def from_assets(cls, assets: Assets) -> Pipeline:
        """The pipeline that a model was trained with.

        A robot of another package must have been imported already. Raises AssetsError for missing or unsuitable assets.
        """
        model, family, stats = assets.model, assets.model.family, assets.norm_stats
        needed = ["robot", "norm_stats", "normalization", "tokenizer"]
        needed += ["action_tokenizer"] if family.action_tokens else []
        missing = [name for name in needed if getattr(assets, name) is None]
        if missing:
            raise AssetsError(f"the checkpoint's config.json has no {', '.join(missing)}, which a robot's data needs")
        assert assets.robot is not None and stats is not None
        assert assets.normalization is not None and assets.tokenizer is not None
        try:
            robot = make_robot(assets.robot, imports=False)
        except ValueError as error:
            raise AssetsError(str(error)) from error
        try:
            dims = {"state": robot.state_dim, "actions": robot.action_dim}
            padded = {"state": model.state_size, "actions": model.action_dim}
            check_norm_stats(stats, assets.normalization, dims, padded)
            if unknown := sorted(set(robot.cameras.values()) - set(model.image_keys)):
                raise ValueError(f"its cameras are the model's {unknown}; the model has {list(model.image_keys)}")
        except ValueError as error:
            raise AssetsError(f"assets {assets.asset_id!r} do not fit {type(robot).__name__}: {error}") from error
        tokenizer = TextTokenizer.from_reference(assets.tokenizer)
        if tokenizer.vocab_size > model.vocab_size:
            raise AssetsError(f"the tokenizer has {tokenizer.vocab_size} tokens, the model only {model.vocab_size}")
        steps: list[t.Step] = [] if robot.delta_mask is None else [t.DeltaActions(robot.delta_mask)]
        steps += [t.Normalize(stats, assets.normalization)]
        steps += [] if robot.default_prompt is None else [t.DefaultPrompt(robot.default_prompt)]
        steps += [
            t.CameraMasks(model.image_keys, dummy=not family.masked_cameras),
            t.ResizeImages(*model.image_resolution),
            PROMPTS[family.prompt](assets, tokenizer, robot),
            t.PadDims(model.action_dim, robot.action_dim, family.action_tokens, model.state_dim),
        ]
        return cls(robot, t.Transforms(steps), tokenizer)

    @property
    def normalize(self) -> t.Normalize:
        """The normalization step."""
        return next(step for step in self.transforms.steps if isinstance(step, t.Normalize))

    @property
    def recipe(self) -> t.TokenizeRecipe | None:
        """The tokenization step of π0.5's recipe, where the model was trained with it."""
        return next((step for step in self.transforms.steps if isinstance(step, t.TokenizeRecipe)), None)

    def __call__(self, item: Mapping[str, Any], *, actions: bool = True) -> dict[str, Any]:
        """A recorded or live frame as one row of the model's inputs, with normalized `actions` [T, A] if any.

        Without `actions`, recorded actions are ignored. A question of `annotations.Questions` bypasses the robot
        adapter.
        """
        if "question" in item:
            return self.transforms(dict(item))
        if not actions:
            recorded = {name for names in self.robot.action_names for name in names}
            item = {key: value for key, value in item.items() if key not in recorded}
        data = self.robot.to_model(item)
        if "prompt" not in data and self.robot.default_prompt is None:
            raise ValueError(f"no `prompt` or `task` in a frame of {sorted(item)}; the robot has no default_prompt")
        subtask = {"subtask": item["subtask"]} if self.recipe is not None and "subtask" in item else {}
        return self.transforms(data | subtask)

    def chunk(self, item: Mapping[str, Any], actions: Any) -> np.ndarray:
        """Actions [T, A] in the robot's units as the model's, normalized and padded, float32 [T, model dims].

        Relative ones are relative to the state of the frame `item`. Raises ValueError for what does not fit.
        """
        data = self.robot.chunk(item, actions)
        for step in self.transforms.steps:
            if isinstance(step, t.DeltaActions | t.Normalize | t.PadDims):
                data = step(data)
        return data["actions"]

    def text(self, tokens: np.ndarray) -> str:
        """The text of a subtask or answer [D] generated by π0.5. Raises AssetsError for a model that generates none."""
        if self.recipe is None:
            raise AssetsError("the checkpoint's assets have no recipe of π0.5: it generates no text")
        return self.recipe.tokenizer.read(tokens)

    def subtask_tokens(self, text: str, length: int) -> np.ndarray:
        """The tokens int32 [length] of a subtask as π0.5 writes them, to give to `sample_with_subtask`.

        Raises AssetsError for a model that writes none, and ValueError for a text that is longer.
        """
        if self.recipe is None:
            raise AssetsError("the checkpoint's assets have no recipe of π0.5: it writes no subtasks")
        return self.recipe.tokenizer.encode_subtask(text, length)

    def actions(self, output: np.ndarray, state: np.ndarray | None = None) -> np.ndarray:
        """The model's actions [T, A], or π0-FAST's tokens [N], in the robot's dimensions and units, [T, robot dims].

        `state` [A] is that of the model's inputs. Raises ValueError without it where actions are relative to it, and
        FASTError for tokens that do not decode.
        """
        output = np.asarray(output)
        data = {"tokens" if output.ndim == 1 else "actions": output}
        data |= {} if state is None else {"state": np.asarray(state)}
        return self.robot.from_model(self.transforms.inverse(data))["action"]


def _state_prompt(assets: Assets, text: TextTokenizer, robot: Robot) -> t.Step:
    model = assets.model
    if not assets.subtasks and (assets.training or {}).get("recipe") is None:
        return t.TokenizePrompt(text, model.max_token_len, state_in_prompt=assets.state_in_prompt)
    recipe = RecipeTokenizer(text, None if assets.action_tokenizer is None else _fast(assets, text))
    return t.TokenizeRecipe(recipe, model.max_token_len, model.action_horizon, assets.subtasks)


def _fast_prompt(assets: Assets, text: TextTokenizer, robot: Robot) -> t.Step:
    model = assets.model
    return t.TokenizeFASTPrompt(_fast(assets, text), model.max_token_len, model.action_horizon, robot.action_dim)


def _fast(assets: Assets, text: TextTokenizer) -> FASTPromptTokenizer:
    assert assets.action_tokenizer is not None
    fast, model = FASTTokenizer.from_reference(assets.action_tokenizer), assets.model
    return FASTPromptTokenizer(text, fast, model.vocab_size, model.format)


# The tokenization step of each prompt format (`Family.prompt`).
PROMPTS: dict[str, Callable[[Assets, TextTokenizer, Robot], t.Step]] = {
    "text": lambda assets, text, _: t.TokenizePrompt(text, assets.model.max_token_len, state_in_prompt=False),
    "state": _state_prompt,
    "fast": _fast_prompt,
}
