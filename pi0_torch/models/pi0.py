"""π0 and π0.5: a vision-language model and an action expert, trained by flow matching.

Axes: B batch, C cameras, S tokens, W width, A action dim, T action horizon. Time t = 1 is noise, t = 0 is data.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from pi0 import numerics
from pi0.config import ModelConfig
from pi0.observation import Observation
from pi0_torch.models.gemma import Cache, Expert, joint_forward
from pi0_torch.models.layers import Linear
from pi0_torch.models.vision_language import VisionLanguageModel, attention_mask


def embed_time(time: Float[Tensor, " B"], width: int) -> Float[Tensor, "B W"]:
    """Sine and cosine of the flow time at `pi0.numerics.time_frequencies`, float32."""
    angles = time.float()[:, None] * torch.from_numpy(numerics.time_frequencies(width)).to(time.device)
    return torch.cat([angles.sin(), angles.cos()], dim=-1)


def suffix_blocks(kind: str, horizon: int) -> np.ndarray:
    """Mask blocks of the suffix, int [S]; the prefix is block 0. Actions see each other, not the reverse."""
    return np.array([1] * horizon if kind == "pi05" else [1] + [2] * horizon)


class Pi0(VisionLanguageModel):
    """π0, or π0.5 where `config.kind` says so."""

    def __init__(self, config: ModelConfig):
        assert config.action_expert is not None
        super().__init__(config, queries="queries")
        dtype, width, pi05 = config.runtime.dtype, config.action_expert.width, config.kind == "pi05"
        self.action_expert = Expert(config.action_expert, adaptive=pi05, dtype=dtype, remat=config.runtime.remat)

        def projection(inputs: int, outputs: int) -> Linear:
            float32 = numerics.rounding("action_projections", dtype)
            return Linear(inputs, outputs, bias=True, dtype=float32)

        self.action_in_proj = projection(config.action_dim, width)
        if pi05:
            self.time_mlp_in = projection(width, width)
            self.time_mlp_out = projection(width, width)
        else:
            self.state_proj = projection(config.action_dim, width)
            self.action_time_mlp_in = projection(2 * width, width)
            self.action_time_mlp_out = projection(width, width)
        self.action_out_proj = projection(width, config.action_dim)

    def embed_suffix(
        self, observation: Observation, x_t: Float[Tensor, "B T A"], time: Float[Tensor, " B"]
    ) -> tuple[Float[Tensor, "B S W"], Float[Tensor, "B W"] | None]:
        """Tokens of the action expert, and its norms' condition: π0 [state, T actions], π0.5 [T actions]."""
        tokens = self.action_in_proj(x_t)
        embedded = embed_time(time, tokens.shape[-1])
        if self.config.kind == "pi05":
            return tokens, F.silu(self.time_mlp_out(F.silu(self.time_mlp_in(embedded))))
        embedded = embedded[:, None].expand_as(tokens)
        tokens = self.action_time_mlp_in(torch.cat([tokens, embedded], dim=-1))
        tokens = self.action_time_mlp_out(F.silu(tokens))
        return torch.cat([self.state_proj(observation.state)[:, None], tokens], dim=1), None

    def read_velocity(self, suffix_out: Float[Tensor, "B S W"], horizon: int) -> Float[Tensor, "B T A"]:
        """The velocity of the last T suffix outputs, float32."""
        return self.action_out_proj(suffix_out[:, -horizon:])

    def compute_loss(
        self,
        observation: Observation,
        actions: Float[Tensor, "B T A"],
        noise: Float[Tensor, "B T A"],
        time: Float[Tensor, " B"],
        stages: dict[str, Tensor] | None = None,
    ) -> Float[Tensor, "B T"]:
        """Flow-matching loss, mean over A of (v − u)², float32 (π0 paper, section IV).

        `stages`, where given, receives every intermediate result that `pi0_eval.parity` compares.
        """
        noise, actions = noise.float(), actions.float()
        t = time.float()[:, None, None]
        x_t, target = t * noise + (1 - t) * actions, noise - actions
        prefix, prefix_valid = self.embed_prefix(observation, stages)
        suffix, condition = self.embed_suffix(observation, x_t, time)
        blocks = np.concatenate([np.zeros(prefix.shape[1], int), suffix_blocks(self.config.kind, x_t.shape[1])])
        valid = torch.cat([prefix_valid, prefix_valid.new_ones(suffix.shape[:2])], dim=1)
        positions = valid.cumsum(dim=1) - 1
        split = prefix.shape[1]
        (prefix_out, suffix_out), _ = joint_forward(
            (self.paligemma, self.action_expert),
            (prefix, suffix),
            (positions[:, :split], positions[:, split:]),
            attention_mask(blocks, blocks, valid, valid),
            (None, condition),
            stages=stages,
        )
        velocity = self.read_velocity(suffix_out, x_t.shape[1])
        loss = (velocity - target).square().mean(-1)
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

    @torch.no_grad()
    def sample_actions(
        self, observation: Observation, noise: Float[Tensor, "B T A"], num_steps: int | None = None
    ) -> Float[Tensor, "B T A"]:
        """Integrate the velocity from `noise` (t = 1) to actions (t = 0) in `num_steps` Euler steps, float32.

        The prefix runs once and its keys and values are kept. `num_steps` defaults to the config's.
        """
        prefix, valid = self.embed_prefix(observation)
        positions = valid.cumsum(dim=1) - 1
        blocks = np.zeros(prefix.shape[1], int)
        mask = attention_mask(blocks, blocks, valid, valid)
        _, cache = joint_forward((self.paligemma,), (prefix,), (positions,), mask, (None,))
        return self.integrate(observation, noise, num_steps, cache, valid)

    @torch.no_grad()
    def integrate(
        self,
        observation: Observation,
        noise: Float[Tensor, "B T A"],
        num_steps: int | None,
        cache: Cache,
        seen: Bool[Tensor, "B S"],
    ) -> Float[Tensor, "B T A"]:
        """The Euler steps of `sample_actions`, which see those S tokens of `cache` that are `seen`."""
        num_steps = self.config.runtime.num_steps if num_steps is None else num_steps
        horizon = noise.shape[1]
        blocks = suffix_blocks(self.config.kind, horizon)
        suffix_valid = seen.new_ones((noise.shape[0], len(blocks)))
        positions = seen.sum(dim=1, keepdim=True) + torch.arange(len(blocks), device=noise.device)
        mask = attention_mask(
            blocks,
            np.concatenate([np.zeros(seen.shape[1], int), blocks]),
            suffix_valid,
            torch.cat([seen, suffix_valid], dim=1),
        )

        def step(x_t: Tensor, time: float) -> Tensor:
            times = torch.full(noise.shape[:1], time, dtype=torch.float32, device=noise.device)
            suffix, condition = self.embed_suffix(observation, x_t, times)
            (out,), _ = joint_forward((self.action_expert,), (suffix,), (positions,), mask, (condition,), cache)
            return x_t + float(np.float32(-1 / num_steps)) * self.read_velocity(out, horizon)

        x_t = noise.float()
        for time in numerics.euler_times(num_steps):
            x_t = step(x_t, float(time))
        return x_t
