"""π0: the state is a token of the action expert, and the flow time is mixed into those of the actions.

Axes: B batch, S tokens, W width, A action dim, T action horizon, E Euler steps.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from pi0.observation import Observation
from pi0.recording import record
from pi0_torch.models.flow import FlowModel, SuffixSteps


class Pi0(FlowModel):
    """π0."""

    def add_projections(self, width: int) -> None:
        """Add those of the state, and of actions and time."""
        self.state_proj = self.projection(self.config.state_size, width)
        self.action_time_mlp_in = self.projection(2 * width, width)
        self.action_time_mlp_out = self.projection(width, width)

    def embed_suffix(
        self,
        observation: Observation,
        x_t: Float[Tensor, "B T A"],
        time: Float[Tensor, " B"],
        given: Bool[Tensor, "B T"] | None = None,
    ) -> tuple[Float[Tensor, "B S W"], None]:
        """Tokens of the action expert: the state, T actions. Its norms have no condition."""
        tokens = record("action_in_proj", self.action_in_proj(x_t))
        embedded = self.embed_time(time, tokens.shape[-1])[:, None]
        if given is not None:
            clean = self.embed_time(torch.zeros_like(time[:1]), tokens.shape[-1])[:, None]
            embedded = torch.where(given[..., None], clean, embedded)
        embedded = embedded.expand_as(tokens)
        tokens = record("action_time_mlp_in", self.action_time_mlp_in(torch.cat([tokens, embedded], dim=-1)))
        tokens = record("action_time_mlp_out", self.action_time_mlp_out(F.silu(tokens)))
        state = record("state_proj", self.state_proj(observation.state))
        return torch.cat([state[:, None], tokens], dim=1), None

    def suffix_steps(self, times: Float[Tensor, " E"]) -> SuffixSteps:
        """The time's half of `action_time_mlp_in` is a bias, the actions' half multiplies `action_in_proj`."""
        action_in, mlp_in = self.action_in_proj, self.action_time_mlp_in
        embedded = self.embed_time(times, action_in.weight.shape[0])
        assert action_in.bias is not None
        bias = action_in.bias.to(action_in.dtype).expand_as(embedded)
        first, second = (linear.weight.to(linear.dtype) for linear in (action_in, mlp_in))
        return SuffixSteps(
            action_in=second[:, : len(first)] @ first,
            bias=mlp_in(torch.cat([bias, embedded], dim=-1)),
            action_mix=self.action_time_mlp_out,
            state=self.state_proj,
        )
