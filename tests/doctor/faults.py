"""Working set-ups of a robot, and the faults that `pi0-doctor` is to find in them.

A `SetUp` is a policy, its training data and what its robot records; a fault returns another one that is broken.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

import pi0_torch
from pi0.assets import Assets
from pi0.datasets.registry import open_dataset
from pi0.policy.policy import Policy
from pi0.robots.normalize import NormStats
from pi0.robots.robot import Robot
from pi0_eval.doctor.diagnosis import diagnose
from pi0_eval.doctor.findings import Diagnosis
from pi0_eval.doctor.probes import LocalPredictor
from pi0_eval.doctor.recordings import Recording, of_dataset

FOLDER = Path(__file__).parent
HELD_OUT = (3, 7, 11, 15)
TRAINED = tuple(i for i in range(16) if i not in HELD_OUT)
FORMATS = {"velocities": "lerobot", "positions": "tests.doctor.positions:Positions"}


@dataclasses.dataclass(frozen=True)
class SetUp:
    """What `diagnose` is given. `reload` is the policy in another dtype, None where it is not asked.

    `clock` tells latency: the seconds of the processor, so that other work of the machine counts less.
    """

    policy: Policy
    seen: Recording
    known: Recording | None
    reload: Callable[[str], Policy] | None = None
    replan: int | None = None
    clock: Callable[[], float] = time.process_time

    @property
    def robot(self) -> Robot:
        return self.policy.pipeline.robot

    def diagnose(self) -> Diagnosis:
        """What the doctor finds."""
        dtype = None if self.reload is None else "bfloat16"
        predictor = LocalPredictor(self.policy, self.reload, dtype=dtype, clock=self.clock)
        assets, pipeline = self.policy.assets, self.policy.pipeline
        return diagnose(assets, pipeline, self.seen, self.known, predictor, replan=self.replan)

    def with_assets(self, **changes: Any) -> SetUp:
        """With other assets of the checkpoint."""
        assets = dataclasses.replace(self.policy.assets, **changes)
        return dataclasses.replace(self, policy=_policy(self.policy, assets))

    def with_frames(self, change: Callable[[dict[str, Any]], Mapping[str, Any]]) -> SetUp:
        """With every frame changed that the robot records."""
        samples = [dict(change(frame)) for frame in self.seen.samples]
        later = {n: dict(change(frame)) for n, frame in self.seen.later.items()}
        return dataclasses.replace(self, seen=dataclasses.replace(self.seen, samples=samples, later=later))

    def with_image(self, camera: str, change: Callable[[np.ndarray], np.ndarray]) -> SetUp:
        """With the images of a camera changed."""
        key = f"observation.images.{camera}"
        return self.with_frames(lambda frame: frame | {key: np.ascontiguousarray(change(frame[key]))})

    def with_state(self, change: Callable[[np.ndarray], np.ndarray]) -> SetUp:
        """With all states changed, of frames too."""
        state = change(self.seen.state)
        frames = self.with_frames(lambda f: f | {"observation.state": change(f["observation.state"])})
        return dataclasses.replace(frames, seen=dataclasses.replace(frames.seen, state=state))

    def with_weights(self, change: Callable[[dict[str, torch.Tensor]], None]) -> SetUp:
        """With a model whose parameters, by name, were changed in place."""
        policy = _policy(self.policy, self.policy.assets)
        policy.model = copy.deepcopy(policy.model)
        with torch.no_grad():
            change(dict(policy.model.named_parameters()))
        return dataclasses.replace(self, policy=policy)


def _policy(policy: Policy, assets: Assets) -> Policy:
    return type(policy)(policy.model, assets, num_steps=policy.num_steps, fallback=True)


@functools.cache
def working(name: str, samples: int = 16) -> SetUp:
    """The set-up of one of the two policies of this folder, on episodes held out of its training."""
    policy = pi0_torch.Policy.from_pretrained(FOLDER / name, dtype="float32", fallback=True)
    robot, horizon = policy.pipeline.robot, policy.config.action_horizon
    parts = [
        of_dataset(
            open_dataset("bundled://metaworld_v30", robot, episodes=e, action_horizon=horizon, format=FORMATS[name]),
            robot,
            horizon // 2,
            samples,
        )
        for e in (HELD_OUT, TRAINED)
    ]
    return SetUp(policy, *parts)


def scaled(stats: NormStats, factor: np.ndarray | float) -> NormStats:
    """The norm stats of data that are `factor` times as large."""
    return NormStats(**{name: value * factor for name, value in stats.present().items()})


# Each fault by the cause that the doctor is to name first, what was done, and to which policy.


def stats_units(s: SetUp) -> SetUp:
    """Norm stats in centimetres, the robot's state in metres."""
    stats = s.policy.assets.norm_stats
    factor = np.array([100.0, 100, 100, 1])
    return s.with_assets(norm_stats=stats | {"state": scaled(stats["state"], factor)})


def stats_constant(s: SetUp) -> SetUp:
    """Norm stats of a dimension that did not move while they were computed."""
    stats = s.policy.assets.norm_stats
    fields = {name: value.copy() for name, value in stats["state"].present().items()}
    fields["std"][1] = 1e-6
    for name in fields.keys() - {"std"}:
        fields[name][1] = fields["mean"][1]
    return s.with_assets(norm_stats=stats | {"state": NormStats(**fields)})


def other_robots_stats(s: SetUp) -> SetUp:
    """Norm stats of another dataset: shifted by two of its ranges."""
    stats = s.policy.assets.norm_stats
    moved = {
        key: NormStats(
            **{name: value if name == "std" else value + 10 * one.std for name, value in one.present().items()}
        )
        for key, one in stats.items()
    }
    return s.with_assets(norm_stats=moved)


def state_in_degrees(s: SetUp) -> SetUp:
    return s.with_state(lambda x: (np.asarray(x) * np.array([57.3, 57.3, 57.3, 1])).astype(x.dtype))


def dark(s: SetUp) -> SetUp:
    return s.with_image("corner", lambda x: (x * 0.4).astype(np.uint8))


def bgr(s: SetUp) -> SetUp:
    return s.with_image("wrist", lambda x: x[..., ::-1])


def rotated(s: SetUp) -> SetUp:
    return s.with_image("corner", lambda x: x[::-1, ::-1])


def mirrored(s: SetUp) -> SetUp:
    return s.with_image("wrist", lambda x: x[:, ::-1])


def squeezed(s: SetUp) -> SetUp:
    """A camera of 4:3, of which the client sends the whole image in a square with bars."""

    def letterbox(x: np.ndarray) -> np.ndarray:
        height, width, _ = x.shape
        new = np.zeros_like(x)
        rows = int(height * 0.75)
        top = (height - rows) // 2
        new[top : top + rows] = np.asarray(Image.fromarray(x).resize((width, rows)))
        return new

    return s.with_image("corner", letterbox)


def wide(s: SetUp) -> SetUp:
    """Images of another shape."""
    return s.with_image("corner", lambda x: np.asarray(Image.fromarray(x).resize((x.shape[1] * 4 // 3, x.shape[0]))))


def telephoto(s: SetUp) -> SetUp:
    """A lens that sees the middle 60 %."""

    def crop(x: np.ndarray) -> np.ndarray:
        height, width, _ = x.shape
        y, z = int(0.2 * height), int(0.2 * width)
        return np.asarray(Image.fromarray(x[y : height - y, z : width - z]).resize((width, height)))

    return s.with_image("corner", crop)


def swapped(s: SetUp) -> SetUp:
    corner, wrist = "observation.images.corner", "observation.images.wrist"
    return s.with_frames(lambda f: f | {corner: f[wrist], wrist: f[corner]})


def black(s: SetUp) -> SetUp:
    return s.with_image("wrist", np.zeros_like)


def frozen(s: SetUp) -> SetUp:
    first = s.seen.samples[0]["observation.images.corner"]
    return s.with_image("corner", lambda x: first)


def cut_prompts(s: SetUp) -> SetUp:
    """Prompts of twice the length that the model reads. Training's are as long, so they are not new."""

    def longer(text: str) -> str:
        return f"please {text} as carefully as you can, and then move the arm back to where it was before you began"

    changed = s.with_frames(lambda f: f | {"task": longer(f["task"])})
    both = [dataclasses.replace(r, prompts=tuple(map(longer, r.prompts))) for r in (changed.seen, s.known)]
    return dataclasses.replace(changed, seen=both[0], known=both[1])


def new_prompt(s: SetUp) -> SetUp:
    changed = s.with_frames(lambda f: f | {"task": "make coffee"})
    return dataclasses.replace(changed, seen=dataclasses.replace(changed.seen, prompts=("make coffee",)))


def gripper_state(s: SetUp) -> SetUp:
    """The gripper's opening as 0 to −1 instead of 0 to 1."""
    return s.with_state(lambda x: np.concatenate([x[..., :3], -x[..., 3:]], axis=-1))


def gripper_action(s: SetUp) -> SetUp:
    """A robot that closes at −1, where training's closes at 1: its recorded actions have the other sign."""

    def flip(x: np.ndarray) -> np.ndarray:
        return np.concatenate([x[..., :3], -x[..., 3:]], axis=-1)

    changed = s.with_frames(lambda f: f | {"action": flip(f["action"])})
    return dataclasses.replace(changed, seen=dataclasses.replace(changed.seen, actions=flip(changed.seen.actions)))


def absolute(s: SetUp) -> SetUp:
    """The policy's relative actions are taken for absolute ones."""
    robot = dict(s.policy.assets.robot) | {"delta": False}
    return s.with_assets(robot=robot)


def half_rate(s: SetUp) -> SetUp:
    return dataclasses.replace(s, seen=dataclasses.replace(s.seen, fps=10.0))


def other_horizon(s: SetUp) -> SetUp:
    """A model that is run with twice the actions that it was trained with."""
    model = dataclasses.replace(s.policy.assets.model, action_horizon=2 * s.policy.assets.model.action_horizon)
    return s.with_assets(model=model)


def short_episodes(s: SetUp) -> SetUp:
    """Training on pieces of 12 frames."""
    known = s.known
    starts = np.append(np.arange(0, known.frames, 12), known.frames)
    return dataclasses.replace(s, known=dataclasses.replace(known, starts=starts))


def blind(s: SetUp) -> SetUp:
    """The images' tokens are the same whatever the images are."""
    return s.with_weights(lambda p: p["vision.head.weight"].zero_())


def stateless(s: SetUp) -> SetUp:
    return s.with_weights(lambda p: p["state_proj.weight"].zero_())


class Deaf(pi0_torch.Policy):
    """Tells the task by the images, as after training on scenes of one task each: their first prompt stays theirs."""

    scenes: dict[bytes, tuple[np.ndarray, np.ndarray]]

    def sample(self, observation: Any, noise: Any, previous: Any = None) -> np.ndarray:
        prompts, masks = np.array(observation.tokenized_prompt), np.array(observation.tokenized_prompt_mask)
        for row in range(len(prompts)):
            scene = b"".join(np.asarray(image[row]).tobytes() for image in observation.images.values())
            prompts[row], masks[row] = self.scenes.setdefault(scene, (prompts[row].copy(), masks[row].copy()))
        changed = dataclasses.replace(observation, tokenized_prompt=prompts, tokenized_prompt_mask=masks)
        return super().sample(changed, noise, previous)


def deaf(s: SetUp) -> SetUp:
    policy = Deaf(s.policy.model, s.policy.assets, fallback=True)
    policy.scenes = {}
    return dataclasses.replace(s, policy=policy)


def one_step(s: SetUp) -> SetUp:
    policy = _policy(s.policy, s.policy.assets)
    policy.num_steps = 1
    return dataclasses.replace(s, policy=policy)


def offset(s: SetUp) -> SetUp:
    """A large offset of all features of an image patch, which layer norms take away: nothing in float32."""

    def change(p: dict[str, torch.Tensor]) -> None:
        p["vision.patch_embedding.bias"] += 3000.0

    exact = s.with_weights(change).policy
    rounded = _policy(s.policy, s.policy.assets)
    rounded.model = pi0_torch.load(FOLDER / "velocities", dtype="bfloat16")
    rounded = dataclasses.replace(s, policy=rounded).with_weights(change).policy
    return dataclasses.replace(s, policy=rounded, reload=lambda dtype: exact)


class Jumpy(pi0_torch.Policy):
    """Chooses another way at every call: a policy of demonstrations that contradict each other."""

    def sample(self, observation: Any, noise: Any, previous: Any = None) -> np.ndarray:
        actions = super().sample(observation, noise)
        way = np.sign(noise.mean(axis=(1, 2), keepdims=True))
        return actions + (2 * way).astype(np.float32)


def jumpy(s: SetUp) -> SetUp:
    policy = Jumpy(s.policy.model, s.policy.assets, fallback=True)
    return dataclasses.replace(s, policy=policy)


class Slow(pi0_torch.Policy):
    """Keeps the processor busy for longer than the two actions last that are executed of a chunk."""

    def sample(self, observation: Any, noise: Any, previous: Any = None) -> np.ndarray:
        if len(noise) == 1:
            end = time.process_time() + 0.12
            while time.process_time() < end:
                pass
        return super().sample(observation, noise)


def slow(s: SetUp) -> SetUp:
    policy = Slow(s.policy.model, s.policy.assets, fallback=True)
    return dataclasses.replace(s, policy=policy, replan=2, clock=time.process_time)


def untrained(s: SetUp) -> SetUp:
    """Velocities that have nothing to do with the data."""
    generator = torch.Generator().manual_seed(0)

    def change(p: dict[str, torch.Tensor]) -> None:
        for name in ("action_out_proj.weight", "action_time_mlp_out.weight"):
            p[name].copy_(p[name].std() * torch.randn(p[name].shape, generator=generator))

    return s.with_weights(change)


# cause to be named first: fault, policy
FAULTS: Sequence[tuple[str, Callable[[SetUp], SetUp], str]] = (
    ("stats", stats_units, "velocities"),
    ("stats", stats_constant, "velocities"),
    ("stats", other_robots_stats, "velocities"),
    ("state", state_in_degrees, "velocities"),
    ("brightness", dark, "velocities"),
    ("channels", bgr, "velocities"),
    ("orientation", rotated, "velocities"),
    ("orientation", mirrored, "velocities"),
    ("aspect", squeezed, "velocities"),
    ("aspect", wide, "velocities"),
    ("fov", telephoto, "velocities"),
    ("swapped", swapped, "velocities"),
    ("black", black, "velocities"),
    ("frozen", frozen, "velocities"),
    ("prompt_cut", cut_prompts, "velocities"),
    ("prompt_unseen", new_prompt, "velocities"),
    ("gripper", gripper_state, "velocities"),
    ("gripper", gripper_action, "velocities"),
    ("delta", absolute, "positions"),
    ("rate", half_rate, "velocities"),
    ("horizon", other_horizon, "velocities"),
    ("padding", short_episodes, "velocities"),
    ("precision", offset, "velocities"),
    ("steps", one_step, "velocities"),
    ("ignores_images", blind, "velocities"),
    ("ignores_state", stateless, "velocities"),
    ("ignores_prompt", deaf, "velocities"),
    ("jumps", jumpy, "velocities"),
    ("untrained", untrained, "velocities"),
    ("latency", slow, "velocities"),
)
