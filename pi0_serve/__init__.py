"""A policy server that openpi's clients know, and the robot side: `Client`, `ChunkPlayer`.

Names are imported on first use: the robot side needs NumPy, msgpack and websockets, and no framework.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pi0_serve.client import Client, PolicyError
    from pi0_serve.engine import Engine
    from pi0_serve.keys import Keys
    from pi0_serve.limits import Limits
    from pi0_serve.player import ChunkPlayer, LateError
    from pi0_serve.recording import Recorder
    from pi0_serve.server import PolicyServer

_WHERE = {
    "ChunkPlayer": "player",
    "Client": "client",
    "Engine": "engine",
    "Keys": "keys",
    "LateError": "player",
    "Limits": "limits",
    "PolicyError": "client",
    "PolicyServer": "server",
    "Recorder": "recording",
}

__all__ = [
    "ChunkPlayer",
    "Client",
    "Engine",
    "Keys",
    "LateError",
    "Limits",
    "PolicyError",
    "PolicyServer",
    "Recorder",
]


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_WHERE[name]}"), name)
