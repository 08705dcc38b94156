"""Export a checkpoint to PyTorch and compare the two, as a program: `python -m pi0_jax.training.prove`.

It runs beside a training process (`exports`), gives way to it, and ends when its own standard input does: with that
process, however it ends.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from convert.conversion import convert
from convert.sidecars import PARITY
from pi0.command import exit_on_error, load_command
from pi0.fetch import cache_dir
from pi0.storage import as_path, is_bucket

GRACE = 5.0  # seconds to clean up in


@exit_on_error("export", code=2)
def main(arguments: list[str] | None = None) -> None:
    """Write the checkpoint of the first argument to the folder of the second, with a report in `parity.json`.

    The third is the dtype to compare in. Exits as `pi0-parity` does, of which this is a `--quick` one.
    """
    checkpoint, export, dtype = sys.argv[1:] if arguments is None else arguments
    signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where training runs in the background
    threading.Thread(target=_end_with_input, daemon=True).start()
    os.nice(10)
    with contextlib.suppress(OSError):  # where memory runs out, this process is ended, and not the training
        Path("/proc/self/oom_score_adj").write_text("1000")
    convert(checkpoint, export, to="pi0_torch", overwrite=True)
    with _passing_cache() if is_bucket(as_path(export)) else contextlib.nullcontext():
        load_command("parity")([checkpoint, export, "--quick", "--dtype", dtype, "--json", f"{export}/{PARITY}"])


@contextlib.contextmanager
def _passing_cache() -> Iterator[None]:
    """Fetch into a folder that is deleted afterwards: no other comparison is of the same checkpoints."""
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(cache_dir() / "jax"))
    with tempfile.TemporaryDirectory(prefix="pi0-") as folder:
        os.environ["PI0_CACHE"] = folder
        yield


def _end_with_input() -> None:
    os.read(0, 1)
    main_thread = threading.main_thread().ident
    assert main_thread is not None
    signal.pthread_kill(main_thread, signal.SIGINT)  # as Ctrl-C would: what is half written is deleted
    time.sleep(GRACE)
    os._exit(1)


if __name__ == "__main__":
    main()
