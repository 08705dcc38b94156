"""Real-time chunking at work: how chunks join under latency, and what it costs.

    pi0-train --config metaworld_demo --config.model.action_horizon=24 --workdir runs/plain
    pi0-train --config metaworld_demo --config.model.action_horizon=24 --workdir runs/rtc \\
        --config.rtc='{"max_delay": 6}'
    python benchmarks/rtc.py joints runs/plain --trained runs/rtc
    python benchmarks/rtc.py overhead
    python benchmarks/rtc.py rollouts runs/rollout_*

`joints` plays held-out episodes of the bundled recordings open loop at their rate: a chunk is asked for with a recorded
frame every EXECUTE steps and is there DELAY steps later. Steps between consecutive actions are Euclidean, in units of
each dimension's standard deviation in training; `joint` is the mean of those at the joints of two chunks over that
inside chunks, `largest` the largest one over the largest one inside. `error` is the mean absolute distance of what was
executed from what was recorded, in the same units.

`rollouts` compares folders of `pi0-rollout` with `--rtc` and `--latency`: success, `joint` as above but of actions in
the robot's units, and `jerk`, the largest of an episode, mean of all: the norm of the third difference of the first
`--joints` numbers of the simulator's state (of Meta-World the arm's seven angles), in units/s³.

`overhead` samples with the model of 58 M parameters, 3 cameras, float32, ten steps, and prints the ratio to plain
sampling of the best of alternating calls, in each framework.
"""

from __future__ import annotations

import argparse
import importlib
import itertools
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pi0.config import ModelConfig
from pi0.datasets.registry import open_dataset
from pi0.policy.rtc import RTC, Previous
from pi0.reading import read_json
from pi0.variants import get_variant
from pi0_eval.closed_loop import SETTINGS
from pi0_eval.outcomes import EPISODES, TRAJECTORY, Trajectory, read_episodes, wilson
from pi0_eval.parity.inputs import Inputs
from pi0_eval.replay import recorded_actions

EXECUTE = 12  # actions of a chunk
LATENCIES = (0.1, 0.2, 0.3)  # seconds
ENSEMBLE = 0.01  # ACT's weight
METHODS: dict[str, RTC | None] = {
    "guided": RTC("guided"),
    "guided, identity": RTC("guided", jacobian="identity"),
    "trained": RTC("trained"),
}


class Episodes:
    """Held-out episodes of the bundled recordings, each played with several draws of noise: rows of one batch."""

    def __init__(self, policy: Any, episodes: Sequence[int], draws: int):
        dataset = open_dataset("bundled://metaworld_v30", policy.pipeline.robot, episodes=list(episodes))
        recorded = recorded_actions(dataset, policy.pipeline.robot)
        bounds = list(itertools.pairwise(dataset.starts.tolist()))
        self.fps, self.dataset = dataset.fps, dataset
        self.rows = [bound for bound in bounds for _ in range(draws)]
        self.steps = min(end - start for start, end in bounds)
        self.recorded = np.stack([recorded[start : start + self.steps] for start, _ in self.rows])
        self.std = np.asarray(policy.assets.norm_stats["actions"].std)[: self.recorded.shape[-1]]

    def observations(self, step: int) -> list[dict[str, Any]]:
        frames = {start: self.dataset[start + step] for start, _ in set(self.rows)}
        return [dict(frames[start]) for start, _ in self.rows]


def play(policy: Any, episodes: Episodes, delay: int, rtc: bool = False) -> tuple[np.ndarray, list[int]]:
    """The actions [R, F, A] that are executed, and the steps at which a new chunk begins."""
    executed, joints, chunks = list[np.ndarray](), list[int](), list[tuple[int, np.ndarray]]()
    for step in range(0, episodes.steps, EXECUTE):
        observations = episodes.observations(step)
        if rtc and chunks:
            rest = chunks[-1][1][:, EXECUTE:]
            for observation, own in zip(observations, rest, strict=True):
                observation |= {"prev_chunk": own, "delay": delay}
        chunks.append((step, policy.infer_batch(observations)["actions"]))
    for step in range(episodes.steps):
        current = max(0, (step - delay) // EXECUTE)
        start, actions = chunks[min(current, len(chunks) - 1)]
        if executed and step - delay == start and start:
            joints.append(step)
        executed.append(actions[:, step - start])
    return np.stack(executed, axis=1), joints


def ensembled(policy: Any, episodes: Episodes, delay: int) -> tuple[np.ndarray, list[int]]:
    """As `play`, with a chunk asked for as soon as the last one is there; an action is the mean of all chunks that
    have one, by ACT's weights."""
    chunks = [
        (s, policy.infer_batch(episodes.observations(s))["actions"]) for s in range(0, episodes.steps, max(delay, 1))
    ]
    executed, joints = list[np.ndarray](), list[int]()
    for step in range(episodes.steps):
        there = [(s, a) for s, a in chunks if (s + delay <= step or s == 0) and step - s < a.shape[1]]
        weights = np.exp(-ENSEMBLE * np.arange(len(there)))
        executed.append(np.average(np.stack([a[:, step - s] for s, a in there]), axis=0, weights=weights))
        if any(s + delay == step and s for s, _ in chunks):
            joints.append(step)
    return np.stack(executed, axis=1), joints


def figures(episodes: Episodes, executed: np.ndarray, joints: Sequence[int]) -> tuple[float, float, float]:
    scaled = executed / episodes.std
    steps = np.linalg.norm(np.diff(scaled, axis=1), axis=-1)  # [R, F − 1]
    at = np.zeros(steps.shape[1], bool)
    at[[j - 1 for j in joints]] = True
    error = float(np.abs(scaled - episodes.recorded / episodes.std).mean())
    return float(steps[:, at].mean() / steps[:, ~at].mean()), float(steps[:, at].max() / steps[:, ~at].max()), error


def show_joints(args: argparse.Namespace) -> None:
    import pi0_torch

    def load(folder: str, rtc: RTC | None = None) -> Any:
        return pi0_torch.Policy.from_pretrained(folder, rtc=rtc, use_sampler=True, compile=False)

    plain = load(args.plain)
    episodes = Episodes(plain, args.episodes, args.draws)
    print(f"{len(args.episodes)} episodes × {args.draws} draws, {episodes.steps} steps at {episodes.fps:g} Hz\n")
    print(f"{'':20}" + "".join(f"{f'{1e3 * latency:.0f} ms':>27}" for latency in LATENCIES))
    print(f"{'':20}" + f"{'joint':>9}{'largest':>9}{'error':>9}" * len(LATENCIES))
    runs: dict[str, tuple[Any, Callable[..., Any]]] = {
        "sync": (plain, lambda policy, delay: play(policy, episodes, 0)),
        "async, naive": (plain, lambda policy, delay: play(policy, episodes, delay)),
        "async, ensembled": (plain, lambda policy, delay: ensembled(policy, episodes, delay)),
    }
    for name, rtc in METHODS.items():
        if rtc != METHODS["trained"] or args.trained:
            source = args.trained if rtc == METHODS["trained"] else args.plain
            runs[name] = (load(source, rtc), lambda policy, delay: play(policy, episodes, delay, rtc=True))
    for name, (policy, run) in runs.items():
        row = ""
        for latency in LATENCIES:
            policy._rng = np.random.default_rng(0)  # the same noise for every method
            row += "".join(f"{x:>9.2f}" for x in figures(episodes, *run(policy, round(latency * episodes.fps))))
        print(f"{name:20}{row}", flush=True)


def show_rollouts(args: argparse.Namespace) -> None:
    print(f"{'':28}{'success':>10}{'95 % interval':>16}{'steps':>8}{'joint':>8}{'jerk':>10}")
    for folder in args.folders:
        plan = read_json(folder / SETTINGS)["plan"]
        episodes = [e for e in read_episodes(folder / EPISODES).values() if e.outcome != "error"]
        at, inside, jerks = list[float](), list[float](), list[float]()
        for episode in episodes:
            done = Trajectory.read(folder / TRAJECTORY.format(index=episode.index))
            steps = np.linalg.norm(np.diff(done.actions, axis=0), axis=1)
            joints = done.starts[1:] + plan["latency"]  # the first actions of the new chunks
            joint = np.isin(np.arange(1, len(done.actions)), joints)
            at, inside = at + steps[joint].tolist(), inside + steps[~joint].tolist()
            third = np.diff(done.states[:, : args.joints], n=3, axis=0)
            jerks.append(float(np.linalg.norm(third, axis=1).max(initial=0)) * args.rate**3)
        won = sum(e.outcome == "success" for e in episodes)
        low, high = wilson(won, len(episodes))
        print(
            f"{folder.name:28}{won / len(episodes):>10.0%}{f'{low:.0%} – {high:.0%}':>16}"
            f"{np.mean([e.steps for e in episodes]):>8.0f}{np.mean(at) / np.mean(inside):>8.2f}{np.mean(jerks):>10.0f}"
        )


def show_overhead(args: argparse.Namespace) -> None:
    print(f"{'':12}{'':18}{'framework':>10}{'best ms':>10}{'ratio':>8}")
    for kind in ("bench", "bench_pi05"):
        sizes = {"image_resolution": (args.resolution, args.resolution)}
        config = get_variant(kind, **sizes).with_runtime(dtype="float32")
        for framework in ("jax", "torch"):
            calls = sampling_calls(config, framework, args.compile)
            best = dict.fromkeys(calls, float("inf"))
            for _ in range(args.rounds):
                for name, call in calls.items():
                    start = time.perf_counter()
                    call()
                    best[name] = min(best[name], time.perf_counter() - start)
            for name, seconds in best.items():
                ratio = seconds / best["plain"]
                print(f"{kind:12}{name:18}{framework:>10}{1e3 * seconds:>10.1f}{ratio:>8.2f}", flush=True)


def sampling_calls(config: ModelConfig, framework: str, compile: bool) -> dict[str, Callable[[], Any]]:
    """Sampling without a previous chunk, and with 25 actions of one, of which 5 are executed meanwhile, warmed up."""
    loading, sampler = (importlib.import_module(f"pi0_{framework}.{name}") for name in ("loading", "sampler"))
    options: dict[str, Any] = {"compile": compile} if framework == "torch" else {}
    if framework == "jax":
        from flax import nnx

        model = loading.make_model(config, rngs=nnx.Rngs(0))
    else:
        model = loading.make_model(config)
    inputs = Inputs.random(config, 1, seed=0)
    observation, noise = inputs.observation.prompt_only(), inputs.noise
    actions = np.random.default_rng(0).normal(size=noise.shape).astype(np.float32)

    def call(rtc: RTC | None) -> Callable[[], Any]:
        made, previous = sampler.Sampler(model, rtc=rtc, warm_up=False, **options), None
        if rtc is not None:
            weights = rtc.weights(config.action_horizon, 5, 25)[None, :, None]
            previous = Previous(actions, np.broadcast_to(weights, noise.shape).copy())
        return lambda: np.asarray(made.sample(observation, noise, previous))

    calls = {"plain": call(None)} | {name: call(rtc) for name, rtc in METHODS.items()}
    for warm in calls.values():
        warm()
    return calls


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    joints = commands.add_parser("joints", help="how chunks join")
    joints.add_argument("plain", help="a run or checkpoint")
    joints.add_argument("--trained", help="one that was trained with config.rtc")
    joints.add_argument("--episodes", type=int, nargs="+", default=[3, 7, 11, 15])
    joints.add_argument("--draws", type=int, default=4)
    joints.set_defaults(run=show_joints)
    rollouts = commands.add_parser("rollouts", help="success and jerk in closed loop")
    rollouts.add_argument("folders", type=Path, nargs="+")
    rollouts.add_argument("--joints", type=int, default=7, help="of the arm (default %(default)s)")
    rollouts.add_argument("--rate", type=float, default=80, help="steps per second (default %(default)s, Meta-World's)")
    rollouts.set_defaults(run=show_rollouts)
    overhead = commands.add_parser("overhead", help="what it costs")
    overhead.add_argument("--rounds", type=int, default=10)
    overhead.add_argument("--resolution", type=int, default=224)
    overhead.add_argument("--compile", action="store_true", help="torch.compile")
    overhead.set_defaults(run=show_overhead)
    args = parser.parse_args()
    args.run(args)


if __name__ == "__main__":
    main()
