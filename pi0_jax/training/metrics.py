"""What is measured on JAX's devices: a trace of a few steps, memory, and utilization."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax

from pi0.training.metrics import PROFILED, utilization
from pi0.training.mirror import Mirror


class Trace:
    """A profile of this process's steps `PROFILED` in `folder`, for TensorBoard or Perfetto; None: no profile."""

    def __init__(self, folder: Path | None, start: int):
        self._folder, self._start, self._running = folder, start, False

    def __enter__(self) -> Trace:
        return self

    def before(self, step: int) -> None:
        """Call before each step."""
        if self._folder is not None and step == self._start + PROFILED.start:
            self._mirror = Mirror(self._folder)
            jax.profiler.start_trace(self._mirror.folder)
            self._running = True

    def after(self, step: int, results: Any) -> None:
        """Call after each step, with its results."""
        if self._running and step == self._start + PROFILED.stop - 1:
            jax.block_until_ready(results)
            self.__exit__()

    def __exit__(self, *exception: object) -> None:
        if self._running:
            jax.profiler.stop_trace()
            self._mirror.__exit__()
            self._running = False


def device_metrics(flops: float, steps_per_second: float) -> dict[str, float]:
    """`memory_gib`, the peak memory of a device, and `mfu`, `flops` of a device's step relative to its peak.

    Each where it is known: not on CPUs.
    """
    device, values = jax.local_devices()[0], {}
    stats = device.memory_stats() or {}
    if "peak_bytes_in_use" in stats:
        values["memory_gib"] = stats["peak_bytes_in_use"] / 2**30
    return values | utilization(device.device_kind, flops, steps_per_second)
