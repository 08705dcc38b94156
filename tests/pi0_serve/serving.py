"""A server in this process, and small policies to serve."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from convert.checkpoints import write_checkpoint
from pi0.assets import Assets
from pi0.policy.policy import Policy
from pi0.robots.normalize import NormStats
from pi0.storage import new_folder
from pi0.tokenizers.text import BUNDLED, TextTokenizer
from pi0.variants import get_variant
from pi0_serve import Engine, PolicyServer
from pi0_serve.server import Uvicorn, make_uvicorn
from tests.bucket import free_port
from tests.pi0_eval.parity.test_compare import random_checkpoint

CONFIG = get_variant("tiny", max_token_len=24)
TASK = "open the drawer"


@functools.cache
def assets() -> Assets:
    data = np.random.default_rng(0).normal(size=(500, 4))
    return Assets(
        CONFIG,
        norm_stats={"state": NormStats.from_data(data), "actions": NormStats.from_data(0.3 * data)},
        asset_id="metaworld",
        normalization="zscore",
        tokenizer=TextTokenizer(BUNDLED).reference(),
        robot="metaworld",
    )


class Slow(Policy):
    """Takes `seconds` for a batch; every action is the normalized state, plus the noise's first number."""

    def __init__(self, seconds: float = 0.0, **options: Any):
        super().__init__(None, assets(), **options)
        self.seconds, self.batches = seconds, list[int]()

    def sample(self, observation: Any, noise: Any) -> np.ndarray:
        time.sleep(self.seconds)
        self.batches.append(len(noise))
        first = noise[:, :1, :1]
        return np.repeat(observation.state[:, None], CONFIG.action_horizon, axis=1) + first

    def sample_with_subtask(self, observation: Any, noise: Any, subtask: Any) -> Any:
        raise NotImplementedError


def observation(seed: int = 0) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    images = {name: rng.integers(0, 256, (30, 40, 3)).astype(np.uint8) for name in ("corner", "wrist")}
    return images | {"state": rng.normal(size=4).astype(np.float32), "prompt": TASK}


def write_tiny(folder: Path, layout: str = "pi0_torch", **sizes: Any) -> Path:
    """A tiny checkpoint of a Meta-World robot."""
    config = get_variant("tiny", **{"max_token_len": 24, **sizes})
    checkpoint = dataclasses.replace(random_checkpoint(config), assets=dataclasses.replace(assets(), model=config))
    with new_folder(folder) as temporary:
        write_checkpoint(checkpoint, temporary, layout)
    return folder


class Served:
    """A running server and its port."""

    def __init__(self, server: PolicyServer, port: int, uvicorn: Uvicorn):
        self.server, self.port, self.uvicorn = server, port, uvicorn


@contextlib.contextmanager
def serve(
    *policies: Policy,
    engine: dict[str, Any] | None = None,
    tls: Any = None,
    port: int | None = None,
    **options: Any,
) -> Iterator[Served]:
    """Serve policies under the names policy, policy1, …, until the block ends."""
    engines = {f"policy{i or ''}": Engine(policy, **(engine or {})) for i, policy in enumerate(policies)}
    server, port = PolicyServer(engines, **options), port or free_port()
    uvicorn = make_uvicorn(server, port=port, **(tls or {}))
    thread = threading.Thread(target=uvicorn.run)
    thread.start()
    end = time.monotonic() + 20
    while not uvicorn.started and time.monotonic() < end:
        time.sleep(0.01)
    assert uvicorn.started
    try:
        yield Served(server, port, uvicorn)
    finally:
        uvicorn.handle_exit(15, None)
        thread.join(30)
        assert not thread.is_alive()
