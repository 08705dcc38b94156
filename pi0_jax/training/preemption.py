"""Notices that a machine is about to be taken away: SIGTERM, and on many hosts what JAX's coordinator hears of it."""

from __future__ import annotations

import signal
from types import FrameType

import jax
from jax.experimental import multihost_utils


class Preempted(Exception):
    """A run was asked to stop, and has saved."""

    exit_code = 128 + signal.SIGTERM


class Preemption:
    """Catches SIGTERM while it is entered; called after each step, it says whether to stop there.

    With several processes, all of them say so at the same step, whichever was told.
    """

    def __init__(self) -> None:
        self._told = False

    def __enter__(self) -> Preemption:
        if jax.process_count() == 1:  # otherwise JAX's coordination service catches it
            self._before = signal.signal(signal.SIGTERM, self._hear)
        return self

    def __exit__(self, *exception: object) -> None:
        if jax.process_count() == 1:
            signal.signal(signal.SIGTERM, self._before)

    def _hear(self, number: int, frame: FrameType | None) -> None:
        self._told = True

    def __call__(self, step: int) -> bool:
        """Whether the run is to stop after `step`."""
        return self._told if jax.process_count() == 1 else multihost_utils.reached_preemption_sync_point(step)
