"""From a robot's frame to a model's input and back, as a checkpoint's assets say."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from pi0.assets import Assets, AssetsError
from pi0.robots import Robot, make_robot
from pi0.robots.transforms import (
    CameraMasks,
    DefaultPrompt,
    DeltaActions,
    Normalize,
    PadDims,
    ResizeImages,
    Step,
    TokenizeFASTPrompt,
    TokenizePrompt,
    TokenizeRecipe,
    Transforms,
)
from pi0.tokenizers.fast import FASTTokenizer
from pi0.tokenizers.prompts import FASTPromptTokenizer, RecipeTokenizer
from pi0.tokenizers.text import TextTokenizer


@dataclasses.dataclass(frozen=True)
class Pipeline:
    """One robot's adapter and the transforms between it and a model."""

    robot: Robot
    transforms: Transforms

    @classmethod
    def from_assets(cls, assets: Assets) -> Pipeline:
        """The pipeline that a model was trained with. Raises AssetsError where the assets do not say it."""
        needed = ["robot", "norm_stats", "normalization", "tokenizer"]
        needed += ["action_tokenizer"] if assets.model.kind == "pi0_fast" else []
        missing = [name for name in needed if getattr(assets, name) is None]
        if missing:
            raise AssetsError(f"the checkpoint's config.json has no {', '.join(missing)}, which a robot's data needs")
        model, stats = assets.model, assets.norm_stats
        assert assets.robot is not None and stats is not None
        assert assets.normalization is not None and assets.tokenizer is not None
        try:
            robot = make_robot(assets.robot)
        except ValueError as error:
            raise AssetsError(str(error)) from error
        tokenizer = TextTokenizer.from_reference(assets.tokenizer)
        if tokenizer.vocab_size > model.vocab_size:
            raise AssetsError(f"the tokenizer has {tokenizer.vocab_size} tokens, the model only {model.vocab_size}")
        tokenize: Step = TokenizePrompt(
            tokenizer, model.max_token_len, state_in_prompt=model.kind == "pi05" and assets.state_in_prompt
        )
        if model.kind == "pi0_fast":
            assert assets.action_tokenizer is not None
            fast = FASTTokenizer.from_reference(assets.action_tokenizer)
            whole = FASTPromptTokenizer(tokenizer, fast, model.vocab_size)
            tokenize = TokenizeFASTPrompt(whole, model.max_token_len, model.action_horizon, robot.action_dim)
        elif model.kind == "pi05" and (assets.subtasks or "recipe" in (assets.training or {})):
            written = None
            if assets.action_tokenizer is not None:
                fast = FASTTokenizer.from_reference(assets.action_tokenizer)
                written = FASTPromptTokenizer(tokenizer, fast, model.vocab_size)
            recipe = RecipeTokenizer(tokenizer, written)
            tokenize = TokenizeRecipe(recipe, model.max_token_len, model.action_horizon, assets.subtasks)
        steps: list[Step] = [] if robot.delta_mask is None else [DeltaActions(robot.delta_mask)]
        steps += [Normalize(stats, assets.normalization)]
        steps += [] if robot.default_prompt is None else [DefaultPrompt(robot.default_prompt)]
        steps += [
            CameraMasks(model.image_keys, black=model.kind == "pi0_fast"),
            ResizeImages(*model.image_resolution),
            tokenize,
            PadDims(model.action_dim, robot.action_dim, cut_state=model.kind == "pi0_fast"),
        ]
        return cls(robot, Transforms(steps))

    @property
    def recipe(self) -> TokenizeRecipe | None:
        """The step that makes the texts of π0.5's recipe, where the model was trained by it."""
        return next((step for step in self.transforms.steps if isinstance(step, TokenizeRecipe)), None)

    def __call__(self, item: Mapping[str, Any]) -> dict[str, Any]:
        """A recorded or live frame as one row of the model's inputs, with normalized `actions` [T, A] if any.

        A question of `pi0.datasets.Questions` is no robot's, and goes by its adapter.
        """
        if "question" in item:
            return self.transforms(dict(item))
        subtask = {"subtask": item["subtask"]} if self.recipe is not None and "subtask" in item else {}
        return self.transforms(self.robot.to_model(item) | subtask)

    def text(self, tokens: np.ndarray) -> str:
        """What the subtask or answer [D] that π0.5 wrote says. Raises AssetsError for a model that writes none."""
        if self.recipe is None:
            raise AssetsError("the checkpoint's assets know no recipe of π0.5: it writes no text")
        return self.recipe.tokenizer.read(tokens)

    def actions(self, output: np.ndarray, state: np.ndarray | None = None) -> np.ndarray:
        """The model's actions [T, A], or π0-FAST's tokens [N], in the robot's dimensions and units, [T, robot dims].

        `state` [A] is the row's, as the model saw it. Raises ValueError without it where actions are relative to it,
        and FASTError for tokens that are no actions.
        """
        output = np.asarray(output)
        data = {"tokens" if output.ndim == 1 else "actions": output}
        data |= {} if state is None else {"state": np.asarray(state)}
        return self.robot.from_model(self.transforms.inverse(data))["action"]
