"""π0.5's whole recipe: the parameters of π0.5, whose PaliGemma also writes subtasks, answers and FAST tokens.

Axes: B batch, S tokens, L text tokens, W width, A action dim, T action horizon, D tokens of a subtask.
`pi0.masks` says who sees whom.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from pi0 import masks, numerics
from pi0.observation import Observation
from pi0.run_config import RecipeConfig
from pi0_torch.models.gemma import Cache, joint_forward
from pi0_torch.models.pi0 import Pi0


class Pi05(Pi0):
    """π0.5. `compute_loss` and `sample_actions` are the plain ones, without text."""

    def prefix_groups(self, observation: Observation) -> Int[Tensor, "B S"]:
        """The group of each token of the prefix: cameras and prompt, then what `token_group` says."""
        groups = observation.token_group
        text = torch.zeros_like(observation.tokenized_prompt) if groups is None else groups
        return F.pad(text, (self.config.prefix_len - self.config.max_token_len, 0))

    def compute_losses(
        self,
        observation: Observation,
        actions: Float[Tensor, "B T A"],
        noise: Float[Tensor, "B T A"],
        time: Float[Tensor, " B"],
        recipe: RecipeConfig,
    ) -> dict[str, Tensor]:
        """The parts of the recipe's loss that have a weight, float32: `text` [B], `fast` [B], `flow` [B, T].

        Text is the cross-entropy of the next token, mean over the group's tokens of each example; flow as in
        `compute_loss`. An example that lacks a part has 0 there. Without `flow` the action expert does not run.
        """
        prefix, valid = self.embed_prefix(observation)
        groups, split = self.prefix_groups(observation), prefix.shape[1]
        experts, xs = [self.paligemma], [prefix]
        conditions: list[Tensor | None] = [None]
        if recipe.flow_weight:
            noise, actions = noise.float(), actions.float()
            t = time.float()[:, None, None]
            x_t, target = t * noise + (1 - t) * actions, noise - actions
            suffix, condition = self.embed_suffix(observation, x_t, time)
            experts, xs, conditions = [*experts, self.action_expert], [prefix, suffix], [None, condition]
            groups = torch.cat([groups, groups.new_full(suffix.shape[:2], masks.ACTIONS)], dim=1)
            valid = torch.cat([valid, valid.new_ones(suffix.shape[:2])], dim=1)
        positions = masks.positions(groups, valid)
        outs, _ = joint_forward(
            experts,
            xs,
            (positions[:, :split], positions[:, split:])[: len(xs)],
            masks.attention_mask(groups, valid),
            conditions,
            insulated=recipe.insulated and len(xs) == 2,
        )
        losses: dict[str, Tensor] = {}
        if recipe.text_weight or recipe.fast_weight:
            losses |= self.text_losses(observation, outs[0])
        if recipe.flow_weight:
            error = self.read_velocity(outs[1], x_t.shape[1]) - target
            if observation.has_actions is not None:
                error = error.masked_fill(~observation.has_actions[:, None, None], 0)
            losses["flow"] = error.square().mean(-1)
        return {name: losses[name] for name, weight in recipe.weights.items() if weight}

    def text_losses(
        self, observation: Observation, prefix_out: Float[Tensor, "B S W"]
    ) -> dict[str, Float[Tensor, " B"]]:
        """Cross-entropy of the subtask and of the FAST tokens, mean over each example's."""
        targets = observation.tokenized_prompt[:, 1:]
        log_p = self.text_logits(prefix_out).log_softmax(dim=-1)
        log_p = log_p.gather(-1, targets[..., None].long())[..., 0]
        groups = self.prefix_groups(observation)[:, -targets.shape[1] :]
        losses = {}
        for name, group in (("text", masks.SUBTASK), ("fast", masks.FAST)):
            wanted = observation.tokenized_prompt_mask[:, 1:] & (groups == group)
            losses[name] = -(log_p * wanted).sum(dim=1) / wanted.sum(dim=1).clamp(min=1)
        return losses

    def text_logits(self, prefix_out: Float[Tensor, "B S W"]) -> Float[Tensor, "B L V"]:
        """What the prefix's outputs predict for each text token but the first."""
        return self.paligemma.logits(prefix_out[:, -self.config.max_token_len : -1])

    @torch.no_grad()
    def next_tokens(self, observation: Observation) -> Int[Tensor, "B L"]:
        """For each text token but the first, the likeliest one after those that are really before it (for metrics)."""
        prefix, valid = self.embed_prefix(observation)
        groups = self.prefix_groups(observation)
        positions, mask = masks.positions(groups, valid), masks.attention_mask(groups, valid)
        (out,), _ = joint_forward((self.paligemma,), (prefix,), (positions,), mask, (None,))
        return self.text_logits(out).argmax(dim=-1)

    @torch.no_grad()
    def sample(
        self,
        observation: Observation,
        noise: Float[Tensor, "B T A"],
        subtask: Int[Tensor, "B D"] | None = None,
        num_steps: int | None = None,
        max_decoding_steps: int | None = None,
        *,
        temperature: float = 0.0,
        rng: torch.Generator | None = None,
        eos_token: int = numerics.EOS_TOKEN,
    ) -> tuple[Int[Tensor, "B D"], Float[Tensor, "B T A"]]:
        """Write the subtask, or take it as given, and sample actions that see it; returns its tokens and the actions.

        Subtasks end with `eos_token` and then zeros, or are cut. The options and errors are those of `decode` and
        `sample_actions`. The prefix runs once: the subtask's keys and values are appended to
        its cache. Training rows are taken without their own answers.
        """
        observation = observation.prompt_only()
        if subtask is None:
            steps = self.config.runtime.max_decoding_steps if max_decoding_steps is None else max_decoding_steps
            options = {"temperature": temperature, "rng": rng}
            subtask, cache, seen = self.write_subtask(observation, steps, eos_token, **options)
        else:
            cache, seen = self.read_subtask(observation, subtask, eos_token)
        return subtask, self.integrate(observation, noise, num_steps, cache, seen)

    @torch.no_grad()
    def write_subtask(
        self, observation: Observation, steps: int, eos_token: int, **options: Any
    ) -> tuple[Int[Tensor, "B D"], Cache, Bool[Tensor, "B S"]]:
        """The subtask, `decode`d with its options, and the cache and its valid tokens of the prompt and the subtask."""
        prefix, valid = self.embed_prefix(observation)
        groups = self.prefix_groups(observation)
        positions, mask = masks.positions(groups, valid), masks.attention_mask(groups, valid)
        (out,), cache = joint_forward((self.paligemma,), (prefix,), (positions,), mask, (None,))
        subtask, cache = self.decode(out, cache, valid, steps, read_last=True, eos_token=eos_token, **options)
        return subtask, cache, torch.cat([valid, written(subtask, eos_token)], dim=1)

    @torch.no_grad()
    def read_subtask(
        self, observation: Observation, subtask: Int[Tensor, "B D"], eos_token: int
    ) -> tuple[Cache, Bool[Tensor, "B S"]]:
        """The cache and its valid tokens of the prompt and a given subtask."""
        prefix, valid = self.embed_prefix(observation)
        prefix = torch.cat([prefix, self.paligemma.embed(subtask)], dim=1)
        valid = torch.cat([valid, written(subtask, eos_token)], dim=1)
        groups = self.prefix_groups(observation)
        groups = torch.cat([groups, groups.new_full(subtask.shape, masks.SUBTASK)], dim=1)
        positions, mask = masks.positions(groups, valid), masks.attention_mask(groups, valid)
        _, cache = joint_forward((self.paligemma,), (prefix,), (positions,), mask, (None,))
        return cache, valid


def written(tokens: Int[Tensor, "B D"], eos_token: int) -> Bool[Tensor, "B D"]:
    """Which tokens are text: all up to the first `eos_token`, itself included."""
    ends = tokens == eos_token
    return ends.cumsum(dim=1) - ends.int() == 0
