"""Stopping a run before its machine is taken away: by SIGTERM, all of its processes after the same step."""

from __future__ import annotations

import signal
from collections.abc import Callable
from types import FrameType


class Preempted(Exception):
    """A run was asked to stop, and has saved a checkpoint."""

    exit_code = 128 + signal.SIGTERM


class Preemption:
    """A context manager that catches SIGTERM; called after each step, it returns whether to stop there.

    Of several processes, `agree` says so: given the step and whether this process was signalled, it returns the same in
    all of them. Without `catch`, something else catches the signal, of which `agree` knows.
    """

    def __init__(self, agree: Callable[[int, bool], bool] | None = None, *, catch: bool = True) -> None:
        self._signalled, self._agree, self._catch = False, agree, catch

    def __enter__(self) -> Preemption:
        if self._catch:
            self._before = signal.signal(signal.SIGTERM, self._handle)
        return self

    def __exit__(self, *exception: object) -> None:
        if self._catch:
            signal.signal(signal.SIGTERM, self._before)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self._signalled = True

    @property
    def signalled(self) -> bool:
        """Whether this process got the signal."""
        return self._signalled

    def __call__(self, step: int) -> bool:
        """Whether the run is to stop after `step`."""
        return self._signalled if self._agree is None else self._agree(step, self._signalled)
