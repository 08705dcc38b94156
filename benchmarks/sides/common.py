"""The loop of a side: a process that is ready, then times one call for every line on its standard input."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

READY = 20  # batches, more than any loader here keeps with two workers
REPLY = "@"  # before the lines meant for the benchmark, since libraries print too


def serve(prepare: Callable[[dict[str, Any]], Callable[[], Any]]) -> None:
    """Prepare the job in the JSON of the first argument; then reply with the seconds of one call to every line.

    A call that returns a float has timed itself.
    """
    call = prepare(json.loads(sys.argv[1]))
    for _ in range(3):  # compilation, and what the first calls of a compiled program do
        if isinstance(call(), float):
            break  # which has had batches that were not counted
    print(REPLY, "ready", flush=True)
    for _ in sys.stdin:
        begin = time.perf_counter()
        own = call()
        print(REPLY, own if isinstance(own, float) else time.perf_counter() - begin, flush=True)


def time_batches(batches: Iterator[Any], count: int) -> float:
    """The seconds of `count` batches, after those that were made ready while nobody asked."""
    for _ in range(READY):
        next(batches)
    begin = time.perf_counter()
    for _ in range(count):
        next(batches)
    return time.perf_counter() - begin
