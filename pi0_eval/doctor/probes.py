"""Checks that ask the policy: what its actions depend on, how they join, and how long they take.

Axes: N frames, T action horizon, A action dim of the robot. Differences of actions are in standard deviations of the
training data, as the checkpoint's norm stats have them.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from pi0.policy.policy import Policy
from pi0.robots.pipeline import Pipeline
from pi0.robots.robot import Robot, gripper_dims
from pi0_eval.doctor.findings import LIKELY, POSSIBLE, VERY_LIKELY, Finding
from pi0_eval.doctor.numbers import relative_mask
from pi0_eval.doctor.recordings import Recording

IGNORED = 0.02  # of the predictions' own spread: actions that change less do not depend on an input
STEPS, FEW_STEPS = 0.15, 0.4  # of the same: what more Euler steps may change, and what is very likely too much
ROUNDING = 0.1  # of the same: what float32 may change
JUMP = 6.0  # times the change from one action to the next within a chunk
FAR, NEAR = 1.0, 0.4  # standard deviations of the state from which, and up to which, a first action is
LEARNED = 0.7  # of the recorded actions' variance: the squared error from which on little was learned
REPEATS = 5


class Predictor(Protocol):
    """A policy, here or on a server. `num_steps` and `dtype` are None where they cannot be changed."""

    num_steps: int | None
    dtype: str | None
    clock: Callable[[], float]

    def predict(self, frames: Sequence[Mapping[str, Any]], seed: int = 0) -> np.ndarray:
        """Actions [N, T, A] in the robot's units; the noise of frame n depends on the seed and n alone."""

    def with_steps(self, num_steps: int) -> Predictor:
        """The same with another number of Euler steps."""

    def in_float32(self) -> Predictor:
        """The same computed in float32."""


class LocalPredictor(Predictor):
    """A policy of a checkpoint, asked in batches of one size. `reload` makes the same policy in another dtype.

    `num_steps` (default: the policy's) are those of its Euler steps; `clock` tells the seconds that latency is in.
    """

    def __init__(
        self,
        policy: Policy,
        reload: Callable[[str], Policy] | None = None,
        *,
        dtype: str | None = None,
        num_steps: int | None = None,
        clock: Callable[[], float] = time.perf_counter,
        batch_size: int = 8,
    ):
        self.policy, self.dtype, self.clock = policy, dtype, clock
        self._reload, self._batch = reload, batch_size
        self._tokens = policy.config.family.action_tokens
        steps = num_steps or policy.num_steps or policy.config.runtime.num_steps
        self.num_steps: int | None = None if self._tokens else steps

    def predict(self, frames: Sequence[Mapping[str, Any]], seed: int = 0) -> np.ndarray:
        shape, parts = (self.policy.config.action_horizon, self.policy.config.action_dim), []
        size, before = min(self._batch, len(frames)), self.policy.num_steps
        if not self._tokens:
            self.policy.num_steps = self.num_steps
        try:
            for first in range(0, len(frames), size):
                rows = [frames[min(first + i, len(frames) - 1)] for i in range(size)]
                noise = None
                if not self._tokens:
                    draws = [np.random.default_rng([seed, first + i]).normal(size=shape) for i in range(size)]
                    noise = np.stack(draws).astype(np.float32)
                self.policy.reset()
                parts.append(self.policy.infer_batch(rows, noise)["actions"])
        finally:
            self.policy.num_steps = before
        return np.concatenate(parts)[: len(frames)]

    def with_steps(self, num_steps: int) -> LocalPredictor:
        return LocalPredictor(self.policy, num_steps=num_steps, batch_size=self._batch)

    def in_float32(self) -> LocalPredictor:
        assert self._reload is not None
        return LocalPredictor(self._reload("float32"), num_steps=self.num_steps, batch_size=self._batch)


class ServerPredictor(Predictor):
    """A policy server, asked through a client of `pi0_serve`; the noise is given where it takes it."""

    num_steps: int | None = None
    dtype: str | None = None

    def __init__(self, client: Any):
        self.clock: Callable[[], float] = time.perf_counter
        self._client = client
        self._noise = client.metadata.get("noise") if client.metadata.get("protocol") else None

    def predict(self, frames: Sequence[Mapping[str, Any]], seed: int = 0) -> np.ndarray:
        found = []
        for i, frame in enumerate(frames):
            options = {}
            if self._noise is not None:
                noise = np.random.default_rng([seed, i]).normal(size=self._noise)
                options = {"noise": noise.astype(np.float32)}
            self._client.reset()
            found.append(self._client.infer(dict(frame), **options)["actions"])
        return np.stack(found)

    def with_steps(self, num_steps: int) -> Predictor:
        raise NotImplementedError("a server has the number of steps that it was started with")

    def in_float32(self) -> Predictor:
        raise NotImplementedError("a server has the dtype that it was started with")


class Probes:
    """What the checks of one policy share: `frames` that it is asked about, and its predictions [N, T, A] of them."""

    def __init__(self, predictor: Predictor, pipeline: Pipeline, recording: Recording):
        self.predictor, self.pipeline, self.recording = predictor, pipeline, recording
        self.robot: Robot = pipeline.robot
        self.frames = [self._observation(frame) for frame in recording.samples]
        self.actions = predictor.predict(self.frames)
        self.model = self._model(self.actions)
        self.spread = max(float(self.model.std(axis=0).mean()), 1e-6)

    def _observation(self, frame: Mapping[str, Any]) -> dict[str, Any]:
        """A frame without what was recorded of actions, which a server need not get."""
        keys = {*self.robot.state_keys(frame), *self.robot.camera_keys(frame), "prompt", "task"}
        return {key: value for key, value in frame.items() if key in keys}

    def _model(self, actions: np.ndarray) -> np.ndarray:
        """Actions in the model's normalized units, of the robot's dimensions alone."""
        chunks = [self.pipeline.chunk(f, a) for f, a in zip(self.frames, actions, strict=True)]
        return np.stack(chunks)[..., : self.robot.action_dim]

    def change(self, frames: Sequence[Mapping[str, Any]]) -> float:
        """How much other inputs change the actions, with the same noise, in units of the predictions' spread."""
        changed = self.predictor.predict(frames)
        relative = [self.pipeline.chunk(f, a) for f, a in zip(frames, changed, strict=True)]
        return self._distance(np.stack(relative)[..., : self.robot.action_dim])

    def _distance(self, model: np.ndarray) -> float:
        return float(np.sqrt(np.square(model - self.model).mean())) / self.spread

    def dependence(self, prompts: Sequence[str], *, state: bool) -> tuple[list[Finding], dict[str, str], list[str]]:
        """What happens without images, with another frame's state, and with another prompt."""
        count = len(self.frames)
        other = [self.frames[(i + count // 2) % count] for i in range(count)]
        cameras = self.robot.camera_keys(self.frames[0])
        blank = [f | {key: np.zeros_like(f[key]) for key in cameras} for f in self.frames]
        cases: dict[str, list[dict[str, Any]]] = {"images": blank}
        unjudged = []
        if state:
            keys = self.robot.state_keys(self.frames[0])
            cases["state"] = [f | {k: o[k] for k in keys} for f, o in zip(self.frames, other, strict=True)]
        else:
            unjudged.append("whether actions depend on the state: this model is not told it (state_in_prompt)")
        if len(prompts) > 1:
            cases["prompt"] = [self._reworded(f, prompts) for f in self.frames]
        else:
            unjudged.append("whether actions depend on the prompt: there is one only")
        found, facts = [], {}
        names = {"images": "blank images", "state": "another state", "prompt": "another prompt"}
        for what, frames in cases.items():
            change = self.change(frames)
            facts[f"{names[what]}"] = f"change the actions by {change:.0%} of their spread"
            if change < IGNORED:
                level = LIKELY if what == "prompt" else VERY_LIKELY
                text = f"With {names[what]} the actions change by {change:.1%} of their spread over the frames."
                found.append(Finding(f"ignores_{what}", level, text))
        return found, facts, unjudged

    def _reworded(self, frame: dict[str, Any], prompts: Sequence[str]) -> dict[str, Any]:
        own = self.robot.prompt(frame)
        other = next(prompt for prompt in prompts if prompt != own)
        return {key: value for key, value in frame.items() if key not in ("prompt", "task")} | {"prompt": other}

    def steps(self) -> tuple[Finding | None, str]:
        """What four times as many Euler steps change."""
        assert self.predictor.num_steps is not None
        few = self.predictor.num_steps
        change = self._distance(self._model(self.predictor.with_steps(max(4 * few, 20)).predict(self.frames)))
        text = (
            f"With {max(4 * few, 20)} Euler steps instead of {few} the actions change by {change:.0%} of their spread"
        )
        level = VERY_LIKELY if change > FEW_STEPS else LIKELY
        return (Finding("steps", level, text + ".") if change > STEPS else None), f"{change:.1%}"

    def precision(self) -> tuple[Finding | None, str]:
        """What float32 changes."""
        change = self._distance(self._model(self.predictor.in_float32().predict(self.frames)))
        text = f"In float32 instead of {self.predictor.dtype} the actions change by {change:.0%} of their spread."
        return (Finding("precision", VERY_LIKELY, text) if change > ROUNDING else None), f"{change:.1%}"

    def jumps(self) -> tuple[Finding | None, str]:
        """The change of actions from one chunk to the next, beside that within a chunk, both of the same noise."""
        chosen = [n for n in self.recording.later if n < len(self.frames)]
        ahead = self.recording.ahead
        later = self.predictor.predict([self._observation(self.recording.later[n]) for n in chosen], seed=1)
        scale = np.maximum(self.actions.reshape(-1, self.robot.action_dim).std(axis=0), 1e-6)
        joint = (later[:, 0] - self.actions[chosen][:, ahead - 1]) / scale
        inside = np.diff(self.actions[chosen], axis=1) / scale
        ratio = float(np.sqrt(np.square(joint).mean() / max(np.square(inside).mean(), 1e-12)))
        text = (
            f"From action {ahead} of a chunk to the first of the next, actions change {ratio:.1f} times as much as "
            "from one action to the next within a chunk."
        )
        return (
            Finding("jumps", LIKELY, text) if ratio > JUMP else None
        ), f"{ratio:.1f} times the change within a chunk"

    def first_actions(self) -> Finding | None:
        """Predicted first actions far from the state where recorded ones are near it."""
        mask = np.array(relative_mask(self.robot), bool)
        if not mask.any() or len(mask) > self.robot.state_dim or self.recording.actions is None:
            return None
        dims = np.flatnonzero(mask)
        scale = np.maximum(self.recording.state.std(axis=0)[dims], 1e-9)
        recorded = np.abs(self.recording.actions[:, 0][:, dims] - self.recording.state[:, dims]).mean(axis=0) / scale
        state, actions = [], []
        for frame, chunk in zip(self.frames, self.actions, strict=True):
            numbers = self.robot.chunk(frame, chunk)
            state.append(numbers["state"])
            actions.append(numbers["actions"][0])
        predicted = np.abs(np.stack(actions)[:, dims] - np.stack(state)[:, dims]).mean(axis=0) / scale
        # Were it the other kind of action, it would be near; that of a policy that learned nothing is not.
        shift = np.stack(state)[:, dims] * (-1 if self.robot.delta else 1)
        other = np.abs(np.stack(actions)[:, dims] + shift - np.stack(state)[:, dims]).mean(axis=0) / scale
        if np.median(recorded) > NEAR or np.median(predicted) < FAR or np.median(other) > np.median(predicted) / 3:
            return None
        text = (
            f"The first action of a chunk is {np.median(predicted):.1f} standard deviations away from the state; where "
            f"recorded, {np.median(recorded):.2f}."
        )
        return Finding("delta", VERY_LIKELY, text)

    def signs(self) -> Finding | None:
        """Predicted gripper actions that go the other way than the recorded ones."""
        if self.recording.actions is None:
            return None
        dims = gripper_dims(self.recording.action_names, self.robot, self.robot.action_dim)
        pairs = [
            (frame["actions"] if "actions" in frame else self._recorded(frame), chunk)
            for frame, chunk in zip(self.recording.samples, self.actions, strict=True)
        ]
        for dim in dims:
            recorded = np.concatenate([np.asarray(r)[:, dim] for r, _ in pairs])
            predicted = np.concatenate([np.asarray(p)[: len(r), dim] for r, p in pairs])
            if min(recorded.std(), predicted.std()) < 1e-6:
                continue
            correlation = float(np.corrcoef(recorded, predicted)[0, 1])
            if correlation < -0.4:
                name = f"action {self.recording.action_names[dim]}" if self.recording.action_names else f"action[{dim}]"
                text = f"{name}: predicted and recorded actions have opposite signs (correlation {correlation:.2f})."
                return Finding("gripper", VERY_LIKELY, text)
        return None

    def _recorded(self, frame: Mapping[str, Any]) -> np.ndarray:
        keys = self.robot.action_keys(frame)
        numbers = self.robot.numbers({k: frame[k] for k in (*self.robot.state_keys(frame), *keys)})
        return self.robot.from_model(numbers)["action"]

    def fit(self) -> tuple[Finding | None, str]:
        """The squared error of the actions beside recorded ones, in units of the recorded ones' variance."""
        recorded = self._model(np.stack([self._recorded(frame) for frame in self.recording.samples]))
        length = recorded.shape[1]
        error = float(np.square(self.model[:, :length] - recorded).mean() / max(recorded.var(axis=(0, 1)).mean(), 1e-6))
        text = f"{error:.2f} of the recorded actions' variance"
        found = f"The squared error of predicted actions is {text}; always predicting the mean action has 1."
        return (Finding("untrained", LIKELY, found) if error > LEARNED else None), text

    def latency(self, fps: float | None, replan: int) -> tuple[Finding | None, str]:
        """The shortest of a few times that a chunk takes, beside the control period and the chunk."""
        self.predictor.predict(self.frames[:1])
        times = []
        for _ in range(REPEATS):
            start = self.predictor.clock()
            self.predictor.predict(self.frames[:1])
            times.append(self.predictor.clock() - start)
        best = min(times)
        if fps is None:
            return None, f"{1e3 * best:.0f} ms a chunk here"
        period = 1 / fps
        fact = f"{1e3 * best:.0f} ms a chunk here, {1e3 * period:.0f} ms a control period"
        if best < period:
            return None, fact
        late = best > replan * period
        then = (
            "longer than the chunk lasts" if late else "a pause after each chunk, unless the next is requested before"
        )
        text = (
            f"A chunk takes {1e3 * best:.0f} ms on this machine, the control period is {1e3 * period:.0f} ms: {then}."
        )
        return Finding("latency", VERY_LIKELY if late else POSSIBLE, text), fact


def prompt_findings(
    pipeline: Pipeline, counts: tuple[int, int], seen: Recording, known: Recording | None
) -> list[Finding]:
    """Prompts that were cut, `counts` of them and of all, and those that are not among training's."""
    found = []
    cut, encoded = counts
    if cut:
        text = f"{cut} of {encoded} prompts have more tokens than the model reads, and are cut."
        found.append(Finding("prompt_cut", VERY_LIKELY, text))
    if known is not None:
        trained = {_plain(prompt) for prompt in known.prompts}
        new = [prompt for prompt in seen.prompts if _plain(prompt) not in trained]
        if new and trained - {""}:
            examples = ", ".join(repr(p)[:80] for p in known.prompts[:3])
            text = f"{new[0]!r:.80} is not among the {len(known.prompts)} prompts of training, such as {examples}."
            exact = len(new) == len(seen.prompts)
            found.append(Finding("prompt_unseen", VERY_LIKELY if exact else LIKELY, text))
    return found


def _plain(prompt: str) -> str:
    """A prompt as the tokenizer has it, without what hardly changes its tokens."""
    return " ".join(prompt.strip().replace("_", " ").split())


def model_images(rows: Sequence[Mapping[str, Any]]) -> dict[str, np.ndarray]:
    """The images uint8 [N, H, W, 3] of the model's inputs, by camera, where every one of them has it."""
    keys = [key for key in rows[0] if key.startswith("image/")]
    shown = {}
    for key in keys:
        camera = key.removeprefix("image/")
        if all(key in row and bool(row.get(f"image_mask/{camera}", True)) for row in rows):
            shown[camera] = np.stack([row[key] for row in rows])
    return shown
