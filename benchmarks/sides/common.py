"""The loop of a side: a process that is ready, then times one call for every line on its standard input."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

READY = 20  # batches, more than any loader here keeps with two workers
REPLY = "@"  # before the lines meant for the benchmark, since libraries print too


def serve(prepare: Callable[[dict[str, Any]], Callable[[], Any]]) -> None:
    """Prepare the job in the JSON of the first argument; then reply with the seconds of one call to every line.

    A call that returns numbers has timed itself: its seconds of wall time and of CPU time.
    """
    call = prepare(json.loads(sys.argv[1]))
    for _ in range(3):  # compilation, and what the first calls of a compiled program do
        if isinstance(call(), tuple):
            break  # which has had batches that were not counted
    print(REPLY, "ready", flush=True)
    for _ in sys.stdin:
        begin = time.perf_counter()
        own = call()
        print(REPLY, *(own if isinstance(own, tuple) else [time.perf_counter() - begin]), flush=True)


def time_batches(batches: Iterator[Any], count: int) -> tuple[float, float]:
    """The seconds of `count` batches, after those that were made ready while nobody asked: wall, and CPU (Linux)."""
    for _ in range(READY):
        next(batches)
    begin, cpu = time.perf_counter(), cpu_seconds()
    for _ in range(count):
        next(batches)
    return time.perf_counter() - begin, cpu_seconds() - cpu


def cpu_seconds() -> float:
    """The CPU time of this process and of those below it that run."""
    parents, ticks = {}, {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            fields = stat.read_text().rpartition(")")[2].split()  # after the name: proc(5), fields 3 and on
            pid = int(stat.parent.name)
            parents[pid], ticks[pid] = int(fields[1]), int(fields[11]) + int(fields[12])
    own, added = {os.getpid()}, {os.getpid()}
    while added:
        added = {pid for pid, parent in parents.items() if parent in own and pid not in own}
        own |= added
    return sum(ticks.get(pid, 0) for pid in own) / os.sysconf("SC_CLK_TCK")
