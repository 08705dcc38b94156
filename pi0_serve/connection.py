"""`Connection`, one robot's websocket: reads requests, has them answered, and says in one line what is wrong."""

from __future__ import annotations

import asyncio
import logging
import time
from concurrent.futures import CancelledError
from typing import Any, Protocol

from starlette.websockets import WebSocket, WebSocketDisconnect

from pi0_serve import protocol
from pi0_serve.engine import Answer, Engine, InferenceError, Request, Session
from pi0_serve.keys import Rate
from pi0_serve.limits import Limits
from pi0_serve.protocol import FrameError
from pi0_serve.watch import Robot, Watch

logger = logging.getLogger(__name__)

# Codes of RFC 6455, with which a connection is closed.
NORMAL, GOING_AWAY, UNSUPPORTED, INVALID, POLICY = 1000, 1001, 1003, 1007, 1008


class Host(Protocol):
    """What a connection needs of its server."""

    limits: Limits
    watch: Watch
    draining: asyncio.Event

    def metadata(self, name: str) -> dict[str, Any]:
        """What a robot is told first."""

    def record(self, robot: Robot, observation: dict[str, Any], options: dict[str, Any], answer: Answer) -> None:
        """Record an answered request."""


class Connection:
    """One robot, from its first frame to its last; `run` returns when it is gone."""

    def __init__(self, server: Host, websocket: WebSocket, engine: Engine, robot: Robot, rate: Rate):
        self.server, self.websocket, self.engine, self.robot, self.rate = server, websocket, engine, robot, rate
        self.session = Session()
        self._incoming: asyncio.Future[Any]
        self._previous: float | None = None  # seconds of the last request, with sending

    async def run(self) -> int:
        """Serve until the connection is closed; returns the code."""
        await self.websocket.accept()
        await self.websocket.send_bytes(protocol.pack(self.server.metadata(self.robot.model)))
        self._incoming = asyncio.ensure_future(self.websocket.receive())
        draining = asyncio.ensure_future(self.server.draining.wait())
        try:
            while True:
                idle = self.server.limits.idle
                await asyncio.wait({self._incoming, draining}, timeout=idle, return_when=asyncio.FIRST_COMPLETED)
                if not self._incoming.done():
                    if draining.done():
                        return await self._close(GOING_AWAY, "the server is shutting down")
                    return await self._close(NORMAL, f"no request for {idle:g} s")
                event, started = self._incoming.result(), time.perf_counter()
                if event["type"] == "websocket.disconnect":
                    return event.get("code") or NORMAL
                self._incoming = asyncio.ensure_future(self.websocket.receive())
                if draining.done():
                    await self._fail("draining", "the server is shutting down")
                    return await self._close(GOING_AWAY, "the server is shutting down")
                if event.get("bytes") is None:
                    await self._fail("frame", "a request is a binary frame of msgpack; got text")
                    return await self._close(UNSUPPORTED, "text is not supported")
                code = await self._serve(event["bytes"], started)
                if code is not None:
                    return code
        except (WebSocketDisconnect, OSError, RuntimeError) as error:  # gone while we were sending
            if isinstance(error, RuntimeError) and not any(
                what in str(error) for what in ("websocket", "close message")
            ):
                raise
            return getattr(error, "code", 1006)
        finally:
            draining.cancel()
            self._incoming.cancel()

    async def _serve(self, message: bytes, started: float) -> int | None:
        """Answer one request, or say what is wrong with it; returns the code where the connection ends."""
        observation: dict[str, Any] = {}
        options: dict[str, Any] = {}

        def submit() -> Request:
            found = protocol.request(message, self.server.limits.max_pixels)
            observation.update(found[0])
            options.update(found[1])
            return self.engine.submit(self.session, observation, options)

        try:
            if not self.rate.take():
                limit = f"more than {self.rate.rate:g} requests per second with this key; wait, and try again"
                await self._fail("rate", limit)
                return None
            request = await asyncio.get_running_loop().run_in_executor(self.engine.pool, submit)
            answer = await self._wait(request)
        except FrameError as error:
            await self._fail("frame", protocol.one_line(error))
            return await self._close(INVALID, "the message cannot be read")
        except ValueError as error:
            await self._fail("request", protocol.one_line(error) + _name(options))
            return None
        except CancelledError:
            return None  # the robot is gone: `run` finds out
        except Exception as error:
            logger.exception("request of robot %d", self.robot.number)
            known = str(error) if isinstance(error, InferenceError) else "internal error"
            await self._fail("internal", known + _name(options))
            return None
        await self._send(answer, options, started)
        self.server.record(self.robot, observation, options, answer)
        return None

    async def _wait(self, request: Request) -> Answer:
        """The answer. A request whose robot is gone before it runs is left out."""
        answer = asyncio.wrap_future(request.answer)
        await asyncio.wait({answer, self._incoming}, return_when=asyncio.FIRST_COMPLETED)
        gone = self._incoming.done() and self._incoming.result()["type"] == "websocket.disconnect"
        if gone and not answer.done() and request.answer.cancel():
            raise CancelledError
        return await answer

    async def _send(self, answer: Answer, options: dict[str, Any], started: float) -> None:
        reply: dict[str, Any] = {"actions": answer.actions}
        if "decoded" in answer.outputs:
            reply["decoded"] = bool(answer.outputs["decoded"])
        if "subtask" in answer.outputs:
            reply["subtask"] = answer.outputs["subtask"]
        if "request_id" in options:
            reply["request_id"] = options["request_id"]
        infer = 1e3 * (time.perf_counter() - started)
        reply["policy_timing"] = {"infer_ms": 1e3 * answer.seconds["model"]}
        reply["server_timing"] = {"infer_ms": infer, "queue_ms": 1e3 * answer.seconds["queue"], "batch": answer.batch}
        if self._previous is not None:
            reply["server_timing"]["prev_total_ms"] = 1e3 * self._previous
        await self.websocket.send_bytes(protocol.pack(reply))
        self._previous = time.perf_counter() - started
        self.server.watch.answered(self.robot, answer, self._previous)

    async def _fail(self, kind: str, error: str) -> None:
        self.server.watch.failed(self.robot, self.robot.model, kind, error)
        await self.websocket.send_text(error)

    async def _close(self, code: int, reason: str) -> int:
        await self.websocket.close(code, reason)
        return code


def _name(options: dict[str, Any]) -> str:
    """What an error has at its end, so that a client knows which request it is of."""
    return f" (request_id {options['request_id']})" if "request_id" in options else ""
