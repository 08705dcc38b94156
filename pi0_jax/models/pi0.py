"""π0: the state is a token of the action expert, and the flow time is mixed into those of the actions.

Axes: B batch, S tokens, W width, A action dim, T action horizon, E Euler steps.
"""

from __future__ import annotations

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float

from pi0.observation import Observation
from pi0.recording import record
from pi0_jax.models.flow import FlowModel, SuffixSteps


class Pi0(FlowModel):
    """π0."""

    def add_projections(self, width: int, rngs: nnx.Rngs) -> None:
        """Add those of the state, and of actions and time."""
        self.state_proj = self.projection(self.config.state_size, width, rngs)
        self.action_time_mlp_in = self.projection(2 * width, width, rngs)
        self.action_time_mlp_out = self.projection(width, width, rngs)

    def embed_suffix(
        self,
        observation: Observation,
        x_t: Float[Array, "B T A"],
        time: Float[Array, " B"],
        given: Bool[Array, "B T"] | None = None,
    ) -> tuple[Float[Array, "B S W"], None]:
        """Tokens of the action expert: the state, T actions. Its norms have no condition."""
        tokens = record("action_in_proj", self.action_in_proj(x_t))
        embedded = self.embed_time(time, tokens.shape[-1])[:, None]
        if given is not None:
            embedded = jnp.where(given[..., None], self.embed_time(jnp.zeros(1), tokens.shape[-1])[:, None], embedded)
        embedded = jnp.broadcast_to(embedded, tokens.shape)
        tokens = record("action_time_mlp_in", self.action_time_mlp_in(jnp.concatenate([tokens, embedded], axis=-1)))
        tokens = record("action_time_mlp_out", self.action_time_mlp_out(nnx.silu(tokens)))
        state = record("state_proj", self.state_proj(observation.state))
        return jnp.concatenate([state[:, None], tokens], axis=1), None

    def suffix_steps(self, times: Float[Array, " E"]) -> SuffixSteps:
        """The time's half of `action_time_mlp_in` is a bias, the actions' half multiplies `action_in_proj`."""
        action_in, mlp_in = self.action_in_proj, self.action_time_mlp_in
        width = action_in.kernel.shape[-1]
        embedded = self.embed_time(times, width)
        assert action_in.bias is not None
        bias = jnp.broadcast_to(action_in.bias[...].astype(action_in.dtype), embedded.shape)
        kernels = (linear.kernel[...].astype(linear.dtype) for linear in (action_in, mlp_in))
        first, second = kernels
        return SuffixSteps(
            action_in=jnp.matmul(first, second[:width]),
            bias=mlp_in(jnp.concatenate([bias, embedded], axis=-1)),
            action_mix=self.action_time_mlp_out,
            state=self.state_proj,
        )
