"""What is measured on PyTorch's devices: a trace of a few steps, memory, and utilization."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from pi0.training import metrics
from pi0.training.metrics import utilization


class Trace(metrics.Trace):
    """A profile by `torch.profiler`."""

    def begin(self, folder: Path) -> None:
        """Start to profile into a folder."""
        folder.mkdir(parents=True, exist_ok=True)
        handler = torch.profiler.tensorboard_trace_handler(str(folder))
        self._profile = torch.profiler.profile(on_trace_ready=handler)
        self._profile.start()

    def end(self) -> None:
        """Stop, and write the profile."""
        self._profile.stop()

    def wait(self, results: Any) -> None:
        """Wait until the results of a step are computed."""
        for value in results.values():
            value.item()


def device_metrics(device: torch.device, flops: float, steps_per_second: float) -> dict[str, float]:
    """`memory_gib`, the peak memory of a device, and `mfu`, `flops` of a device's step relative to its peak.

    Each where it is known: not on CPUs.
    """
    if device.type != "cuda":
        return {}
    memory = {"memory_gib": torch.cuda.max_memory_allocated(device) / 2**30}
    return memory | utilization(torch.cuda.get_device_name(device), flops, steps_per_second)
