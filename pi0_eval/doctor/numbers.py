"""Checks of norm stats, states and recorded actions: no image, and no model.

Axes: F frames, T action horizon, S state dim, A action dim, all of the robot; numbers are in the model's units.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from pi0.assets import Assets
from pi0.robots.normalize import NormStats
from pi0.robots.robot import Robot, gripper_dims
from pi0.robots.transforms import bool_mask
from pi0_eval.doctor.findings import LIKELY, POSSIBLE, VERY_LIKELY, Finding
from pi0_eval.doctor.recordings import Recording

OUTSIDE = 0.2  # share of values that may lie outside of what the norm stats say
ROOM = 0.5  # of the range from q01 to q99: what lies further outside of it counts
WIDER = 3.0  # times the range
NARROW = 1 / 20  # of the range: so little of it is used in units that are larger
CONSTANT = 1 / 50  # of the data's range: the range of norm stats that are nearly constant
UNITS = {180 / np.pi: "degrees and radians", 1000.0: "millimetres and metres", 100.0: "centimetres and metres"}
SPEED = 1.7  # times as fast
PADDED, VERY_PADDED = 0.25, 0.5  # share of trained actions
IDLE = 0.5  # share of frames
TINY = 1e-9


def labels(key: str, names: Sequence[str], size: int) -> list[str]:
    """What dimensions are called in a report: "state x", or "state[0]"."""
    return [f"{key} {name}" for name in names] if len(names) == size else [f"{key}[{i}]" for i in range(size)]


def model_actions(recording: Recording, robot: Robot, relative: bool) -> np.ndarray:
    """The recorded chunks [F, T, A], relative to the state in the dimensions that a robot has so, or absolute."""
    assert recording.actions is not None
    if not relative:
        return recording.actions
    mask = relative_mask(robot)
    actions = recording.actions.copy()
    actions[..., : len(mask)] -= np.where(mask, recording.state[:, None, : len(mask)], 0)
    return actions


def relative_mask(robot: Robot) -> tuple[bool, ...]:
    """The dimensions that may be relative to the state: what the robot says, else all but the gripper."""
    if robot.delta_dims:
        return bool_mask(*robot.delta_dims)
    size = min(robot.state_dim, robot.action_dim)
    return tuple(i not in gripper_dims((), robot, robot.action_dim) for i in range(size))


class Misfit:
    """How data x [..., D] lie beside norm stats.

    `outside` [D] is the share of values far outside of their range, `ratio` [D] the data's range in units of theirs.
    """

    def __init__(self, stats: NormStats, x: np.ndarray):
        x = x.reshape(-1, x.shape[-1])
        low, high = (b[: x.shape[1]] for b in stats.bounds())
        self.width, self.std = high - low, stats.std[: x.shape[1]]
        self.low, self.high = low, high
        self.data_low, self.data_high = np.quantile(x, 0.01, axis=0), np.quantile(x, 0.99, axis=0)
        room = ROOM * np.maximum(self.width, 1e-6)
        self.outside = ((x < low - room) | (x > high + room)).mean(axis=0)
        self.ratio = (self.data_high - self.data_low) / np.maximum(self.width, TINY)
        self.largest = np.abs(x).max(axis=0) / np.maximum(np.maximum(np.abs(low), np.abs(high)), TINY)
        self.bad = (self.outside > OUTSIDE) | (self.ratio > WIDER)
        self.constant = (self.ratio > 1 / CONSTANT) & self.bad
        self.narrow = (self.ratio < NARROW) & (self.width > 1e-4)

    def units(self, dims: np.ndarray) -> str:
        """The factor between the data's units and theirs, where the moving dims [N] agree on one; else empty."""
        moving = (self.width > 1e-4) & (self.data_high - self.data_low > 1e-9)
        moving &= np.isin(np.arange(len(moving)), dims)
        if not moving.any():
            return ""
        sizes = [np.maximum(np.abs(a), np.abs(b)) for a, b in ((self.data_low, self.data_high), (self.low, self.high))]
        factors = np.log(sizes[0][moving] / np.maximum(sizes[1][moving], TINY))
        factor, spread = float(np.exp(np.median(factors))), float(np.ptp(factors))
        if spread > np.log(4) or 1 / 5 < factor < 5:
            return ""
        near = [text for unit, text in UNITS.items() if abs(np.log(max(factor, 1 / factor) / unit)) < np.log(1.6)]
        return f" All are about {factor:.3g} times: other units{f', such as {near[0]}' if near else ''}?"

    def rows(self, names: Sequence[str], dims: np.ndarray) -> list[tuple[str, float, float, float, float]]:
        """The ranges of dimensions `dims` [N], for the report."""
        columns = (self.low, self.high, self.data_low, self.data_high)
        return [(names[i], *(float(column[i]) for column in columns)) for i in dims]

    def text(self, names: Sequence[str], dims: np.ndarray) -> str:
        """The first of the dimensions `dims` [N] in words."""
        parts = [
            f"{names[i]} is {self.data_low[i]:.3g} to {self.data_high[i]:.3g}, the norm stats say {self.low[i]:.3g} to "
            f"{self.high[i]:.3g}"
            for i in dims[:3]
        ]
        more = f", and {len(dims) - 3} more" if len(dims) > 3 else ""
        return "; ".join(parts) + more + "."


def check_numbers(assets: Assets, robot: Robot, seen: Recording, known: Recording | None) -> list[Finding]:
    """Norm stats, state, gripper, relative actions, rate, horizon and padding."""
    stats = assets.norm_stats
    assert stats is not None
    trained = known or seen
    mixed = check_delta(stats["actions"], robot, trained)
    findings = [mixed] if mixed else []
    findings += check_stats(stats, robot, seen, known, actions=mixed is None)
    findings += check_rate(assets, seen, known)
    if trained.actions is not None:
        findings += check_padding(trained, assets.model.action_horizon)
    return findings


def check_delta(stats: NormStats, robot: Robot, recording: Recording) -> Finding | None:
    """Norm stats of actions that fit relative ones where the robot has them absolute, or the other way round."""
    mask = np.array(relative_mask(robot), bool)
    if recording.actions is None or not mask.any() or len(mask) > robot.state_dim:
        return None
    scores = {}
    for relative in (False, True):
        x = model_actions(recording, robot, relative).reshape(-1, robot.action_dim)[:, : len(mask)][:, mask]
        mean, std = stats.mean[: len(mask)][mask], stats.std[: len(mask)][mask]
        apart = np.abs(x.mean(axis=0) - mean) / np.maximum(std, TINY)
        apart += np.abs(np.log(np.maximum(x.std(axis=0), TINY) / np.maximum(std, TINY)))
        scores[relative] = float(np.median(apart))
    own, other = scores[robot.delta], scores[not robot.delta]
    if own < 1.0 or other > 0.5 * own or other > 1.0:
        return None
    has, fits = ("relative", "absolute") if robot.delta else ("absolute", "relative")
    text = (
        f"The checkpoint's robot has {has} actions, but its norm stats are those of {fits} ones: {other:.2f} standard "
        f"deviations from this data's, against {own:.2f}."
    )
    return Finding("delta", VERY_LIKELY, text)


def check_stats(
    stats: Mapping[str, NormStats], robot: Robot, seen: Recording, known: Recording | None, *, actions: bool
) -> list[Finding]:
    """Norm stats against the training data, and the state that is seen against both."""
    found = []
    trained = known or seen
    data = {"state": trained.state}
    if actions and trained.actions is not None:
        data["actions"] = model_actions(trained, robot, robot.delta)
    names = {
        "state": labels("state", seen.state_names, robot.state_dim),
        "actions": labels("action", seen.action_names, robot.action_dim),
    }
    grippers = {
        "state": gripper_dims(seen.state_names, robot, robot.state_dim),
        "actions": gripper_dims(seen.action_names, robot, robot.action_dim),
    }
    fits = {key: Misfit(stats[key], x) for key, x in data.items()}
    wrong = {key: np.flatnonzero(_wrong(fit)) for key, fit in fits.items()}
    for key, dims in wrong.items():
        if not len(dims):
            continue
        fit, gripper = fits[key], set(dims) <= set(grippers[key])
        rows, text = fit.rows(names[key], dims), fit.text(names[key], dims) + fit.units(dims)
        if fit.constant[dims].any():
            text = "Nearly constant in the norm stats, so that normalization makes a small change huge: " + text
        elif gripper and len(names[key]) > 1:
            found.append(Finding("gripper", VERY_LIKELY, text, ranges=rows))
            continue
        # Of recordings of the robot alone, a state that does not fit may be the robot's own fault.
        alone = known is None and key == "state" and not fit.constant[dims].any() and not fit.units(dims)
        alone = alone and not len(wrong.get("actions", ()))
        found.append(Finding("state" if alone else "stats", LIKELY if alone else VERY_LIKELY, text, ranges=rows))
    if known is not None and not len(wrong["state"]):
        fit = Misfit(NormStats.from_data(known.state), seen.state)
        dims = np.flatnonzero(fit.bad & Misfit(stats["state"], seen.state).bad)
        if len(dims):
            cause = "gripper" if set(dims) <= set(grippers["state"]) and robot.state_dim > 1 else "state"
            text = fit.text(names["state"], dims).replace("the norm stats say", "in training it was") + fit.units(dims)
            found.append(Finding(cause, VERY_LIKELY, text, ranges=fit.rows(names["state"], dims)))
    return found


def _wrong(fit: Misfit) -> np.ndarray:
    """The dimensions [D] that do not fit; narrow ones only where all are, since a recording may move little."""
    moving = fit.width > 1e-4
    return fit.bad | (fit.narrow if moving.any() and fit.narrow[moving].all() else False)


def check_rate(assets: Assets, seen: Recording, known: Recording | None) -> list[Finding]:
    """Frames per second, speed of motion, and horizon, against those of training."""
    found = []
    trained = ((assets.training or {}).get("model") or {}).get("action_horizon")
    if trained is not None and trained != assets.model.action_horizon:
        text = f"The horizon is {assets.model.action_horizon} actions, in training it was {trained}."
        found.append(Finding("horizon", VERY_LIKELY, text))
    if known is None or known.fps is None or seen.fps is None:
        return found
    if abs(seen.fps / known.fps - 1) > 0.1:
        text = f"{seen.fps:g} frames per second, in training {known.fps:g}: every action is held "
        text += f"{known.fps / seen.fps:.2g} times as long as it was recorded for."
        return [*found, Finding("rate", VERY_LIKELY, text)]
    moving = (known.speed > 1e-9) & (seen.speed > 1e-9)
    if moving.any() and seen.actions is not None:
        factor = float(np.exp(np.median(np.log(seen.speed[moving] / known.speed[moving]))))
        if not 1 / SPEED < factor < SPEED:
            text = f"The state changes {factor:.2g} times as much from a frame to the next as in training, at the same "
            found.append(Finding("rate", LIKELY, text + f"{seen.fps:g} frames per second by their files."))
    return found


def check_padding(recording: Recording, horizon: int) -> list[Finding]:
    """Actions past the end of an episode, which repeat the last one, and frames in which nothing moves."""
    found = []
    lengths = np.diff(recording.starts)
    padded = float(sum(_padded(int(n), horizon) for n in lengths) / recording.frames / horizon)
    if padded > PADDED:
        text = (
            f"{padded:.0%} of the trained actions repeat an episode's last one: the horizon is {horizon}, episodes "
            f"have {int(np.median(lengths))} frames."
        )
        found.append(Finding("padding", VERY_LIKELY if padded > VERY_PADDED else LIKELY, text))
    assert recording.actions is not None
    if not found and recording.actions.shape[1] > 1:
        spread = np.maximum(np.ptp(recording.actions[:, 0], axis=0), TINY)
        still = (np.abs(np.diff(recording.actions, axis=1)).max(axis=1) / spread).max(axis=1) < 1e-3
        if (idle := float(still.mean())) > IDLE:
            text = f"In {idle:.0%} of the frames no action of the chunk changes."
            found.append(Finding("padding", POSSIBLE, text))
    return found


def _padded(length: int, horizon: int) -> float:
    """The trained actions past the end of an episode, over all of its chunks."""
    past = np.maximum(np.arange(length) + horizon - length, 0)
    return float(past.sum())
