"""Real-time chunking: guidance of an Euler step, and the actions that are given to a model trained for it.

Axes: B batch, T action horizon, A action dim. Time t = 1 is noise, t = 0 is data.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from pi0.policy.rtc import RTC, Previous


def guided_velocity(
    velocity: Callable[[Float[Tensor, "B T A"]], Float[Tensor, "B T A"]],
    x_t: Float[Tensor, "B T A"],
    time: float,
    scale: float,
    rtc: RTC | None,
    previous: Previous | None,
) -> Float[Tensor, "B T A"]:
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

    def estimate(x: Float[Tensor, "B T A"]) -> tuple[Float[Tensor, "B T A"], Float[Tensor, "B T A"]]:
        u = velocity(x)
        return x - time * u, u

    if rtc.jacobian == "identity":
        estimated, u = estimate(x_t)
        return u - scale * (weights * (wanted - estimated))
    estimated, gradient, u = torch.func.vjp(estimate, x_t, has_aux=True)  # type: ignore[misc]  # with aux 3
    (guidance,) = gradient(weights * (wanted - estimated))
    return u - scale * guidance


def given_actions(rtc: RTC | None, previous: Previous | None) -> Bool[Tensor, "B T"] | None:
    """The actions that a model trained for it is given as they are; None where it is given none."""
    if rtc is None or rtc.method != "trained":
        return None
    assert previous is not None, "real-time chunking needs the previous chunk"
    return previous.weights[..., 0] > 0


def clamp(
    x_t: Float[Tensor, "B T A"], given: Bool[Tensor, "B T"] | None, previous: Previous | None
) -> Float[Tensor, "B T A"]:
    """x_t with the given actions in their places."""
    return x_t if given is None or previous is None else torch.where(given[..., None], previous.actions, x_t)


def delayed(delay: Int[Tensor, " B"], horizon: int) -> Bool[Tensor, "B T"]:
    """The first `delay` actions of each example: those that are given in training."""
    return torch.arange(horizon, device=delay.device) < delay[:, None]


def loss_of_rest(loss: Float[Tensor, "B T"], given: Bool[Tensor, "B T"] | None) -> Float[Tensor, "B T"]:
    """The loss without actions that are given, scaled so that the mean over T is that over the others.

    Every example weighs the same, whatever its delay; in the paper (arXiv 2512.05964) every action does.
    """
    if given is None:
        return loss
    rest = given.logical_not()
    return torch.where(rest, loss, 0) * (loss.shape[1] / rest.sum(dim=1, keepdim=True))
