"""Checkpoints of a run that are exported to PyTorch and compared with their exports, beside training.

exports/<step>               the checkpoint in PyTorch's layout
exports/<step>/parity.json   the report of `pi0-parity` on both; the checkpoint has a copy of it, which is written last
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import IO, Any

from tqdm import tqdm

from convert.sidecars import PARITY, failed_parity
from pi0.assets import is_complete
from pi0.reading import read_json
from pi0.run_config import RunConfig
from pi0.storage import delete, write_text
from pi0.training.metrics import Metrics
from pi0.training.workdir import completed
from pi0_jax.training.checkpoints import Checkpoints
from pi0_jax.training.prove import GRACE

PROGRAM = (sys.executable, "-m", "pi0_jax.training.prove")
POLL = 0.1  # seconds


class Exports:
    """A context manager that exports the checkpoints of every `config.export_every` steps, one after the other.

    Each is exported and compared by `PROGRAM`, a process of its own on the CPU: JAX's settings and the accelerator are
    those of training, which goes on. What an earlier process of the run did not finish is done again. A comparison
    that is not over when the block is left is stopped, and leaves nothing. All processes but one are `silent`, and do
    nothing.
    """

    def __init__(
        self, workdir: Path, config: RunConfig, checkpoints: Checkpoints, metrics: Metrics, *, silent: bool = False
    ):
        self._workdir, self._config, self._silent = workdir, config, silent
        self._checkpoints, self._metrics = checkpoints, metrics
        self._thread, self._stopping = ThreadPoolExecutor(1), threading.Event()
        self._running: dict[int, Future[dict[str, float]]] = {}

    def __enter__(self) -> Exports:
        if self._silent or not self._config.export_every:
            return self
        for partial in (self._workdir / "exports").glob(".*"):  # of a process that was killed
            delete(partial)
        logged = self._metrics.logged("parity/passed")
        for folder in completed(self._workdir):
            step, scalars = int(folder.name), _scalars(folder)
            if scalars is None:
                self.start(step)
            elif self._due(step) and step not in logged:
                self._metrics.write(step, scalars, late=True)
        return self

    def _due(self, step: int) -> bool:
        every = self._config.export_every
        return not self._silent and every > 0 and (step % every == 0 or step == self._config.steps)

    def start(self, step: int) -> None:
        """Export the checkpoint of a step, where it is one of those that are, once it is complete."""
        if self._due(step):
            self._running[step] = self._thread.submit(self._export, step)

    def log(self) -> dict[str, float]:
        """Log the comparisons that are over, and return the newest one's metrics.

        `parity/passed` is 1 or 0, `parity/share` the largest share of what is allowed that a stage takes.
        """
        scalars: dict[str, float] = {}
        for step in [step for step, future in self._running.items() if future.done()]:
            future = self._running.pop(step)
            if (problem := future.exception()) is not None:
                tqdm.write(f"checkpoint {step} was NOT compared with its export: {problem}")
                continue
            scalars = future.result()
            self._metrics.write(step, scalars, late=True)
        return scalars

    def wait(self, stop: Callable[[], bool]) -> dict[str, float]:
        """`log` until all comparisons are over, or until `stop`."""
        scalars = self.log()
        if self._running:
            tqdm.write("waiting for the comparison of the last checkpoint with its export")
        while self._running and not stop():
            time.sleep(POLL)
            scalars |= self.log()
        return scalars

    def __exit__(self, *exception: object) -> None:
        self._stopping.set()
        self._thread.shutdown(cancel_futures=True)

    def _export(self, step: int) -> dict[str, float]:
        """Export and compare a checkpoint, mark it, and return its metrics. Raises ChildProcessError."""
        self._checkpoints.wait_until_signed(step)
        checkpoint, export = self._workdir / "checkpoints" / str(step), self._workdir / "exports" / str(step)
        started, dtype = time.perf_counter(), self._config.model.runtime.dtype
        delete(export / PARITY)
        with tempfile.TemporaryFile() as output:
            self._run([*PROGRAM, str(checkpoint), str(export), dtype], output)
            output.seek(0)
            lines = output.read().decode(errors="replace").strip().splitlines()
        scalars = _scalars(export)
        if scalars is None or not is_complete(checkpoint):
            raise ChildProcessError(lines[-1] if lines else "it was stopped")
        write_text(checkpoint / PARITY, (export / PARITY).read_text())
        if (failure := failed_parity(export)) is None:
            verdict = f"is equal to its export {export}, at {scalars['parity/share']:.0%} of what is allowed"
        else:
            more = f"pi0-parity {checkpoint} {export} --explain"
            verdict = f"is NOT equal to its export {export}: {failure}. Both are marked; {more} says more"
        scalars["parity/seconds"] = time.perf_counter() - started
        tqdm.write(f"checkpoint {step} {verdict} ({scalars['parity/seconds']:.0f} s)")
        return scalars

    def _run(self, command: list[str], output: IO[bytes]) -> None:
        """Run a command on the CPU until it ends, or until this run does."""
        environment: Any = os.environ | {"JAX_PLATFORMS": "cpu"}
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=output, stderr=output, env=environment) as process:
            while process.poll() is None and not self._stopping.wait(POLL):
                pass
            assert process.stdin is not None
            process.stdin.close()  # which ends it
            try:
                process.wait(2 * GRACE)
            except subprocess.TimeoutExpired:
                process.kill()


def _scalars(folder: Path) -> dict[str, float] | None:
    """The metrics of the comparison in a checkpoint's folder; None where there is none, or another file."""
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        report = read_json(folder / PARITY)
        return {"parity/passed": float(report["passed"]), "parity/share": float(report["share"])}
    return None
