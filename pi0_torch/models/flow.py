"""What π0 and π0.5 share: a vision-language model and an action expert, trained by flow matching.

Axes: B batch, S tokens, W width, A action dim, T action horizon, E Euler steps. Time t = 1 is noise, t = 0 is data.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from pi0 import numerics
from pi0.config import ModelConfig
from pi0.masks import block_mask
from pi0.observation import Observation
from pi0.policy.rtc import RTC, Previous
from pi0.recording import record, section
from pi0.run_config import RecipeConfig
from pi0_torch.models.gemma import Cache, Condition, Expert, joint_forward
from pi0_torch.models.layers import Linear, cast
from pi0_torch.models.rtc import clamp, delayed, given_actions, guided_velocity, loss_of_rest
from pi0_torch.models.vision_language import VisionLanguageModel


def embed_time(time: Float[Tensor, " B"], width: int, periods: tuple[float, float], dtype: str) -> Float[Tensor, "B W"]:
    """Sine and cosine of the flow time at `pi0.numerics.time_frequencies` of `periods`, float32."""
    frequencies = torch.from_numpy(numerics.time_frequencies(width, periods)).to(time.device)
    angles = cast(time, "time", dtype)[:, None] * frequencies
    return torch.cat([angles.sin(), angles.cos()], dim=-1)


def interpolate(
    actions: Float[Tensor, "B T A"],
    noise: Float[Tensor, "B T A"],
    time: Float[Tensor, " B"],
    dtype: str,
    delay: Int[Tensor, " B"] | None = None,
) -> tuple[Float[Tensor, "B T A"], Float[Tensor, "B T A"], Bool[Tensor, "B T"] | None]:
    """x_t between actions and noise, and the velocity noise − actions that the model learns, float32.

    With `delay`, x_t has the first actions of each example as they are; the third value says which.
    """
    noise, actions = cast(noise, "action_projections", dtype), cast(actions, "action_projections", dtype)
    t = cast(time, "time", dtype)[:, None, None]
    x_t, given = t * noise + (1 - t) * actions, None
    if delay is not None:
        given = delayed(delay, actions.shape[1])
        x_t = torch.where(given[..., None], actions, x_t)
    return x_t, noise - actions, given


class SuffixSteps(NamedTuple):
    """What embeds actions at the times of Euler steps, for a sampler that computes it once.

    Actions are multiplied by `action_in` [W, A] and `bias` [E, W] of the step is added; `action_mix` projects SiLU of
    that further, and `state` projects the state to a token before them, where the model has these. `condition` [E, W]
    is that of the adaptive norms.
    """

    action_in: Float[Tensor, "W A"]
    bias: Float[Tensor, "E W"]
    condition: Float[Tensor, "E W"] | None = None
    action_mix: Linear | None = None
    state: Linear | None = None


class FlowModel(VisionLanguageModel):
    """A vision-language model and an action expert."""

    def __init__(self, config: ModelConfig):
        assert config.action_expert is not None
        super().__init__(config)
        self.action_expert = Expert(
            config.action_expert,
            adaptive=config.family.adaptive_norms,
            dtype=config.runtime.dtype,
            residual_dtype=numerics.rounding("action_residual", config.runtime.dtype),
            remat=config.runtime.remat,
        )
        width = config.action_expert.width
        self.action_in_proj = self.projection(config.action_dim, width)
        self.add_projections(width)
        self.action_out_proj = self.projection(width, config.action_dim)

    def projection(self, inputs: int, outputs: int) -> Linear:
        """A projection in float32."""
        dtype = numerics.rounding("action_projections", self.config.runtime.dtype)
        return Linear(inputs, outputs, bias=True, dtype=dtype)

    def add_projections(self, width: int) -> None:
        """Add the projections that not all models have."""
        raise NotImplementedError

    def embed_suffix(
        self,
        observation: Observation,
        x_t: Float[Tensor, "B T A"],
        time: Float[Tensor, " B"],
        given: Bool[Tensor, "B T"] | None = None,
    ) -> tuple[Float[Tensor, "B S W"], Condition | None]:
        """Tokens of the action expert, those of the T actions last, and the condition of its norms.

        Actions `given` as they are have the time 0, the others `time`.
        """
        raise NotImplementedError

    def embed_time(self, time: Float[Tensor, " B"], width: int) -> Float[Tensor, "B W"]:
        """`embed_time` with the periods and in the dtype of this model."""
        embedded = embed_time(time, width, self.config.time_periods, self.config.runtime.dtype)
        return record("time", embedded)

    def suffix_steps(self, times: Float[Tensor, " E"]) -> SuffixSteps:
        """`embed_suffix` at some times, but for what depends on the observation."""
        raise NotImplementedError

    def suffix_blocks(self, horizon: int) -> Int[Tensor, " S"]:
        """Blocks of the suffix in `pi0.masks.block_mask`, int [S]: state, if it is a token, and T actions."""
        return torch.tensor([1] * self.config.family.state_tokens + [2] * horizon)

    def read_velocity(self, suffix_out: Float[Tensor, "B S W"], horizon: int) -> Float[Tensor, "B T A"]:
        """The velocity of the last T suffix outputs, float32."""
        section("velocity")
        return record("action_out_proj", self.action_out_proj(suffix_out[:, -horizon:]))

    def compute_loss(
        self,
        observation: Observation,
        actions: Float[Tensor, "B T A"],
        noise: Float[Tensor, "B T A"],
        time: Float[Tensor, " B"],
        stages: dict[str, Tensor] | None = None,
        delay: Int[Tensor, " B"] | None = None,
    ) -> Float[Tensor, "B T"]:
        """Flow-matching loss, mean over A of (v − u)², float32 (π0 paper, section IV).

        With `delay`, the first actions of each example are given as they are, at time 0, and the loss is of the others
        (`rtc.loss_of_rest`), as real-time chunking is trained.
        `stages`, where given, receives every intermediate result that `pi0_eval.parity` compares.
        """
        section("actions and noise")
        x_t, target, given = interpolate(actions, noise, time, self.config.runtime.dtype, delay)
        record("x_t", x_t)
        record("target", target)
        prefix, prefix_valid = self.embed_prefix(observation, stages)
        section("suffix")
        suffix, condition = self.embed_suffix(observation, x_t, time, given)
        split, horizon = prefix.shape[1], x_t.shape[1]
        blocks = F.pad(self.suffix_blocks(horizon), (split, 0)).to(prefix.device)
        valid = torch.cat([prefix_valid, prefix_valid.new_ones(suffix.shape[:2])], dim=1)
        positions = valid.cumsum(dim=1) - 1
        (prefix_out, suffix_out), _ = joint_forward(
            (self.paligemma, self.action_expert),
            (prefix, suffix),
            (positions[:, :split], positions[:, split:]),
            block_mask(blocks, valid),
            (None, condition),
            stages=stages,
        )
        velocity = self.read_velocity(suffix_out, horizon)
        loss = record("loss", loss_of_rest((velocity - target).square().mean(-1), given))
        if stages is not None:
            stages.update(
                prefix_tokens=prefix,
                suffix_tokens=suffix,
                prefix_layers=stages.pop("layers.0"),
                suffix_layers=stages.pop("layers.1"),
                prefix_out=prefix_out,
                suffix_out=suffix_out,
                velocity=velocity,
                loss=loss,
                prefix_valid=prefix_valid,
            )
        return loss

    def loss_parts(
        self,
        observation: Observation,
        actions: Float[Tensor, "B T A"],
        noise: Float[Tensor, "B T A"],
        time: Float[Tensor, " B"],
        recipe: RecipeConfig | None = None,
        delay: Int[Tensor, " B"] | None = None,
    ) -> dict[str, Tensor]:
        """The parts of the training loss, float32: `flow` [B, T]. No recipe has a place here."""
        assert recipe is None, "this model has no recipe"
        return {"flow": self.compute_loss(observation, actions, noise, time, delay=delay)}

    @torch.no_grad()
    def sample(
        self,
        observation: Observation,
        noise: Float[Tensor, "B T A"],
        num_steps: int | None = None,
        rtc: RTC | None = None,
        previous: Previous | None = None,
    ) -> Float[Tensor, "B T A"]:
        """Normalized actions: `sample_actions`."""
        return self.sample_actions(observation, noise, num_steps, rtc, previous)

    @torch.no_grad()
    def sample_actions(
        self,
        observation: Observation,
        noise: Float[Tensor, "B T A"],
        num_steps: int | None = None,
        rtc: RTC | None = None,
        previous: Previous | None = None,
    ) -> Float[Tensor, "B T A"]:
        """Integrate the velocity from `noise` (t = 1) to actions (t = 0) in `num_steps` Euler steps, float32.

        The prefix runs once and its keys and values are kept. `num_steps` defaults to the config's. With
        `rtc` the actions go on from the `previous` chunk.
        """
        prefix, valid = self.embed_prefix(observation)
        blocks = torch.zeros(prefix.shape[1], dtype=torch.int64, device=prefix.device)
        _, cache = self.read_prefix(prefix, valid, block_mask(blocks, valid))
        return self.integrate(observation, noise, num_steps, cache, valid, rtc, previous)

    @torch.no_grad()
    def integrate(
        self,
        observation: Observation,
        noise: Float[Tensor, "B T A"],
        num_steps: int | None,
        cache: Cache,
        seen: Bool[Tensor, "B S"],
        rtc: RTC | None = None,
        previous: Previous | None = None,
    ) -> Float[Tensor, "B T A"]:
        """The Euler steps of `sample_actions`, attending to those S tokens of `cache` that are `seen`."""
        num_steps = self.config.runtime.num_steps if num_steps is None else num_steps
        blocks = self.suffix_blocks(noise.shape[1]).to(noise.device)
        positions = seen.sum(dim=1, keepdim=True) + torch.arange(len(blocks), device=noise.device)
        valid = torch.cat([seen, seen.new_ones((len(noise), len(blocks)))], dim=1)
        mask = block_mask(F.pad(blocks, (seen.shape[1], 0)), valid)[:, -len(blocks) :]
        x_t = cast(noise, "action_projections", self.config.runtime.dtype)
        x_t = clamp(x_t, given_actions(rtc, previous), previous)
        times = numerics.euler_times(num_steps)
        for time, scale in zip(times.tolist(), (rtc or RTC()).scales(times).tolist(), strict=True):
            x_t = self.euler_step(observation, x_t, time, scale, num_steps, cache, positions, mask, rtc, previous)
        return x_t

    def euler_step(
        self,
        observation: Observation,
        x_t: Float[Tensor, "B T A"],
        time: float,
        scale: float,
        num_steps: int,
        cache: Cache,
        positions: Int[Tensor, "B Q"],
        mask: Bool[Tensor, "B Q K"],
        rtc: RTC | None = None,
        previous: Previous | None = None,
        stages: dict[str, Tensor] | None = None,
    ) -> Float[Tensor, "B T A"]:
        """x_t one of `num_steps` steps later than `time`; guidance counts by `scale` (`RTC.scales`).

        The Q tokens of the action expert have `positions`; `mask` says to which of the K tokens, those of `cache` and
        then their own, each attends.
        `stages`, where given, receives `layers.0` [L, B, S, W], what the layers of the action expert give.
        """
        times = torch.full(x_t.shape[:1], time, dtype=torch.float32, device=x_t.device)
        given = given_actions(rtc, previous)

        def velocity(x_t: Tensor) -> Tensor:
            section("suffix")
            suffix, condition = self.embed_suffix(observation, x_t, times, given)
            (out,), _ = joint_forward(
                (self.action_expert,), (suffix,), (positions,), mask, (condition,), cache, stages=stages
            )
            return self.read_velocity(out, x_t.shape[1])

        x_t = x_t + float(np.float32(-1 / num_steps)) * guided_velocity(velocity, x_t, time, scale, rtc, previous)
        return record("Euler step", clamp(x_t, given, previous))
