"""Clients that send garbage, die, or are there when the server is told to end: others lose nothing."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import msgpack
import numpy as np
import pytest
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import connect

from pi0_serve import Client, PolicyError, protocol
from pi0_serve.protocol import FrameError, RequestError
from tests.bucket import free_port
from tests.pi0_serve.serving import Slow, observation, serve

SCRIPT = """
import sys
sys.path.insert(0, ".")
from pi0_serve import Engine, PolicyServer
from pi0_serve.server import make_uvicorn
from tests.pi0_serve.serving import Slow
make_uvicorn(PolicyServer({"policy": Engine(Slow(float(sys.argv[2])))}), port=int(sys.argv[1])).run()
"""
ROOT = Path(__file__).parents[2]


@contextlib.contextmanager
def process(seconds: float) -> Iterator[tuple[subprocess.Popen[bytes], int]]:
    """A server in a process of its own, whose batches take so long."""
    port = free_port()
    with subprocess.Popen([sys.executable, "-c", SCRIPT, str(port), str(seconds)], cwd=ROOT) as running:
        try:
            end = time.monotonic() + 60
            while time.monotonic() < end:
                with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
                    break
                time.sleep(0.05)
            yield running, port
        finally:
            if running.poll() is None:
                running.kill()


def memory(pid: int) -> float:
    """Resident MB of a process."""
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


def array(dtype: object = "<f4", shape: object = (2,), data: object = b"\0" * 8, **more: object) -> dict[bytes, object]:
    return {b"__ndarray__": True, b"data": data, b"dtype": dtype, b"shape": shape} | more


def nested(depth: int) -> bytes:
    return b"\x91" * depth + b"\x90"


def malformed(rng: random.Random, good: bytes) -> bytes | str:
    """A frame that is wrong in one of many ways, or a good one with random damage."""
    huge = rng.choice([2**31, 2**40, 2**62, -1, 10**6])
    dtypes = ["O", "<c8", "V16", "<M8[s]", "i4,i4", "f4" * 99, "<f99999999", "<U999999999", 7, None, "|S0", "object"]
    kinds = [
        lambda: good[: rng.randrange(len(good))],
        lambda: rng.randbytes(rng.randrange(200)),
        lambda: bytes(b ^ (rng.random() < 0.01) * rng.randrange(256) for b in good[:3000]) + good[3000:],
        lambda: protocol.pack({"state": array(shape=(huge,))}),
        lambda: protocol.pack({"state": array(shape=(0, 2**39, 2**39), data=b"")}),
        lambda: protocol.pack({"state": array(dtype=rng.choice(dtypes))}),
        lambda: protocol.pack({"state": array(shape=rng.choice([7, None, "x", (1.5,), [[2]], [1] * 99]))}),
        lambda: protocol.pack({"state": array(data=rng.choice([b"", "text", None, 3, [1] * 50]))}),
        lambda: protocol.pack(
            {"state": {b"__npgeneric__": True, b"data": rng.choice([1, "x", None]), b"dtype": "<i1"}}
        ),
        lambda: nested(rng.choice([20, 500, 1020, 5000, 100_000])),
        lambda: b"\xdd\xff\xff\xff\xff",
        lambda: b"\xdf\xff\xff\xff\xff" + b"\x01" * 20,
        lambda: b"\xc6\xff\xff\xff\xff" + b"x" * 20,
        lambda: b"\xdc\x10\x00" * 900,
        lambda: msgpack.packb([{}] * 4000) * 2,
        lambda: msgpack.packb([[{}] * 4000] * 10),
        lambda: msgpack.packb({"x": msgpack.ExtType(5, b"abc")}),
        lambda: msgpack.packb({"x": msgpack.Timestamp(1)}),
        lambda: msgpack.packb({1: 2, b"x": 3}),
        lambda: protocol.pack(observation() | {"prompt": "\ud800x".encode("utf-8", "surrogatepass")}),
        lambda: protocol.pack(observation() | {"corner": np.zeros((1, 3000, 3), np.uint8)[:, : rng.randrange(3000)]}),
        lambda: protocol.pack(observation() | {"noise": np.full((5, 7), np.inf, np.float32)}),
        lambda: protocol.pack(observation() | {"request_id": "x" * 1000}),
        lambda: protocol.pack({"a": {"b": {"c": observation()}}}),
        lambda: "text " * rng.randrange(10),
    ]
    return rng.choice(kinds)()


def test_every_malformed_message_is_refused_by_its_own_errors():
    """2,000 of them without a server: FrameError or RequestError, or a request for the robot's adapter to judge."""
    rng, good = random.Random(0), protocol.pack(observation())
    for _ in range(2000):
        frame = malformed(rng, good)
        if isinstance(frame, bytes):
            with contextlib.suppress(FrameError, RequestError):
                protocol.request(frame)


@pytest.mark.parametrize(
    ("frame", "named"),
    [
        (protocol.pack({"state": array(shape=(2**40,))}), "shape"),
        (protocol.pack({"state": array(shape=(10**6,))}), "4000000 bytes; the message has 8"),
        (protocol.pack({"state": array(dtype="O")}), "dtype"),
        (protocol.pack({"state": array(dtype="<c8")}), "dtype"),
        (protocol.pack({"state": array(shape=(8, 8, 3), dtype="|u1", data=bytes(192))}), "more than 9 pixels"),
        (nested(20), "nested deeper"),
        (nested(100_000), "not msgpack"),
        (msgpack.packb([[0] * 4000] * 10), "more than 20000 values"),
        (msgpack.packb({"x": msgpack.Timestamp(1)}), "max_ext_len"),
    ],
)
def test_what_is_refused_says_why(frame: bytes, named: str):
    with pytest.raises(FrameError, match=named):
        protocol.unpack(frame, max_pixels=9)


def test_arrays_come_back_as_they_were():
    rng = np.random.default_rng(0)
    shapes, dtypes = [(), (0,), (3,), (2, 0, 4), (2, 3, 4)], ["f4", ">f8", "i2", "?"]
    values = [np.asarray(rng.normal(size=shape)).astype(dtype) for shape in shapes for dtype in dtypes]
    values += [np.float32(1.5), np.int64(-3), np.bool_(True), np.array("text"), np.array([b"ab", b"c"])]
    for value, back in zip(values, protocol.unpack(protocol.pack(values)), strict=True):
        np.testing.assert_array_equal(value, back)
        assert value.dtype == back.dtype and np.shape(value) == np.shape(back)
    for wrong in (np.array([None]), np.zeros(2, complex), np.zeros(2, "i4,i4"), object()):
        with pytest.raises(ValueError, match="not sent"):
            protocol.pack(wrong)


def good_clients(port: int, stop: threading.Event, wrong: list[str], count: int) -> list[threading.Thread]:
    """Robots whose every answer is checked."""
    alone = Slow()
    expected = [alone.infer(observation(i), alone.noise(1, seed=i)[0])["actions"] for i in range(10)]

    def ask(number: int) -> None:
        with Client(port=port) as client:
            step = number
            while not stop.is_set():
                try:
                    answer = client.infer(observation(step % 10), seed=step % 10)["actions"]
                    if not np.array_equal(answer, expected[step % 10]):
                        wrong.append(f"answer {step}")
                except Exception as error:
                    wrong.append(repr(error))
                step += 1
                time.sleep(0.02)

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(count)]
    for thread in threads:
        thread.start()
    return threads


@pytest.mark.parametrize("count", [300, pytest.param(10_000, marks=pytest.mark.slow)])
def test_malformed_frames_do_not_harm_others(count: int):
    rng, good = random.Random(1), protocol.pack(observation())
    with process(0.002) as (running, port):
        stop, wrong = threading.Event(), list[str]()
        threads = good_clients(port, stop, wrong, 3)
        address, websocket, grown = f"ws://127.0.0.1:{port}", None, 0.0
        for i in range(count):
            if i == count // 10:
                grown = memory(running.pid)  # after what is allocated once
            if websocket is None:
                websocket = connect(address, compression=None, max_size=None).__enter__()
                websocket.recv()
            try:
                websocket.send(malformed(rng, good))
                answer = websocket.recv(timeout=20)
                assert not isinstance(answer, str) or ("\n" not in answer and "Traceback" not in answer), answer
                assert not isinstance(answer, str) or "internal" not in answer, answer
            except ConnectionClosed as closed:
                assert closed.rcvd is not None and closed.rcvd.code in (1003, 1007, 1009)
                websocket = None
        grown = memory(running.pid) - grown
        stop.set()
        for thread in threads:
            thread.join()
        assert running.poll() is None and not wrong
        assert grown < 50, f"{grown} MB"
        print(f"{count} frames, {grown:.1f} MB grown")


@pytest.mark.parametrize("count", [10, pytest.param(200, marks=pytest.mark.slow)])
def test_clients_that_die_in_a_request_do_not_harm_others(count: int):
    message = protocol.pack(observation())
    with process(0.02) as (running, port):
        stop, wrong = threading.Event(), list[str]()
        threads = good_clients(port, stop, wrong, 3)
        for i in range(count):
            with connect(f"ws://127.0.0.1:{port}", compression=None) as websocket:
                websocket.recv()
                if i % 2:
                    websocket.send(message)  # whole, and gone while it is answered
                else:  # the first half of a frame
                    head = b"\x82\xff" + len(message).to_bytes(8, "big") + b"\0\0\0\0"
                    websocket.socket.sendall(head + message[: len(message) // 2])
                websocket.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
                websocket.socket.shutdown(socket.SHUT_RDWR)
        stop.set()
        for thread in threads:
            thread.join()
        assert running.poll() is None and not wrong
        with Client(port=port) as client:
            assert client.infer(observation())["actions"].shape == (5, 4)


@pytest.mark.parametrize("count", [2, pytest.param(20, marks=pytest.mark.slow)])
def test_sigterm_answers_what_was_accepted(count: int):
    """Every request is answered, or its robot is told: by a line, or by a closed connection."""
    for _ in range(count):
        with process(0.05) as (running, port):
            outcomes, started = list[str](), threading.Barrier(7)

            def ask(port: int = port, outcomes: list[str] = outcomes, started: threading.Barrier = started) -> None:
                with Client(port=port, connect_timeout=30) as client:
                    client.infer(observation())
                    client.connect_timeout, client.timeout = 0.5, 5
                    started.wait(60)
                    while True:
                        try:
                            client.infer(observation())
                            outcomes.append("answered")
                        except (PolicyError, ConnectionError) as error:
                            outcomes.append(f"told: {error}")
                            return
                        except TimeoutError:
                            outcomes.append("lost")
                            return

            threads = [threading.Thread(target=ask) for _ in range(6)]
            for thread in threads:
                thread.start()
            started.wait(60)
            time.sleep(random.uniform(0.1, 0.4))
            running.send_signal(signal.SIGTERM)
            assert running.wait(20) == 0
            for thread in threads:
                thread.join(20)
            assert sum(outcome.startswith("told") for outcome in outcomes) == 6
            assert "lost" not in outcomes and "answered" in outcomes


def test_a_client_comes_back_and_discards_late_answers():
    """Across a restart of the server, and after a timeout."""
    with serve(Slow(0.3)) as found:
        client = Client(port=found.port, timeout=5)
        with pytest.raises(TimeoutError):
            client.infer(observation(1), seed=1, timeout=0.05)
        answer = client.infer(observation(2), seed=2)["actions"]  # the late one of 1 is discarded
        alone = Slow()
        np.testing.assert_array_equal(answer, alone.infer(observation(2), alone.noise(1, seed=2)[0])["actions"])
        with pytest.raises(PolicyError, match="state"):
            client.infer(observation() | {"state": np.zeros(1, np.float32)})
        assert client.infer(observation())["actions"].shape == (5, 4)
        client.close()
        assert client.infer(observation())["actions"].shape == (5, 4)
        client.close()
    with pytest.raises(ConnectionError, match="no server at"):
        Client(port=found.port, connect_timeout=0.3)
