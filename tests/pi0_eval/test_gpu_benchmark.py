"""`benchmarks/gpu.sh`, without a GPU and with models of a few thousand parameters."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
SPEC = importlib.util.spec_from_file_location("gpu", ROOT / "benchmarks" / "gpu.py")
assert SPEC is not None and SPEC.loader is not None
gpu: Any = importlib.util.module_from_spec(SPEC)
sys.modules["gpu"] = gpu
SPEC.loader.exec_module(gpu)


def test_the_most_important_cases_come_first():
    """All cameras at batch 1, then fewer cameras, then larger batches: PyTorch, JAX, float8, model by model."""
    workers = gpu.workers_of(gpu.make_parser().parse_args([]))
    assert [worker.name for worker in workers] == [
        f"{model} {side}"
        for model in ("pi0", "pi05", "pi0_fast")
        for side in ("torch sampler", "jax sampler", "torch sampler w8a8_float8")
    ]
    shapes = [(case.cameras, case.batch) for case in workers[0].cases]
    assert shapes[:5] == [(3, 1), (1, 1), (2, 1), (3, 8), (3, 32)] and len(set(shapes)) == len(shapes) == 9
    assert {case.dtype for worker in workers for case in worker.cases} == {"bfloat16"}


def test_what_has_no_time_is_named(capsys: pytest.CaptureFixture[str], tmp_path: Path):
    out = tmp_path / "gpu.json"
    options = ["--models", "tiny", "--dtype", "float32", "--batch", "1", "--train", "tiny", "--logs", str(tmp_path)]
    gpu.main([*options, "--minutes", "0", "--quantize", "int8", "--out", str(out)])
    text, written = capsys.readouterr().out, json.loads(out.read_text())
    assert not written["sampling"] and len(written["left_out"]) == 3 * 2  # sides and cameras
    assert "left out: tiny torch sampler int8, 2 cameras, batch 1: no time" in text
    assert "left out: training tiny, jax: no time" in text


def test_a_process_that_ends_is_no_hang(tmp_path: Path):
    """Its last words are why its cases have no result."""
    (worker,) = gpu.workers_of(
        gpu.make_parser().parse_args(["--models", "tiny", "--frameworks", "torch", "--quantize", "--batch", "1"])
    )
    command = [sys.executable, "-c", "import sys; sys.exit('out of memory')"]
    with (tmp_path / "log").open("w") as log:
        worker.process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=log, text=True, start_new_session=True
        )
    worker._read(worker.process, tmp_path / "log")
    assert not worker.wait("ready", gpu.time.time() + 60)
    assert set(worker.left_out().values()) == {"out of memory"}
    worker.stop()


@pytest.mark.slow
def test_a_table(tmp_path: Path):
    out = tmp_path / "gpu.json"
    options = ["--models", "tiny", "tiny_pi0_fast", "--dtype", "float32", "--batch", "1", "--steps", "2"]
    options += ["--repeats", "3", "--quantize", "int8", "--train", "tiny", "--train-batch", "2", "--minutes", "6"]
    command = [ROOT / "benchmarks" / "gpu.sh", *options, "--out", out, "--logs", tmp_path / "logs"]
    environment = {"PYTHON": sys.executable, "PATH": "/usr/bin:/bin", "HOME": str(tmp_path)}
    result = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert result.returncode == 0, result.stderr
    written = json.loads(out.read_text())
    assert not written["left_out"], result.stderr
    sides = {(row["case"]["model"], row["case"]["framework"], row["case"]["quantize"]) for row in written["sampling"]}
    assert len(sides) == 6 and len(written["sampling"]) == 12
    first = [row for row in written["sampling"] if row["case"]["cameras"] == 2]
    assert all({"prefix", "step"} <= row["stages_ms"].keys() and row["median_ms"] > 0 for row in first)
    assert len(written["training"]) == 2 and not any("left out" in row for row in written["training"])
