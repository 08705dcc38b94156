"""`PolicyServer`: policies by name, served to robots over openpi's websocket protocol, and to people as a page."""

from __future__ import annotations

import asyncio
import collections
import contextlib
import logging
import secrets
import signal
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import uvicorn
from starlette.applications import Starlette
from starlette.requests import HTTPConnection, Request
from starlette.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response
from starlette.routing import Route, WebSocketRoute
from starlette.websockets import WebSocket
from uvicorn.protocols.websockets.websockets_sansio_impl import WebSocketsSansIOProtocol

from pi0 import __version__
from pi0_serve.connection import Connection
from pi0_serve.engine import Answer, Engine
from pi0_serve.keys import Keys, Rate
from pi0_serve.limits import Limits
from pi0_serve.protocol import OPTIONS, PROTOCOL
from pi0_serve.recording import Recorder
from pi0_serve.watch import Robot, Watch

logger = logging.getLogger(__name__)

PAGE = Path(__file__).parent / "page.html"
LOOPBACK = ("127.0.0.1", "::1", "localhost")
LINGER, QUIET = 10.0, 0.5  # seconds
RESERVED = ("healthz", "metrics", "state")


class PolicyServer:
    """Serves `engines` by name; the first is at `/`, each at `/NAME`. `app` is the ASGI application.

    `keys` are required of everyone if there are any. `recorder` gets what is asked and answered. `metadata` is added to
    what a robot is told first.
    """

    def __init__(
        self,
        engines: Mapping[str, Engine],
        *,
        keys: Keys | None = None,
        limits: Limits | None = None,
        recorder: Recorder | None = None,
        metadata: Mapping[str, Any] | None = None,
    ):
        wrong = [name for name in engines if not name.replace("-", "").replace("_", "").replace(".", "").isalnum()]
        if not engines or wrong or set(engines) & set(RESERVED):
            raise ValueError(f"names of policies are {list(engines)}; expected letters and digits, and not {RESERVED}")
        self.engines, self.keys, self.limits = dict(engines), keys or Keys({}), limits or Limits()
        self.recorder, self._metadata = recorder, dict(metadata or {})
        self.watch = Watch(self.engines)
        self.draining = asyncio.Event()
        self._rates: dict[str, Rate] = collections.defaultdict(lambda: Rate(self.limits.rate))
        self._open: collections.Counter[str] = collections.Counter()
        self._empty = asyncio.Event()
        routes = [
            Route("/healthz", self._health),
            Route("/metrics", self._with_key(self._metrics)),
            Route("/state", self._with_key(self._state)),
            Route("/", self._with_key(self._page)),
            WebSocketRoute("/", self._robot),
            WebSocketRoute("/{name}", self._robot),
        ]
        self.app = Starlette(routes=routes, lifespan=self._lifespan)

    def metadata(self, name: str) -> dict[str, Any]:
        """What a robot is told first."""
        policy = self.engines[name].policy
        robot, config = policy.pipeline.robot, policy.config
        return {
            "server": f"pi0 {__version__}",
            "protocol": PROTOCOL,
            "options": list(OPTIONS),
            "model": name,
            "models": list(self.engines),
            "family": config.kind,
            "robot": type(robot).__name__,
            "cameras": list(robot.cameras),
            "optional_cameras": list(robot.optional_cameras),
            "state_dim": robot.state_dim,
            "action_dim": robot.action_dim,
            "action_horizon": config.action_horizon,
            "noise": None if config.family.action_tokens else [config.action_horizon, config.action_dim],
            "subtasks": policy.assets.subtasks,
            "rtc": None if policy.rtc is None else policy.rtc.method,
            "image_resolution": list(config.image_resolution),
            "max_message": self.limits.max_message,
        } | self._metadata

    def record(self, robot: Robot, observation: dict[str, Any], options: dict[str, Any], answer: Answer) -> None:
        """Give an answered request to the recorder, if there is one."""
        if self.recorder is not None:
            self.recorder.add(robot, self.engines[robot.model].policy, observation, options, answer)

    async def drain(self) -> None:
        """Take no new requests, answer those that run, and close all connections."""
        self.draining.set()
        if self.watch.robots:
            self._empty.clear()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._empty.wait(), self.limits.drain)

    @contextlib.asynccontextmanager
    async def _lifespan(self, app: Starlette) -> AsyncIterator[None]:
        yield
        for engine in self.engines.values():
            await asyncio.to_thread(engine.close)
        if self.recorder is not None:
            await asyncio.to_thread(self.recorder.close)

    async def _robot(self, websocket: WebSocket) -> None:
        name = websocket.path_params.get("name") or next(iter(self.engines))
        address = "" if websocket.client is None else websocket.client.host
        refused, key = self._refuse(websocket)
        if refused is None and name not in self.engines:
            refused = PlainTextResponse(f"there is no policy of this name; there are {', '.join(self.engines)}\n", 404)
        if refused is None and self._open[key] >= self.limits.connections:
            refused = PlainTextResponse(f"more than {self.limits.connections} connections with this key\n", 429)
        if refused is None and self.draining.is_set():
            refused = PlainTextResponse("the server is shutting down\n", 503)
        if refused is not None:
            model = name if name in self.engines else ""
            self.watch.failed(None, model, str(refused.status_code), bytes(refused.body).decode().strip(), address)
            await websocket.send_denial_response(refused)
            return
        robot, code = self.watch.connected(name, key, address), 1011
        self._open[key] += 1
        try:
            code = await Connection(self, websocket, self.engines[name], robot, self._rates[key]).run()
        finally:
            self._open[key] -= 1
            self.watch.disconnected(robot, code)
            if self.recorder is not None:
                self.recorder.end(robot)
            if not self.watch.robots:
                self._empty.set()

    def _refuse(self, connection: HTTPConnection) -> tuple[Response | None, str]:
        """Why a connection is refused, or None; and the name of its key."""
        origin, host = connection.headers.get("origin"), connection.headers.get("host", "")
        if origin is not None and urlsplit(origin).netloc != host:  # a browser, on a page of somebody else
            return PlainTextResponse("requests of other web pages are refused\n", 403), ""
        key = self.keys.name(connection.headers.get("authorization", ""))
        if key is None:
            challenge = {"www-authenticate": 'Basic realm="pi0", charset="UTF-8"'}
            text = "this server needs an API key: Authorization: Api-Key KEY\n"
            return PlainTextResponse(text, 401, challenge), ""
        return None, key

    async def _health(self, request: Request) -> Response:
        """For load balancers, without a key; 503 where the server ends."""
        if self.draining.is_set():
            return PlainTextResponse("shutting down\n", 503)
        return PlainTextResponse("OK\n")

    def _with_key(self, answer: Callable[[Request], Awaitable[Response]]) -> Callable[[Request], Awaitable[Response]]:
        """`answer`, for those who have a key."""

        async def route(request: Request) -> Response:
            refused, _ = self._refuse(request)
            return await answer(request) if refused is None else refused

        return route

    async def _metrics(self, request: Request) -> Response:
        return Response(self.watch.metrics(), media_type="text/plain; version=0.0.4; charset=utf-8")

    async def _state(self, request: Request) -> Response:
        state = await asyncio.to_thread(self.watch.state)
        return JSONResponse(state, headers={"cache-control": "no-store"})

    async def _page(self, request: Request) -> Response:
        nonce = secrets.token_urlsafe(16)
        policy = f"default-src 'none'; img-src data:; connect-src 'self'; script-src 'nonce-{nonce}'"
        headers = {
            "content-security-policy": f"{policy}; style-src 'nonce-{nonce}'; frame-ancestors 'none'",
            "cache-control": "no-store",
        }
        return HTMLResponse(PAGE.read_text().replace("{nonce}", nonce), headers=headers)


class WebSocketProtocol(WebSocketsSansIOProtocol):
    """uvicorn's, which reads on after a frame that it refuses, while more comes, for at most LINGER seconds.

    A socket that is closed before all is read is reset, and the client may not see the code of the close frame.
    """

    _refused = False
    _last = _end = 0.0  # when something came last, and when the connection ends in any case

    def handle_parser_exception(self) -> None:
        """Close with the code of a frame that is wrong, such as 1009 for one that is too large."""
        assert self.conn.close_sent is not None
        self._refused = self.close_sent = True
        event = {"type": "websocket.disconnect", "code": self.conn.close_sent.code, "reason": ""}
        self.queue.put_nowait(event)  # type: ignore[arg-type]
        self.transport.write(b"".join(self.conn.data_to_send()))
        self._last, self._end = self.loop.time(), self.loop.time() + LINGER
        self._linger()
        self.transport.resume_reading()

    def _linger(self) -> None:
        now = self.loop.time()
        if now > min(self._last + QUIET, self._end):
            self.transport.close()
        else:  # uvicorn leaves a transport with a timer to the timer
            self.close_timer = self.loop.call_later(QUIET / 2, self._linger)

    def data_received(self, data: bytes) -> None:
        """Read a part of what the client sends."""
        self._last = self.loop.time()
        if not self._refused:
            super().data_received(data)

    def eof_received(self) -> None:
        """The client has sent all."""
        if self._refused:
            self.transport.close()


class Uvicorn(uvicorn.Server):
    """uvicorn, whose signals drain the policy server first; a second one ends it at once."""

    def __init__(self, config: uvicorn.Config, server: PolicyServer):
        super().__init__(config)
        self.server = server

    def handle_exit(self, sig: int, frame: Any) -> None:
        """SIGTERM and SIGINT: answer what runs, then exit with 0. SIGINT a second time: exit."""
        if self._loop is None or self._draining is not None:
            self.should_exit = True
            self.force_exit = sig == signal.SIGINT
            return
        self._draining = sig
        self._loop.call_soon_threadsafe(lambda: asyncio.ensure_future(self.drain()))

    async def drain(self) -> None:
        """Drain, then exit."""
        logger.info("shutting down: answering what runs")
        await self.server.drain()
        self.should_exit = True

    async def startup(self, sockets: Any = None) -> None:
        """Start to listen."""
        self._loop = asyncio.get_running_loop()
        await super().startup(sockets)

    _loop: asyncio.AbstractEventLoop | None = None
    _draining: int | None = None


def check_address(host: str, keys: Keys | None, certificate: Path | None, certificate_key: Path | None) -> None:
    """Raise ValueError for an address that others can reach without keys, and files of TLS that are not there."""
    if host not in LOOPBACK and not keys:
        raise ValueError(
            f"{host} can be reached from other machines: name a file of API keys (--keys), or serve at 127.0.0.1"
        )
    if certificate_key is not None and certificate is None:
        raise ValueError("a certificate's key needs the certificate")
    for file in (certificate, certificate_key):
        if file is not None and not file.is_file():
            raise ValueError(f"{file} is not a file")


def make_uvicorn(
    server: PolicyServer,
    host: str = "127.0.0.1",
    port: int = 8000,
    *,
    certificate: Path | None = None,
    certificate_key: Path | None = None,
) -> Uvicorn:
    """The server of an address; `run()` serves until SIGTERM. With `certificate`, a PEM file, by TLS.

    Raises as `check_address`.
    """
    check_address(host, server.keys, certificate, certificate_key)
    config = uvicorn.Config(
        server.app,
        host=host,
        port=port,
        ws=WebSocketProtocol,
        ws_max_size=server.limits.max_message,
        ws_per_message_deflate=False,
        ws_ping_interval=20,
        ws_ping_timeout=60,
        ssl_certfile=certificate,
        ssl_keyfile=certificate_key,
        access_log=False,
        log_config=None,  # logging is the program's own: uvicorn's config closes the handlers of other libraries
        log_level="warning",
        server_header=False,
        timeout_graceful_shutdown=5,
    )
    logging.getLogger("uvicorn.error").addFilter(_is_no_refusal)
    return Uvicorn(config, server)


def _is_no_refusal(record: logging.LogRecord) -> bool:
    """False for what uvicorn logs as an error after every refused handshake, which the access log has."""
    return record.getMessage() != "ASGI callable returned without completing handshake."
