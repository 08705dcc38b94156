"""The loop of a side: a process that is ready, then times one call for every line on its standard input."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from typing import Any

REPLY = "@"  # before the lines meant for the benchmark, since libraries print too


def serve(prepare: Callable[[dict[str, Any]], Callable[[], Any]]) -> None:
    """Prepare the job in the JSON of the first argument; then reply with the seconds of one call to every line."""
    call = prepare(json.loads(sys.argv[1]))
    for _ in range(3):  # compilation, and what the first calls of a compiled program do
        call()
    print(REPLY, "ready", flush=True)
    for _ in sys.stdin:
        begin = time.perf_counter()
        call()
        print(REPLY, time.perf_counter() - begin, flush=True)
