from __future__ import annotations

import base64
import threading
import time
import urllib.error
import urllib.request

import numpy as np
import pytest
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.sync.client import connect

from pi0_serve import Client, Keys, Limits, PolicyError, protocol
from tests.pi0_serve.serving import Slow, observation, serve

KEY = "0123456789abcdef"


@pytest.fixture(scope="module")
def served():
    with serve(Slow(), Slow(), limits=Limits(max_message=1 << 20)) as found:
        yield found


def raw(port: int, path: str = "", **options):
    address = f"ws://127.0.0.1:{port}/{path}"
    socket = connect(address, compression=None, max_size=None, **options).__enter__()
    return socket, protocol.unpack(socket.recv())


def get(port: int, path: str, **headers: str) -> tuple[int, str]:
    request = urllib.request.Request(f"http://127.0.0.1:{port}{path}", headers=headers)
    try:
        with urllib.request.urlopen(request, timeout=10) as response:
            return response.status, response.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def test_a_plain_client(served):
    """As openpi's: metadata, then the observation, and nothing of ours in the answer."""
    socket, metadata = raw(served.port)
    assert metadata["robot"] == "MetaWorld" and metadata["cameras"] == ["corner", "wrist"]
    assert metadata["action_horizon"] == 5 and metadata["models"] == ["policy", "policy1"]
    for i in range(2):
        socket.send(protocol.pack(observation()))
        answer = protocol.unpack(socket.recv())
        assert set(answer) == {"actions", "policy_timing", "server_timing"}
        assert answer["actions"].shape == (5, 4) and answer["actions"].dtype == np.float32
        assert ("prev_total_ms" in answer["server_timing"]) == bool(i)
        assert answer["server_timing"]["infer_ms"] >= answer["policy_timing"]["infer_ms"] >= 0
        arrays = [key for key, value in answer.items() if isinstance(value, np.ndarray)]
        assert arrays == ["actions"]
    socket.close()


def test_an_answer_is_the_policys(served):
    noise = np.random.default_rng(3).normal(size=(5, 7)).astype(np.float32)
    with Client(port=served.port) as client:
        given, seeded = client.infer(observation(1), noise=noise), client.infer(observation(1), seed=3)
    expected = Slow().infer(observation(1), noise)["actions"]
    np.testing.assert_array_equal(given["actions"], expected)
    drawn = Slow().noise(1, seed=3)[0]
    np.testing.assert_array_equal(seeded["actions"], Slow().infer(observation(1), drawn)["actions"])


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"state": np.full(4, np.nan, np.float32)}, "state is nan"),
        ({"state": np.zeros(3, np.float32)}, "state is [3]; expected [4]"),
        ({"corner": None}, "corner"),
        ({"corner": np.zeros((4, 4), np.uint8)}, "an image of shape [4, 4]"),
        ({"prompt": 7}, "prompt is 7; expected text"),
        ({"seed": -1}, "seed is -1"),
        ({"seed": "x"}, "seed is 'x'; expected int"),
        ({"protocol": 2}, "protocol is 2; this server has 1"),
        ({"noise": np.zeros((2, 2), np.float32)}, "noise: shape"),
        ({"subtask": "reach"}, "this policy writes no subtasks"),
    ],
)
def test_a_bad_request_is_one_line_and_the_connection_goes_on(change, named, served):
    socket, _ = raw(served.port)
    socket.send(protocol.pack(observation() | change | {"request_id": 5}))
    error = socket.recv()
    assert isinstance(error, str) and named in error and "\n" not in error and "Traceback" not in error
    socket.send(protocol.pack(observation()))
    assert "actions" in protocol.unpack(socket.recv())
    socket.close()


def test_a_wrong_camera_is_named(served):
    socket, _ = raw(served.port)
    wrong = observation()
    wrong["front"] = wrong.pop("corner")
    socket.send(protocol.pack(wrong))
    assert "base_0_rgb" in (error := socket.recv()) and "front" in error
    socket.close()


@pytest.mark.parametrize(
    ("frame", "code"), [("text", 1003), (b"\xc1", 1007), (b"\x81\xa1a", 1007), (bytes(2 << 20), 1009)]
)
def test_a_bad_frame_ends_the_connection(frame, code, served):
    socket, _ = raw(served.port)
    with pytest.raises(ConnectionClosed) as closed:
        socket.send(frame)
        for _ in range(3):
            assert isinstance(socket.recv(), str)
    assert closed.value.rcvd.code == code


def test_policies_by_name(served):
    assert raw(served.port, "policy1")[1]["model"] == "policy1"
    with pytest.raises(InvalidStatus) as refused:
        raw(served.port, "other")
    assert refused.value.response.status_code == 404


def test_health_metrics_and_state(served):
    assert get(served.port, "/healthz") == (200, "OK\n")
    with Client(port=served.port) as client:
        client.infer(observation())
        state = get(served.port, "/state")[1]
        assert '"robot' in state and "data:image/png" in state
        status, text = get(served.port, "/metrics")
    assert status == 200
    for name in (
        'pi0_request_seconds_count{model="policy",stage="model"}',
        "pi0_batch_size",
        "pi0_errors",
        "pi0_robots",
    ):
        assert name in text


def test_keys():
    keys = Keys.parse(f"lab {KEY} # the lab's\nother sha256:{'0' * 64}", "keys")
    with serve(Slow(), keys=keys, limits=Limits(connections=1)) as found:
        for header in ({}, {"Authorization": "Api-Key wrong"}, {"Authorization": "Basic !"}):
            with pytest.raises(InvalidStatus) as refused:
                raw(found.port, additional_headers=header)
            assert refused.value.response.status_code == 401
        assert get(found.port, "/")[0] == get(found.port, "/metrics")[0] == get(found.port, "/state")[0] == 401
        assert get(found.port, "/healthz")[0] == 200
        basic = base64.b64encode(f"me:{KEY}".encode()).decode()
        assert get(found.port, "/", Authorization=f"Basic {basic}")[0] == 200
        with Client(port=found.port, api_key=KEY) as client:
            assert client.infer(observation())["actions"].shape == (5, 4)
            with pytest.raises(InvalidStatus) as refused:
                raw(found.port, additional_headers={"Authorization": f"Api-Key {KEY}"})
            assert refused.value.response.status_code == 429
        with pytest.raises(PolicyError, match="401 this server needs an API key"):
            Client(port=found.port)


@pytest.mark.parametrize("text", ["", "lab", "lab short", f"lab {KEY}\nlab {KEY}1", "lab sha256:12"])
def test_wrong_files_of_keys(text: str):
    with pytest.raises(ValueError, match="keys") as error:
        Keys.parse(text, "keys")
    assert KEY not in str(error.value)


def test_pages_of_others_are_refused(served):
    with pytest.raises(InvalidStatus) as refused:
        raw(served.port, origin="https://example.org")
    assert refused.value.response.status_code == 403
    assert raw(served.port, origin=f"http://127.0.0.1:{served.port}")[1]["model"] == "policy"


def test_rate_and_idle_time():
    with serve(Slow(), limits=Limits(rate=2, idle=0.3)) as found:
        socket, _ = raw(found.port)
        answers = []
        for _ in range(4):
            socket.send(protocol.pack(observation()))
            answers.append(socket.recv())
        assert sum(isinstance(answer, str) and "requests per second" in answer for answer in answers) == 2
        with pytest.raises(ConnectionClosed) as closed:
            socket.recv(timeout=5)
        assert closed.value.rcvd.code == 1000


def test_a_robot_that_asks_ahead_does_not_hold_up_another():
    """50 requests are in one robot's socket: another waits for at most the one that runs and one more."""
    policy = Slow(0.05)
    with serve(policy, engine={"sizes": (1,), "wait": 0}) as found:
        greedy, _ = raw(found.port)
        for _ in range(50):
            greedy.send(protocol.pack(observation()))
        time.sleep(0.2)
        with Client(port=found.port) as client:
            before = len(policy.batches)
            client.infer(observation())
            assert len(policy.batches) - before <= 4
        for _ in range(50):
            assert isinstance(greedy.recv(timeout=10), bytes)
        greedy.close()


def test_requests_join_into_batches_and_health_answers_meanwhile():

    policy = Slow(0.3)
    with serve(policy, engine={"wait": 0.05}) as found:
        clients = [Client(port=found.port) for _ in range(6)]
        answers = [None] * 6

        def ask(i: int) -> None:
            answers[i] = clients[i].infer(observation(i), seed=i)

        threads = [threading.Thread(target=ask, args=(i,)) for i in range(6)]
        for thread in threads:
            thread.start()
        time.sleep(0.15)
        start = time.perf_counter()
        assert get(found.port, "/healthz")[0] == 200
        assert time.perf_counter() - start < 0.15  # of the 0.3 s that the batch takes
        for thread in threads:
            thread.join()
    assert max(policy.batches) >= 4 and set(policy.batches) <= {1, 2, 4, 8}
    alone = Slow()
    for i, answer in enumerate(answers):
        expected = alone.infer(observation(i), alone.noise(1, seed=i)[0])["actions"]
        np.testing.assert_array_equal(answer["actions"], expected)
