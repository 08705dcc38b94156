"""Two processes without a shared disk: folder, base checkpoint, records and compiled programs are all in a bucket."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from convert.checkpoints import open_checkpoint
from pi0.datasets.cache import main as make_records
from pi0.storage import as_path, list_files
from pi0.training.workdir import completed
from tests.bucket import Bucket, free_port

ROOT = Path(__file__).parents[3]
CONFIG = ROOT / "tests" / "pi0_jax" / "training" / "short_run.py"
STEPS = 20
PATIENCE = 3600.0  # seconds that a run may take on a busy machine
RECIPE = {
    **{
        "steps": STEPS,
        "batch_size": 4,
        "save_every": 2,
        "eval_every": 2,
        "log_every": 1,
        "keep_checkpoints": 2,
    },
    **{"mesh.fsdp": 2, "data.validation_episodes": "[0]", "data.workers": 1, "optimizer.peak_lr": 0.03},
}
RECORDS = ("--to", "arrayrecord", "--size", "28x42", "--workers", "1")  # the tiny model's images


class Pod:
    """Hosts that have nothing but an empty folder each, and a bucket."""

    def __init__(self, bucket: Bucket, folder: Path):
        self.address, self._folder = bucket.address, folder
        make_records([str(ROOT / "pi0" / "sample" / "metaworld_v30"), *RECORDS, "--out", f"{self.address}/data"])

    def start(self, count: int, name: str, **changes: object) -> list[subprocess.Popen[str]]:
        """The processes of a run in the folder `name` of the bucket."""
        coordinator = f"127.0.0.1:{free_port()}"
        settings = RECIPE | {"data.root": f"{self.address}/data", "data.format": "arrayrecord"} | changes
        arguments = ["--config", str(CONFIG), "--workdir", f"{self.address}/{name}"]
        arguments += ["--compilation-cache", f"{self.address}/compiled"]
        arguments += [f"--config.{field}={value}" for field, value in settings.items()]
        if count == 1:
            return [self._start(0, arguments)]
        arguments += ["--coordinator", coordinator, "--process-count", str(count), "--process-index"]
        return [self._start(i, [*arguments, str(i)]) for i in range(count)]

    def _start(self, index: int, arguments: list[str]) -> subprocess.Popen[str]:
        host = self._folder / f"host_{index}"
        (host / "tmp").mkdir(parents=True, exist_ok=True)
        environment = {k: v for k, v in os.environ.items() if not k.startswith(("JAX_COMPILATION", "XLA_FLAGS"))}
        environment |= {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", "HOME": str(host), "TMPDIR": str(host / "tmp")}
        environment["MPLCONFIGDIR"] = str(host / "tmp" / "matplotlib")  # its list of fonts is no file of ours
        environment |= {"PI0_CACHE": str(host / "cache"), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.2"}
        command = [sys.executable, "-c", "from pi0.training.command import main; main()", *arguments]
        return subprocess.Popen(
            command, cwd=host, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )

    def train(self, count: int, name: str, **changes: object) -> str:
        """Train to the end; returns what process 0 said."""
        return finish(self.start(count, name, **changes))

    def parameters(self, name: str) -> dict[str, bytes]:
        """Those that were trained and their moving average, of the last step."""
        run = f"{self.address}/{name}"
        sets = {ema: open_checkpoint(run, step=STEPS, ema=ema, in_place=True).ours for ema in (True, False)}
        return {f"{ema} {n}": tensor.read(()).tobytes() for ema, ours in sets.items() for n, tensor in ours.items()}


def finish(runs: list[subprocess.Popen[str]]) -> str:
    try:
        said = [run.communicate(timeout=PATIENCE)[0] for run in runs]
    finally:
        for run in runs:
            run.kill()
    for run, text in zip(runs, said, strict=True):
        assert run.returncode == 0, text
    return said[0]


@pytest.mark.slow
def test_a_pod(bucket: Bucket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed at random, in one process or both, and with a damaged newest checkpoint, a run ends bit for bit as one
    that was left alone; its best checkpoint stays; it is exported in the bucket and run from there."""
    monkeypatch.setenv("PI0_CACHE", str(tmp_path / "cache"))
    pod = Pod(bucket, tmp_path / "pod")
    pod.train(1, "base", steps=2, **{"mesh.fsdp": 1, "seed": 5, "eval_every": 0})
    base = {"base_checkpoint": f"{pod.address}/base"}
    pod.train(2, "whole", **base)
    wanted = pod.parameters("whole")

    rng, workdir = random.Random(0), as_path(f"{pod.address}/killed")
    # While a checkpoint is written, the first one too, and once another one is complete.
    for killed, found, patience in (((0,), begun, 0.5), ((1,), completed_steps, 2), ((0, 1), begun, 0.5)):
        runs = pod.start(2, "killed", **base)
        begin, before = time.perf_counter(), found(workdir)
        while found(workdir) <= before:
            assert time.perf_counter() < begin + PATIENCE and all(run.poll() is None for run in runs)
            time.sleep(0.05)
        time.sleep(rng.uniform(0, patience))
        for i in killed:
            runs[i].kill()
        time.sleep(rng.uniform(0, 2))
        for run in runs:  # what a cluster does when one is gone
            run.kill()
            run.communicate(timeout=60)  # until the processes that read its data have ended too
        there = completed_steps(workdir)
        print("killed", killed, "with checkpoints", sorted(there))
        assert STEPS not in there and (there or found is begun)
    pod.train(2, "killed", **base)
    assert pod.parameters("killed") == wanted
    steps = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in steps if "loss" in row] == list(range(1, STEPS + 1))
    losses = {row["step"]: row["validation_loss"] for row in steps if "validation_loss" in row}
    best = min(losses, key=losses.__getitem__)
    assert [int(f.name) for f in completed(workdir)] == sorted({best, STEPS - 2, STEPS}), losses

    newest = {n: f for n, f in list_files(workdir / "checkpoints" / str(STEPS)).items() if n.startswith("train_state/")}
    largest = max(newest.values(), key=lambda file: file.size).path
    content = largest.read_bytes()
    largest.write_bytes(content[: len(content) // 2])
    assert f"checkpoint {STEPS} is damaged and put aside" in pod.train(2, "killed", **base)
    assert (workdir / "checkpoints" / f"damaged-{STEPS}" / "checksums.json").exists()
    assert pod.parameters("killed") == wanted

    from convert.conversion import main as convert

    convert([f"{pod.address}/killed", f"{pod.address}/export", "--to", "pi0_torch"])
    check_policies(f"{pod.address}/export", f"{pod.address}/killed")
    hosts = tmp_path / "pod"
    written = {f.relative_to(hosts).parts[1] for f in hosts.rglob("*") if f.is_file()}
    assert written <= {"cache", "tmp"}, "a host wrote outside of its temporary folders"
    assert any("compiled" in name for name in list_files(as_path(f"{pod.address}")))


def begun(workdir: Path) -> set[str]:
    """The files of checkpoints."""
    return {*list_files(workdir / "checkpoints")}


def completed_steps(workdir: Path) -> set[int]:
    return {int(folder.name) for folder in completed(workdir)}


def check_policies(*addresses: str) -> None:
    """Policies of both frameworks load from the bucket, and predict the same."""
    import pi0_jax
    import pi0_torch
    from pi0.datasets.registry import open_dataset
    from pi0.robots.registry import make_robot

    recorded = open_dataset("bundled://metaworld_v30", make_robot("metaworld"), action_horizon=5)[0]
    results = []
    for address in addresses:
        for framework in (pi0_jax, pi0_torch):
            policy = framework.Policy.from_pretrained(address)
            noise = np.zeros((policy.config.action_horizon, policy.config.action_dim), np.float32)
            results.append(policy.infer(recorded, noise)["actions"])
    for result in results[1:]:
        np.testing.assert_allclose(result, results[0], rtol=0, atol=1e-4)  # float32 in another order of sums
