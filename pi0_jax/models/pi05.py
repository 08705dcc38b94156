"""π0.5: the state is in the prompt, the flow time in the action expert's norms, and PaliGemma may write text too.

Subtasks, answers and FAST tokens are written after the prompt; the attention mask is that of `pi0.masks`.
Axes: B batch, S tokens, L text tokens, W width, A action dim, T action horizon, D tokens of a subtask, E Euler steps.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from pi0 import masks, numerics
from pi0.observation import Observation
from pi0.policy.rtc import RTC, Previous
from pi0.recording import record
from pi0.run_config import RecipeConfig
from pi0_jax.models.decoding import written
from pi0_jax.models.flow import FlowModel, SuffixSteps, interpolate
from pi0_jax.models.gemma import Cache, Condition, TwoTimes, joint_forward
from pi0_jax.models.rtc import loss_of_rest


class Pi05(FlowModel):
    """π0.5. `compute_loss` and `sample_actions` are those without text."""

    def add_projections(self, width: int, rngs: nnx.Rngs) -> None:
        """Add those of the time."""
        self.time_mlp_in = self.projection(width, width, rngs)
        self.time_mlp_out = self.projection(width, width, rngs)

    def embed_suffix(
        self,
        observation: Observation,
        x_t: Float[Array, "B T A"],
        time: Float[Array, " B"],
        given: Bool[Array, "B T"] | None = None,
    ) -> tuple[Float[Array, "B S W"], Condition]:
        """Tokens of the action expert, T actions, and the condition of its norms."""
        tokens = record("action_in_proj", self.action_in_proj(x_t))
        condition = record("condition", self.condition(time))
        return tokens, condition if given is None else TwoTimes(condition, self.condition(jnp.zeros(1)), given)

    def condition(self, time: Float[Array, " B"]) -> Float[Array, "B W"]:
        """The condition of the action expert's adaptive norms."""
        embedded = self.embed_time(time, self.time_mlp_in.kernel.shape[0])
        return nnx.silu(self.time_mlp_out(nnx.silu(self.time_mlp_in(embedded))))

    def suffix_steps(self, times: Float[Array, " E"]) -> SuffixSteps:
        """The time is in the condition alone."""
        action_in, condition = self.action_in_proj, self.condition(times)
        assert action_in.bias is not None
        bias = jnp.broadcast_to(action_in.bias[...].astype(action_in.dtype), condition.shape)
        return SuffixSteps(action_in.kernel[...].astype(action_in.dtype), bias, condition)

    def prefix_groups(self, observation: Observation) -> Int[Array, "B S"]:
        """The group of each token of the prefix: images and prompt, and those of `token_group`."""
        groups = observation.token_group
        text = jnp.zeros_like(observation.tokenized_prompt) if groups is None else groups
        return jnp.pad(text, ((0, 0), (self.config.prefix_len - self.config.max_token_len, 0)))

    def loss_parts(
        self,
        observation: Observation,
        actions: Float[Array, "B T A"],
        noise: Float[Array, "B T A"],
        time: Float[Array, " B"],
        recipe: RecipeConfig | None = None,
        delay: Int[Array, " B"] | None = None,
    ) -> dict[str, Array]:
        """The parts of the training loss that have a weight in the recipe (default: `flow` alone), float32.

        `text` [B] and `fast` [B] are the cross-entropy of the next token, mean over the group's tokens of each example;
        `flow` [B, T] and `delay` are as in `compute_loss`. An example that lacks a part has 0 there. Without `flow` the
        action expert does not run.
        """
        if recipe is None:
            return super().loss_parts(observation, actions, noise, time, delay=delay)
        prefix, valid = self.embed_prefix(observation)
        groups, split = self.prefix_groups(observation), prefix.shape[1]
        experts, xs = [self.paligemma], [prefix]
        conditions: list[Condition | None] = [None]
        if recipe.flow_weight:
            x_t, target, given = interpolate(actions, noise, time, self.config.runtime.dtype, delay)
            suffix, condition = self.embed_suffix(observation, x_t, time, given)
            experts, xs, conditions = [*experts, self.action_expert], [prefix, suffix], [None, condition]
            groups = jnp.concatenate([groups, jnp.full(suffix.shape[:2], masks.ACTIONS)], axis=1)
            valid = jnp.concatenate([valid, jnp.ones(suffix.shape[:2], bool)], axis=1)
        positions = masks.positions(groups, valid)
        outs, _ = joint_forward(
            experts,
            xs,
            (positions[:, :split], positions[:, split:])[: len(xs)],
            masks.attention_mask(groups, valid),
            conditions,
            insulated=recipe.insulated and len(xs) == 2,
        )
        losses: dict[str, Array] = {}
        if recipe.text_weight or recipe.fast_weight:
            losses |= self.text_losses(observation, outs[0])
        if recipe.flow_weight:
            error = self.read_velocity(outs[1], x_t.shape[1]) - target
            if observation.has_actions is not None:
                error = jnp.where(observation.has_actions[:, None, None], error, 0)
            losses["flow"] = loss_of_rest(jnp.square(error).mean(-1), given)
        return {name: losses[name] for name, weight in recipe.weights.items() if weight}

    def text_losses(self, observation: Observation, prefix_out: Float[Array, "B S W"]) -> dict[str, Float[Array, " B"]]:
        """Cross-entropy of the subtask and of the FAST tokens, mean over each example's."""
        targets = observation.tokenized_prompt[:, 1:]
        log_p = jax.nn.log_softmax(self.text_logits(prefix_out))
        log_p = jnp.take_along_axis(log_p, targets[..., None], axis=-1)[..., 0]
        groups = self.prefix_groups(observation)[:, -targets.shape[1] :]
        losses = {}
        for name, group in (("text", masks.SUBTASK), ("fast", masks.FAST)):
            wanted = observation.tokenized_prompt_mask[:, 1:] & (groups == group)
            losses[name] = -(log_p * wanted).sum(axis=1) / jnp.maximum(wanted.sum(axis=1), 1)
        return losses

    def text_logits(self, prefix_out: Float[Array, "B S W"]) -> Float[Array, "B L V"]:
        """The logits of each text token but the first, from the prefix's outputs."""
        return self.paligemma.logits(prefix_out[:, -self.config.max_token_len : -1])

    def next_tokens(self, observation: Observation) -> Int[Array, "B L"]:
        """The likeliest token after the true ones before it, for each text token but the first (for metrics)."""
        out, _, _ = self.read_text(observation)
        return jnp.argmax(self.text_logits(out), axis=-1)

    def read_text(
        self, observation: Observation, subtask: Int[Array, "B D"] | None = None, eos_token: int = numerics.EOS_TOKEN
    ) -> tuple[Float[Array, "B S W"], Cache, Bool[Array, "B S"]]:
        """PaliGemma over the images, the text and a given subtask: its output, its cache and the valid tokens of it."""
        prefix, valid = self.embed_prefix(observation)
        groups = self.prefix_groups(observation)
        if subtask is not None:
            prefix = jnp.concatenate([prefix, self.paligemma.embed(subtask)], axis=1)
            valid = jnp.concatenate([valid, written(subtask, eos_token)], axis=1)
            groups = jnp.concatenate([groups, jnp.full(subtask.shape, masks.SUBTASK)], axis=1)
        return *self.read_prefix(prefix, valid, masks.attention_mask(groups, valid)), valid

    def sample_with_subtask(
        self,
        observation: Observation,
        noise: Float[Array, "B T A"],
        subtask: Int[Array, "B D"] | None = None,
        num_steps: int | None = None,
        max_decoding_steps: int | None = None,
        *,
        temperature: float = 0.0,
        rng: Array | None = None,
        eos_token: int = numerics.EOS_TOKEN,
        rtc: RTC | None = None,
        previous: Previous | None = None,
        stages: dict[str, Array] | None = None,
    ) -> tuple[Int[Array, "B D"], Float[Array, "B T A"]]:
        """Write a subtask, unless it is given, and sample actions that attend to it; returns its tokens and them.

        Subtasks end with `eos_token` and then zeros, or are cut. The options and errors are those of `decoding.decode`
        and `sample_actions`; all numbers are static. The prefix runs once: the subtask's keys and values are appended
        to its cache. Training rows are taken without their own answers.
        """
        observation = observation.prompt_only()
        out, cache, seen = self.read_text(observation, subtask, eos_token)
        if subtask is None:
            steps = self.config.runtime.max_decoding_steps if max_decoding_steps is None else max_decoding_steps
            options = {"temperature": temperature, "rng": rng, "eos_token": eos_token, "stages": stages}
            subtask, cache = self.decode(out, cache, seen, steps, read_last=True, **options)
            seen = jnp.concatenate([seen, written(subtask, eos_token)], axis=1)
        return subtask, self.integrate(observation, noise, num_steps, cache, seen, rtc, previous)
