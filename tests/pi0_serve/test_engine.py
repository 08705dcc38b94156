"""Real models behind a server: π0.5's subtasks of each connection, and batches that give what one alone gives."""

from __future__ import annotations

import dataclasses
import threading
from typing import Any

import numpy as np
import pytest

import pi0_torch
from pi0.variants import get_variant
from pi0_serve import Client, Engine, PolicyError
from pi0_serve.engine import Session
from pi0_torch.loading import load_model
from tests.pi0_eval.parity.test_compare import random_checkpoint
from tests.pi0_serve.serving import assets, observation, serve

SIZES: dict[str, Any] = {"max_token_len": 96, "max_decoding_steps": 6}


@pytest.fixture(scope="module")
def pi05() -> pi0_torch.Policy:
    config = get_variant("tiny_pi05", **SIZES)
    model = load_model(random_checkpoint(config))
    return pi0_torch.Policy(model, dataclasses.replace(assets(), model=config, subtasks=True))


def test_each_connection_keeps_its_own_subtask(pi05):
    """A given subtask is kept by the connection that gave it, and forgotten at `reset`."""
    with (
        serve(pi05, engine={"subtask_every": 3}) as found,
        Client(port=found.port, timeout=30) as first,
        Client(port=found.port, timeout=30) as second,
    ):
        assert first.metadata["subtasks"]
        given = first.infer(observation(), subtask="open it", seed=0)
        assert given["subtask"] == "open it"
        own = second.infer(observation(), seed=0)["subtask"]
        kept = first.infer(observation(), seed=0)
        assert kept["subtask"] == "open it" != own
        np.testing.assert_array_equal(kept["actions"], given["actions"])
        assert second.infer(observation(), seed=0)["subtask"] == own
        first.reset()
        assert first.infer(observation(), seed=0)["subtask"] == own


def test_batches_give_what_one_alone_gives(pi05):
    """To 3e-6, relative L2, float32: batches sum in another order. Subtasks given, predicted and kept together."""
    engine = Engine(pi05, sizes=(1, 4), wait=0.2)
    options = [{"seed": i} | ({"subtask": "open it"} if i % 2 else {}) for i in range(6)]
    requests: list[Any] = [None] * 6

    def ask(i: int) -> None:
        requests[i] = engine.pool.submit(engine.submit, Session(), observation(i), options[i]).result()

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    together = [request.answer.result(30) for request in requests]
    assert max(answer.batch for answer in together) == 3
    alone = [engine.submit(Session(), observation(i), options[i]).answer.result(30) for i in range(6)]
    for a, b in zip(together, alone, strict=True):
        assert a.outputs["subtask"] == b.outputs["subtask"]
        assert np.linalg.norm(a.actions - b.actions) <= 3e-6 * np.linalg.norm(b.actions)
    engine.close()


def test_a_cancelled_request_is_left_out():
    from tests.pi0_serve.serving import Slow

    policy = Slow(0.2)
    engine = Engine(policy, sizes=(1,), wait=0)
    requests = [engine.submit(Session(), observation(i), {}) for i in range(3)]
    assert requests[1].answer.cancel()
    assert requests[2].answer.result(5).batch == 1
    assert len(policy.batches) == 2
    engine.close()


@pytest.fixture(scope="module")
def chunked() -> pi0_torch.Policy:
    config = get_variant("tiny", max_token_len=24)
    model = load_model(random_checkpoint(config))
    return pi0_torch.Policy(model, dataclasses.replace(assets(), model=config), rtc="guided")


def test_served_chunks_go_on_as_local_ones(chunked):
    """With `prev_chunk`, and with the chunk that the server keeps, of which so many actions were `executed`."""
    noise = chunked.noise(1, seed=0)[0]
    first = chunked.infer(observation(0), noise)["actions"]
    rest = {"prev_chunk": first[1:], "delay": 1}
    second = chunked.infer(observation(1) | rest, noise)["actions"]
    assert np.abs(second - chunked.infer(observation(1), noise)["actions"]).max() > 0.01
    with serve(chunked) as found, Client(port=found.port, timeout=30) as client:
        assert client.metadata["rtc"] == "guided"
        np.testing.assert_array_equal(client.infer(observation(0), noise=noise)["actions"], first)
        for previous in (rest, rest, {"prev_chunk": first[1:]}):  # the last delay is kept
            np.testing.assert_array_equal(client.infer(observation(1) | previous, noise=noise)["actions"], second)
        client.infer(observation(0), noise=noise)
        np.testing.assert_array_equal(client.infer(observation(1) | {"executed": 1}, noise=noise)["actions"], second)
        client.reset()
        forgotten = client.infer(observation(1) | {"executed": 1}, noise=noise)["actions"]
        np.testing.assert_array_equal(forgotten, chunked.infer(observation(1), noise)["actions"])
        for wrong, what in (
            ({"prev_chunk": first[:, :2]}, "prev_chunk"),
            ({"prev_chunk": first, "delay": 99}, "delay is 99"),
            ({"prev_chunk": first, "executed": 1}, "executed"),
            ({"executed": -1}, "executed is -1"),
        ):
            with pytest.raises(PolicyError, match=what):
                client.infer(observation(1) | wrong, noise=noise)


def test_rows_with_and_without_a_previous_chunk_are_one_batch(chunked):
    """To 3e-6, relative L2, float32: batches sum in another order."""
    engine = Engine(chunked, sizes=(1, 2), wait=0.2)
    chunk = np.random.default_rng(0).normal(size=(3, chunked.pipeline.robot.action_dim)).astype(np.float32)
    options: list[dict[str, Any]] = [{"seed": 0, "prev_chunk": chunk, "delay": 1}, {"seed": 1}]
    requests = [engine.submit(Session(), observation(i), options[i]) for i in range(2)]
    together = [request.answer.result(30) for request in requests]
    assert {answer.batch for answer in together} == {2}
    alone = [engine.submit(Session(), observation(i), options[i]).answer.result(30) for i in range(2)]
    for a, b in zip(together, alone, strict=True):
        assert np.linalg.norm(a.actions - b.actions) <= 3e-6 * np.linalg.norm(b.actions)
    engine.close()


def test_a_server_without_real_time_chunking_says_so(pi05):
    with serve(pi05) as found, Client(port=found.port, timeout=30) as client:
        for key, value in (("prev_chunk", np.zeros((2, 4), np.float32)), ("executed", 1), ("delay", 1)):
            with pytest.raises(PolicyError, match=f"{key}: this server has no real-time chunking"):
                client.infer(observation() | {key: value})
