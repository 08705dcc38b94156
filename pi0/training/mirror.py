"""Files of a run that grow, of which a bucket has a copy: there, a file can only be written as a whole."""

from __future__ import annotations

import json
import logging
import tempfile
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from pi0.storage import is_bucket, list_files, requests, upload_files, write_text

logger = logging.getLogger(__name__)


class Mirror:
    """A context manager of `folder`, where a run's process writes: the run's own or, for a bucket, one of this machine.

    `publish` copies what has changed there, in a thread.
    """

    def __init__(self, workdir: Path):
        self._workdir = workdir
        self._temporary = tempfile.TemporaryDirectory(prefix="pi0-") if is_bucket(workdir) else None
        self.folder = Path(self._temporary.name) if self._temporary else workdir
        self._sent: dict[str, tuple[int, int]] = {}
        self._thread = ThreadPoolExecutor(1)
        self._sending: Future[None] | None = None

    def publish(self, *, wait: bool = False) -> None:
        """Copy the files that have changed; nothing while a copy is under way, unless it is to `wait` for both."""
        if self._temporary is None:
            return
        if self._sending is not None and not self._sending.done():
            if not wait:
                return
            self._sending.result()
        self._sending = self._thread.submit(self._send)
        if wait:
            self._sending.result()

    def _send(self) -> None:
        now = {name: (f.size, f.path.stat().st_mtime_ns) for name, f in list_files(self.folder).items()}
        changed = [name for name, state in now.items() if self._sent.get(name) != state]
        try:
            upload_files(self.folder, self._workdir, changed)
        except OSError as error:  # metrics are not worth a run; they are copied again with the next ones
            logger.warning("%d files of logs are not in %s yet: %s", len(changed), self._workdir, error)
        else:
            self._sent |= {name: now[name] for name in changed}

    def __enter__(self) -> Mirror:
        return self

    def __exit__(self, *exception: object) -> None:
        self.publish(wait=True)
        self._thread.shutdown()
        if self._temporary is not None:
            self._temporary.cleanup()


def keep_lines(source: Path, target: Path, last: int) -> None:
    """Write the lines of `source`, JSON objects with a `step`, to `target` up to the step `last`, if there are any.

    Later ones are of steps that are done again, or were cut off when a run was killed.
    """
    try:
        with requests(f"cannot read {source}"):
            lines = source.read_text(encoding="utf-8").splitlines(keepends=True)
    except FileNotFoundError:
        return
    kept = [line for line in lines if _step(line) <= last]
    if source != target or len(kept) < len(lines):
        write_text(target, "".join(kept))


def _step(line: str) -> float:
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return float("inf")
