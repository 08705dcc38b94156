"""Stopping a run before its machine is taken away: by SIGTERM, and on many hosts by JAX's coordination service."""

from __future__ import annotations

import signal
from types import FrameType


class Preempted(Exception):
    """A run was asked to stop, and has saved a checkpoint."""

    exit_code = 128 + signal.SIGTERM


class Preemption:
    """A context manager that catches SIGTERM; called after each step, it returns whether to stop there.

    With several processes, all of them stop at the same step, whichever was signalled.
    """

    def __init__(self) -> None:
        import jax  # not above: the command line imports this file before it needs JAX

        self._signalled, self._alone = False, jax.process_count() == 1

    def __enter__(self) -> Preemption:
        if self._alone:  # otherwise JAX's coordination service catches it
            self._before = signal.signal(signal.SIGTERM, self._handle)
        return self

    def __exit__(self, *exception: object) -> None:
        if self._alone:
            signal.signal(signal.SIGTERM, self._before)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self._signalled = True

    @property
    def signalled(self) -> bool:
        """Whether this process got the signal; of a run of several, JAX's coordination service gets it."""
        return self._signalled

    def __call__(self, step: int) -> bool:
        """Whether the run is to stop after `step`."""
        if self._alone:
            return self._signalled
        from jax.experimental import multihost_utils

        return multihost_utils.reached_preemption_sync_point(step)
