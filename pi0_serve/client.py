"""`Client`: the robot's side of a policy server. Needs NumPy, msgpack and websockets alone."""

from __future__ import annotations

import contextlib
import random
import re
import ssl
import time
from collections.abc import Mapping
from types import TracebackType
from typing import Any, Self

import numpy as np
from websockets.exceptions import ConnectionClosed, InvalidHandshake, InvalidMessage, InvalidStatus
from websockets.sync.client import ClientConnection, connect

from pi0_serve import protocol

OF_REQUEST = re.compile(r" \(request_id (\d+)\)$")
FINAL = (400, 401, 403, 404)  # statuses of a handshake that another attempt would get too


class PolicyError(RuntimeError):
    """The server did not answer a request: its line of what was wrong with it, or of the connection."""


class Client:
    """A connection to a policy server, ours or openpi's, with the interface of openpi's `WebsocketClientPolicy`.

    `host` is a name or an address such as "wss://server:8000/droid"; `name` chooses among policies of a server.
    It waits up to `connect_timeout` seconds for a server, at growing intervals up to `max_backoff`; a connection that
    is lost later is made anew by the next request, within its `timeout`. A request without an answer after `timeout`
    seconds raises TimeoutError, and a late answer to it is discarded. `tls` verifies the server of "wss" (default: by
    the system's certificates).

    Attributes: `metadata`, what the server said of its policy. Use it from one thread at a time, or pass it to a
    `ChunkPlayer`. Raises PolicyError where the server refuses the connection, ConnectionError where there is none.
    """

    def __init__(
        self,
        host: str = "127.0.0.1",
        port: int | None = 8000,
        api_key: str | None = None,
        *,
        name: str = "",
        timeout: float = 10.0,
        connect_timeout: float = 60.0,
        max_backoff: float = 5.0,
        tls: ssl.SSLContext | None = None,
    ):
        address = host if host.startswith(("ws://", "wss://")) else f"ws://{host}"
        scheme, _, rest = address.partition("://")
        place, slash, path = rest.partition("/")
        if port is not None and not re.search(r":\d+$", place):
            place = f"{place}:{port}"
        self.address = f"{scheme}://{place}/{name or path if slash or name else ''}"
        self.timeout, self.connect_timeout, self.max_backoff = timeout, connect_timeout, max_backoff
        self._headers = {"Authorization": f"Api-Key {api_key}"} if api_key else {}
        self._tls, self._number, self._reset = tls, 0, False
        self._socket: ClientConnection | None = None
        self.metadata: dict[str, Any] = {}
        self._connect(time.monotonic() + connect_timeout)

    def get_server_metadata(self) -> dict[str, Any]:
        """What the server said of its policy."""
        return self.metadata

    def infer(
        self,
        observation: Mapping[str, Any],
        *,
        subtask: str | None = None,
        noise: np.ndarray | None = None,
        seed: int | None = None,
        timeout: float | None = None,
    ) -> dict[str, Any]:
        """The answer to an observation: `actions` float32 [T, A] in the robot's units, and timings.

        A `subtask` takes the place of the one that π0.5 would write; `noise` [T, A] or a `seed` of it that of the
        server's. For a server with real-time chunking the observation may have `prev_chunk` and `delay`, as in
        `Policy.infer_batch`, or `executed`, the actions since the last request. A request that a lost connection took
        with it is sent once more. Raises PolicyError for what the server says is wrong, TimeoutError, and
        ConnectionError; the next call may succeed.
        """
        self._number += 1
        options: dict[str, Any] = {"subtask": subtask, "noise": noise, "seed": seed}
        request = {**observation, **{k: v for k, v in options.items() if v is not None}}
        if self.metadata.get("protocol"):
            request |= {"protocol": protocol.PROTOCOL, "request_id": self._number}
            request |= {"reset": True} if self._reset else {}
        elif any(value is not None for value in options.values()) or "prev_chunk" in observation:
            raise ValueError("this server takes no subtask, noise, seed or prev_chunk: it is not pi0-serve")
        message = protocol.pack(request)
        if len(message) > self.metadata.get("max_message", len(message)):
            raise ValueError(
                f"the observation has {len(message)} bytes; the server takes {self.metadata['max_message']}"
            )
        end = time.monotonic() + (self.timeout if timeout is None else timeout)
        for attempt in (1, 2):
            if self._socket is None:
                self._connect(end)
            assert self._socket is not None
            try:
                self._socket.send(message)
                answer = self._receive(self._socket, end)
                self._reset = False
                return answer
            except ConnectionClosed as error:
                self._drop()
                refused = error.rcvd is not None and error.rcvd.code in (1003, 1007, 1008, 1009)
                if refused or attempt == 2:
                    raise PolicyError(f"the server closed the connection: {error}") from error
        raise AssertionError

    def reset(self) -> None:
        """Begin a new episode: the server forgets the last one's subtask with the next request."""
        self._reset = True

    def close(self) -> None:
        """Close the connection."""
        self._drop()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self.close()

    def _receive(self, socket: ClientConnection, end: float) -> dict[str, Any]:
        """The answer to the last request; others, of requests that were given up, are discarded."""
        while True:
            try:
                message = socket.recv(timeout=max(end - time.monotonic(), 0))
            except TimeoutError:
                if not self.metadata.get("protocol"):
                    self._drop()  # without numbers a late answer would be taken for the next one
                raise TimeoutError("the server did not answer in time") from None
            if isinstance(message, str):
                found = OF_REQUEST.search(message)
                if found is None or int(found[1]) == self._number:
                    raise PolicyError(OF_REQUEST.sub("", message))
                continue
            answer = protocol.unpack(message)
            if not isinstance(answer, dict) or "actions" not in answer:
                raise PolicyError("the server's answer has no actions")
            if answer.pop("request_id", self._number) == self._number:
                return answer

    def _connect(self, end: float) -> None:
        """Connect, again and again until `end`. Raises ConnectionError, or PolicyError where that would not help."""
        wait = 0.05
        while True:
            try:
                left = max(end - time.monotonic(), 0.1)
                options: dict[str, Any] = {"additional_headers": self._headers, "compression": None, "max_size": None}
                options |= {"open_timeout": left, "close_timeout": 1, "ping_interval": 20, "ping_timeout": 20}
                socket = connect(self.address, ssl=self._tls, **options).__enter__()  # closed by _drop
                try:
                    self.metadata = self._greeting(socket.recv(timeout=left))
                except BaseException:
                    socket.close()
                    raise
                self._socket = socket
                return
            except InvalidStatus as error:
                status, text = error.response.status_code, (error.response.body or b"").decode("utf-8", "replace")
                if status in FINAL or time.monotonic() + wait > end:
                    raise PolicyError(f"{self.address}: {status} {text.strip() or 'refused'}") from error
            except (OSError, ConnectionClosed, InvalidHandshake, InvalidMessage, TimeoutError) as error:
                if isinstance(error, ssl.SSLCertVerificationError):
                    raise ConnectionError(f"{self.address}: {error}") from error
                if time.monotonic() + wait > end:
                    raise ConnectionError(f"no server at {self.address}: {error}") from error
            time.sleep(wait * random.uniform(0.5, 1))  # robots of one server do not all come back at once
            wait = min(2 * wait, self.max_backoff)

    def _greeting(self, message: str | bytes) -> dict[str, Any]:
        found = None if isinstance(message, str) else protocol.unpack(message)
        if not isinstance(found, dict):
            raise PolicyError(f"{self.address} is no policy server: it said {message!r:.80}")
        return found

    def _drop(self) -> None:
        socket, self._socket = self._socket, None
        if socket is not None:
            with contextlib.suppress(OSError, ConnectionClosed):
                socket.close()
