from __future__ import annotations

import contextlib
import json
import shutil
import ssl
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from pi0_serve import Client, Engine
from pi0_serve.command import main
from tests.bucket import free_port
from tests.pi0_serve.serving import Slow, observation, serve, write_tiny

ROOT = Path(__file__).parents[2]
KEY = "0123456789abcdef"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("serve") / "checkpoint")


@pytest.fixture(scope="module")
def certificate(tmp_path_factory) -> tuple[Path, Path]:
    if shutil.which("openssl") is None:
        pytest.skip("needs openssl")
    folder = tmp_path_factory.mktemp("tls")
    names = ["-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1"]
    files = ["-keyout", str(folder / "key.pem"), "-out", str(folder / "cert.pem")]
    subprocess.run(["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", *files, *names], check=True)
    return folder / "cert.pem", folder / "key.pem"


@contextlib.contextmanager
def command(*arguments: str) -> Iterator[None]:
    """`pi0-serve` in a process of its own, ended by SIGTERM, which exits with 0."""
    script = "from pi0_serve.command import main; main()"
    line = [sys.executable, "-c", script, *arguments]
    with subprocess.Popen(line, cwd=ROOT) as process:
        try:
            yield
        finally:
            process.terminate()
            assert process.wait(30) == 0


@pytest.mark.parametrize("framework", ["torch", pytest.param("jax", marks=pytest.mark.slow)])
def test_two_policies_with_keys_tls_and_a_recording(framework, checkpoint: Path, certificate, tmp_path: Path):
    import importlib

    (tmp_path / "keys.txt").write_text(f"lab {KEY}\n")
    port, (cert, key) = free_port(), certificate
    options = ["--keys", str(tmp_path / "keys.txt"), "--certificate", str(cert), "--certificate-key", str(key)]
    options += ["--policy", f"other={checkpoint}", "--record", str(tmp_path / "served"), "--batch-sizes", "1", "2"]
    options += ["--framework", framework, "--metadata", '{"reset_pose": [0, 1]}', "--port", str(port)]
    tls = ssl.create_default_context(cafile=cert)
    with command(str(checkpoint), *options, "--access-log", str(tmp_path / "log")):
        with Client("wss://127.0.0.1", port, KEY, tls=tls, timeout=30) as client:
            assert client.metadata["models"] == ["policy", "other"] and client.metadata["reset_pose"] == [0, 1]
            actions = client.infer(observation(), seed=3)["actions"]
        with Client("wss://127.0.0.1", port, KEY, name="other", tls=tls) as client:
            np.testing.assert_allclose(client.infer(observation(), seed=3)["actions"], actions, rtol=1e-5)
        with pytest.raises(ConnectionError, match="self-signed"):
            Client("wss://127.0.0.1", port, KEY, connect_timeout=1)
    lines = [json.loads(line) for line in (tmp_path / "log").read_text().splitlines()]
    assert [line["event"] for line in lines].count("answered") == 2 and KEY not in str(lines)
    assert {path.name for path in (tmp_path / "served").iterdir()} == {"policy", "other"}
    policy = importlib.import_module(f"pi0_{framework}").Policy.from_pretrained(checkpoint, use_sampler=True)
    alone = policy.infer(observation(), policy.noise(1, seed=3)[0])["actions"]
    assert np.linalg.norm(alone - actions) <= 3e-6 * np.linalg.norm(alone)  # float32 rounding


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--host", "0.0.0.0"], "can be reached from other machines"),
        (["--keys", "none.txt"], "none.txt"),
        (["--certificate", "none.pem"], "none.pem is not a file"),
        (["--metadata", "[1]"], "expected a JSON object"),
        (["--max-rate", "0"], "rate is 0"),
        (["--framework", "jax", "--device", "cuda"], "--device is for PyTorch"),
        (["--policy", "policy=x"], "two policies have one name"),
        (["--record", "gs://bucket/out"], "cannot be written to"),
        (["--batch-sizes", "0"], "batch sizes are"),
    ],
)
def test_wrong_arguments(arguments: list[str], named: str, checkpoint: Path, tmp_path: Path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as exit:
        main([str(checkpoint), "--access-log", "none", *arguments])
    assert exit.value.code != 0
    assert named in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_drain_answers_what_runs():
    import threading

    with serve(Slow(0.4)) as found:
        client, answers = Client(port=found.port), []
        thread = threading.Thread(target=lambda: answers.append(client.infer(observation())))
        thread.start()
        time.sleep(0.15)
    thread.join()
    assert answers[0]["actions"].shape == (5, 4)


@pytest.mark.parametrize("options", [{"sizes": ()}, {"sizes": (0,)}, {"wait": -1}, {"subtask_every": 0}])
def test_wrong_options_of_an_engine(options):
    with pytest.raises(ValueError):
        Engine(Slow(), **options)
