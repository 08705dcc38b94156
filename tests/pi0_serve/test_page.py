"""The page in a real Chromium, headless, where there is one."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

from pi0_serve import Client
from pi0_serve.server import PAGE
from tests.pi0_serve.serving import Slow, observation, serve

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"]
FLAGS += ["--disable-background-networking", "--disable-component-update"]


def test_the_page_loads_nothing_from_elsewhere():
    assert not re.findall(r"https?://(?!www\.w3\.org/2000/svg)", PAGE.read_text())


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
def test_the_page_shows_the_robots(tmp_path: Path):
    """Two robots, one of them with a state outside of what training saw, and a prompt that is no HTML."""
    with serve(Slow(0.005)) as found, Client(port=found.port) as first, Client(port=found.port) as second:
        for i in range(20):
            first.infer(observation(i))
        far = observation(0) | {"state": np.array([0, 0, 90, 0], np.float32)}
        second.infer(far)
        profile = f"--user-data-dir={tmp_path / 'profile'}"
        budget = "--virtual-time-budget=3000"
        command = [str(CHROMIUM), *FLAGS, profile, budget, "--dump-dom", f"http://127.0.0.1:{found.port}/"]
        page = subprocess.run(command, capture_output=True, text=True, timeout=60).stdout
    assert 'data-ready="yes"' in page, page[-2000:]
    assert "2 robots connected" in page and "robot 1: policy" in page and "20 requests" in page
    assert page.count("<img") == 4 and page.count("<polyline") == 2 + 2 * 4
    assert "outside of what training saw: state[2] is 90" in page
    assert page.count('class="warning"') == 1
