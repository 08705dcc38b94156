"""What chooses the actions of a rollout: a policy of a checkpoint, a policy server, or random actions."""

from __future__ import annotations

import concurrent.futures
import hashlib
import importlib
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from convert.checkpoints import find_checkpoint
from pi0.plugins import resolve
from pi0.policy.manifest import FORMATS, MANIFEST, is_export
from pi0.policy.policy import Policy
from pi0.storage import digest, list_files
from pi0_eval.export.runners import load_exported
from pi0_eval.parity.sides import Side, SideError


def noise_seed(seed: int, task: str, episode: int, chunk: int) -> int:
    """The seed of the noise of a chunk: that of `episode` of a task, whatever else is run."""
    sequence = np.random.SeedSequence([seed, zlib.crc32(task.encode()), episode, chunk])
    return int(sequence.generate_state(1, np.uint64)[0] >> 1)


def checksum(checkpoint: str) -> str:
    """A checksum of a checkpoint's files but for the state of its training, by which a run knows that it changed.

    Of an export that of its manifest, which has its files' own.
    """
    if is_export(checkpoint):
        return digest(Path(checkpoint).expanduser() / MANIFEST, "sha256")[:16]
    found = hashlib.sha256()
    for place in dict.fromkeys(find_checkpoint(checkpoint)):
        files = {n: f.path for n, f in list_files(place).items()} if place.is_dir() else {place.name: place}
        for name, file in files.items():
            if not name.startswith("train_state"):
                found.update(f"{name} {digest(file, 'sha256')}\n".encode())
    return found.hexdigest()[:16]


class Actor(Protocol):
    """Chunks [T, A] in the robot's units for observations, one of each row that has one.

    `cameras` are what an observation must have (None: the environment's choice); `horizon` is T, None where only an
    answer tells. `rtc` is the method of real-time chunking of a policy that takes `prev_chunk` and `delay`.
    """

    cameras: tuple[str, ...] | None
    horizon: int | None
    rtc: str | None

    def act(self, observations: Mapping[int, Mapping[str, Any]], seeds: Mapping[int, int]) -> dict[int, np.ndarray]:
        """The chunk [T, A] of each row, from noise of its seed."""

    def describe(self) -> dict[str, Any]:
        """What a run's file says of it."""

    def close(self) -> None:
        """End connections."""


def load_side(checkpoint: str, side: Side, options: dict[str, Any]) -> tuple[Side, Policy]:
    """The policy of a checkpoint or an export as a side says, and the side with what it left open.

    Raises SideError, and ExportError for an export to another format.
    """
    if is_export(checkpoint):
        if given := sorted(name for name, value in options.items() if value is not None):
            raise ValueError(f"{checkpoint} is an export, which has its own {', '.join(given)}; leave them out")
        policy = load_exported(checkpoint, side.framework, side.device, fallback=True)
        return side.of(policy.sampler.manifest.to, ""), policy
    framework = side.framework or "torch"
    complete = side.of(framework, "")  # checks the words
    if framework in FORMATS:
        raise SideError(f"side {side}: {checkpoint} is no export of pi0-export")
    if side.compiled is not None and (framework, side.path) != ("torch", "sampler"):
        raise SideError(f"side {side}: only the sampler in PyTorch is compiled or not")
    options |= {"dtype": side.dtype, "use_sampler": side.path == "sampler", "attention": side.attention}
    options |= {"fallback": True}
    if framework == "torch":
        options |= {"compile": side.compiled} if side.path == "sampler" else {}
        options |= {"device": side.device} if side.device else {}
    elif side.device:
        raise SideError(f"side {side}: set JAX_PLATFORMS for the device of JAX")
    return complete, importlib.import_module(f"pi0_{framework}").Policy.from_pretrained(checkpoint, **options)


class LocalActor(Actor):
    """A checkpoint's policy, called with batches of one size.

    A row's numbers depend on the size of a batch and on its place in it, by rounding, but on no other row: empty rows
    are filled with another's observation, and an episode has the same row in every run.
    """

    def __init__(self, checkpoint: str, side: Side, batch_size: int, **options: Any):
        self._checkpoint, self._batch, self._checksum = checkpoint, batch_size, checksum(checkpoint)
        self._side, self.policy = load_side(checkpoint, side, options)
        self.rtc = None if self.policy.rtc is None else self.policy.rtc.method
        self.horizon: int | None = self.policy.config.action_horizon
        robot = self.policy.pipeline.robot
        found = tuple(name for name in robot.cameras if name not in robot.optional_cameras)
        self.cameras: tuple[str, ...] | None = found

    def act(self, observations: Mapping[int, Mapping[str, Any]], seeds: Mapping[int, int]) -> dict[int, np.ndarray]:
        shape, noise = (self.policy.config.action_horizon, self.policy.config.action_dim), None
        if not self.policy.config.family.action_tokens:
            drawn = {
                row: np.random.default_rng(seed).normal(size=shape).astype(np.float32) for row, seed in seeds.items()
            }
            noise = np.stack([drawn.get(row, np.zeros(shape, np.float32)) for row in range(self._batch)])
        any_row = next(iter(observations.values()))
        rows = [observations.get(row, any_row) for row in range(self._batch)]
        actions = self.policy.infer_batch(rows, noise)["actions"]
        return {row: actions[row] for row in observations}

    def describe(self) -> dict[str, Any]:
        config = self.policy.config
        side = {"side": str(self._side), "dtype": self._side.dtype or config.runtime.dtype}
        steps = self.policy.num_steps or config.runtime.num_steps
        found = {"checkpoint": self._checkpoint, "checksum": self._checksum, "num_steps": steps} | side
        return found if self.rtc is None else found | {"rtc": self.rtc}

    def close(self) -> None:
        return None


class ServerActor(Actor):
    """A policy server, asked from as many connections as there are rows, whose requests it may join into batches.

    The noise is that of a local policy where the server takes seeds, as pi0-serve does.
    """

    def __init__(self, address: str, rows: int, api_key: str | None = None):
        connect = resolve("pi0_serve.client:Client", {}, "client")  # of the floor beside
        self._clients = [connect(address, None, api_key, timeout=300.0) for _ in range(rows)]
        self._address, metadata = address, self._clients[0].metadata
        self.horizon = metadata.get("action_horizon")
        self.rtc: str | None = metadata.get("rtc")
        self.seeded = bool(metadata.get("protocol")) and metadata.get("noise") is not None
        optional = set(metadata.get("optional_cameras", ()))
        cameras = tuple(name for name in metadata.get("cameras", ()) if name not in optional)
        self.cameras: tuple[str, ...] | None = cameras or None
        self._threads = concurrent.futures.ThreadPoolExecutor(rows)

    def act(self, observations: Mapping[int, Mapping[str, Any]], seeds: Mapping[int, int]) -> dict[int, np.ndarray]:
        def ask(row: int) -> np.ndarray:
            options = {"seed": seeds[row]} if self.seeded else {}
            return np.asarray(self._clients[row].infer(dict(observations[row]), **options)["actions"])

        return dict(zip(observations, self._threads.map(ask, observations), strict=True))

    def describe(self) -> dict[str, Any]:
        return {"server": self._address, "seeded": self.seeded}

    def close(self) -> None:
        self._threads.shutdown()
        for client in self._clients:
            client.close()


class RandomActor(Actor):
    """Actions drawn evenly from [-1, 1]: what a success rate is to be compared with."""

    cameras: tuple[str, ...] | None = ()
    rtc: str | None = None

    def __init__(self, action_dim: int, horizon: int):
        self.horizon: int | None = horizon
        self._horizon, self._dim = horizon, action_dim

    def act(self, observations: Mapping[int, Mapping[str, Any]], seeds: Mapping[int, int]) -> dict[int, np.ndarray]:
        shape = (self._horizon, self._dim)
        return {row: np.random.default_rng(seeds[row]).uniform(-1, 1, shape).astype(np.float32) for row in observations}

    def describe(self) -> dict[str, Any]:
        return {"checkpoint": "random"}

    def close(self) -> None:
        return None


def check_chunks(chunks: Mapping[int, np.ndarray], rows: Sequence[int]) -> None:
    """Raise ValueError for answers that are no finite actions [T, A]."""
    for row in rows:
        actions = chunks[row]
        if actions.ndim != 2 or not len(actions) or not np.isfinite(actions).all():
            raise ValueError(f"the policy's actions are {list(actions.shape)}; expected finite numbers [T, A]")
