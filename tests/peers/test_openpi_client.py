"""The real openpi-client drives our server: 0.1.2, and the newest where its source is named.

Needs the environment of make_openpi_client_env.sh.
"""

from __future__ import annotations

import json
import os
import subprocess
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pi0_serve import Keys
from tests.bucket import free_port
from tests.pi0_serve.serving import Slow, serve

pytestmark = pytest.mark.peers

DRIVER = Path(__file__).parent / "drive_openpi_client.py"
KEY = "0123456789abcdef"


@pytest.mark.parametrize("version", ["0.1.2", "newest"])
def test_openpis_client_drives_an_episode(version: str):
    python = Path(os.environ.get("PI0_OPENPI_CLIENT", ".cache/openpi_client")).absolute() / "bin" / "python"
    if not python.exists():
        pytest.skip(f"no {python}: tests/peers/make_openpi_client_env.sh makes it")
    clean = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    if version == "newest":
        if "PI0_OPENPI_CLIENT_SRC" not in os.environ:
            pytest.skip("PI0_OPENPI_CLIENT_SRC names no openpi/packages/openpi-client/src")
        clean["PYTHONPATH"] = os.environ["PI0_OPENPI_CLIENT_SRC"]
    port, policy = free_port(), Slow()
    command = [python, "-W", "ignore", DRIVER, str(port), KEY]
    options: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "env": clean}

    def start() -> subprocess.Popen[str]:
        return subprocess.Popen(list(map(str, command)), **options)

    driver = start() if version == "newest" else None  # which waits for a server
    time.sleep(0 if driver is None else 2)
    with serve(policy, keys=Keys.parse(f"lab {KEY}", "keys"), port=port):
        driver = driver or start()
        output, error = driver.communicate(timeout=120)
    assert driver.returncode == 0, error
    result = json.loads(output.splitlines()[-1])
    assert result["numpy"].startswith("1.")
    assert result["metadata"]["robot"] == "MetaWorld" and result["metadata"]["action_horizon"] == 5
    assert len(result["actions"]) == 17 and result["episodes"] == 2  # the last reset is after the episode
    # The policy answers in the order of requests, from one generator of noise: an exact copy gives the same chunks.
    alone = Slow()
    for start in range(0, 17, 5):
        expected = alone.infer(observation(start))["actions"]
        np.testing.assert_array_equal(np.float32(result["actions"][start : start + 5]), expected[: 17 - start])
    assert result["keys"] == ["actions", "policy_timing", "server_timing"]
    assert {"infer_ms", "prev_total_ms"} <= set(result["timing"])
    assert "base_0_rgb" in result["camera"] and "front" in result["camera"]
    assert "observation/state is nan at [1]" in result["nan"]
    for error in (result["camera"], result["nan"]):
        assert "Traceback" not in error and "/home" not in error and ".py" not in error
    assert result["after"] == result["again"] == ""
    assert "401" in result["key"]
    assert "1009" in result["large"], result["large"]
    assert len(policy.batches) >= 4


def observation(step: int) -> dict[str, Any]:
    """That of the driver."""
    rng = np.random.default_rng(step)
    found = {f"observation/{name}": rng.integers(0, 256, (30, 40, 3)).astype(np.uint8) for name in ("corner", "wrist")}
    return found | {"observation/state": rng.normal(size=4).astype(np.float32), "prompt": "open it"}
