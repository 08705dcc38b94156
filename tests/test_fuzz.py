"""A part of the fuzzer's inputs; `python tests/fuzz.py --seed 0 --count 2000` tries more."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.parametrize("count", [60, pytest.param(2000, marks=pytest.mark.slow)])
def test_what_is_read_works_or_is_refused_by_name(count: int) -> None:
    script = Path(__file__).with_name("fuzz.py")
    done = subprocess.run(
        [sys.executable, script, "--seed", "0", "--count", str(count)], capture_output=True, text=True
    )
    assert done.returncode == 0 and done.stdout.rstrip().endswith(f"{count} inputs: 0 faults"), (
        done.stdout + done.stderr
    )
