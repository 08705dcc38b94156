"""What is measured on PyTorch's devices: a trace of a few steps, memory, and utilization."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

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
            self._mirror.folder.mkdir(parents=True, exist_ok=True)
            self._profile = torch.profiler.profile(
                on_trace_ready=torch.profiler.tensorboard_trace_handler(str(self._mirror.folder))
            )
            self._profile.start()
            self._running = True

    def after(self, step: int, results: Any) -> None:
        """Call after each step, with its results."""
        if self._running and step == self._start + PROFILED.stop - 1:
            for value in results.values():
                value.item()  # waits for it
            self.__exit__()

    def __exit__(self, *exception: object) -> None:
        if self._running:
            self._profile.stop()
            self._mirror.__exit__()
            self._running = False


def device_metrics(device: torch.device, flops: float, steps_per_second: float) -> dict[str, float]:
    """`memory_gib`, the peak memory of a device, and `mfu`, `flops` of a device's step relative to its peak.

    Each where it is known: not on CPUs.
    """
    if device.type != "cuda":
        return {}
    memory = {"memory_gib": torch.cuda.max_memory_allocated(device) / 2**30}
    return memory | utilization(torch.cuda.get_device_name(device), flops, steps_per_second)
