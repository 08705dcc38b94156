"""What is measured on JAX's devices: a trace of a few steps, memory, and utilization."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax

from pi0.training import metrics
from pi0.training.metrics import utilization


class Trace(metrics.Trace):
    """A profile by `jax.profiler`."""

    def begin(self, folder: Path) -> None:
        """Start to profile into a folder."""
        jax.profiler.start_trace(folder)

    def end(self) -> None:
        """Stop, and write the profile."""
        jax.profiler.stop_trace()

    def wait(self, results: Any) -> None:
        """Wait until the results of a step are computed."""
        jax.block_until_ready(results)


def device_metrics(flops: float, steps_per_second: float) -> dict[str, float]:
    """`memory_gib`, the peak memory of a device, and `mfu`, `flops` of a device's step relative to its peak.

    Each where it is known: not on CPUs.
    """
    device, values = jax.local_devices()[0], {}
    stats = device.memory_stats() or {}
    if "peak_bytes_in_use" in stats:
        values["memory_gib"] = stats["peak_bytes_in_use"] / 2**30
    return values | utilization(device.device_kind, flops, steps_per_second)
