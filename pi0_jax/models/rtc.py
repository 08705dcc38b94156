"""Real-time chunking: guidance of an Euler step, and the actions that are given to a model trained for it.

Axes: B batch, T action horizon, A action dim. Time t = 1 is noise, t = 0 is data.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from pi0.policy.rtc import RTC, Previous


def guided_velocity(
    velocity: Callable[[Float[Array, "B T A"]], Float[Array, "B T A"]],
    x_t: Float[Array, "B T A"],
    time: Float[Array, ""],
    scale: Float[Array, ""],
    rtc: RTC | None,
    previous: Previous | None,
) -> Float[Array, "B T A"]:
    """The velocity at x_t; with guidance, towards the previous chunk.

    The paper (arXiv 2506.07339, equations 2 and 3) has time τ from noise (0) to data (1), where dx/dτ = v. It estimates
    the actions as Â = x + (1−τ)·v, and adds to v, scaled, the gradient of the weighted error's square:
    g = (∂Â/∂x)ᵀ [W ⊙ (A_prev − Â)]. Here t = 1 − τ, so u = dx/dt = −v: Â = x − t·u, g is the same, and
    −(v + scale·g) = u − scale·g. `RTC.scales` has the scales.
    """

    if rtc is None or rtc.method != "guided":
        return velocity(x_t)
    assert previous is not None, "real-time chunking needs the previous chunk"
    wanted, weights = previous

    def estimate(x: Float[Array, "B T A"]) -> tuple[Float[Array, "B T A"], Float[Array, "B T A"]]:
        u = velocity(x)
        return x - time * u, u

    if rtc.jacobian == "identity":
        estimated, u = estimate(x_t)
        return u - scale * (weights * (wanted - estimated))
    estimated, gradient, u = jax.vjp(estimate, x_t, has_aux=True)
    (guidance,) = gradient(weights * (wanted - estimated))
    return u - scale * guidance


def given_actions(rtc: RTC | None, previous: Previous | None) -> Bool[Array, "B T"] | None:
    """The actions that a model trained for it is given as they are; None where it is given none."""
    if rtc is None or rtc.method != "trained":
        return None
    assert previous is not None, "real-time chunking needs the previous chunk"
    return previous.weights[..., 0] > 0


def clamp(
    x_t: Float[Array, "B T A"], given: Bool[Array, "B T"] | None, previous: Previous | None
) -> Float[Array, "B T A"]:
    """x_t with the given actions in their places."""
    return x_t if given is None or previous is None else jnp.where(given[..., None], previous.actions, x_t)


def delayed(delay: Int[Array, " B"], horizon: int) -> Bool[Array, "B T"]:
    """The first `delay` actions of each example: those that are given in training."""
    return jnp.arange(horizon) < delay[:, None]


def loss_of_rest(loss: Float[Array, "B T"], given: Bool[Array, "B T"] | None) -> Float[Array, "B T"]:
    """The loss without actions that are given, scaled so that the mean over T is that over the others.

    Every example weighs the same, whatever its delay; in the paper (arXiv 2512.05964) every action does.
    """
    if given is None:
        return loss
    rest = ~given
    return jnp.where(rest, loss, 0) * (loss.shape[1] / rest.sum(axis=1, keepdims=True))
