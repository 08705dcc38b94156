"""The lock of a run's folder: one run at a time, which it names.

On a disk the system releases it when the process ends, in whatever way. In a bucket it is a file that only one process
can make, and that its owner writes again every `RENEW` seconds: who finds it watches it, and takes it where it stays
the same for `EXPIRY` seconds. No two clocks are compared. A process of the same machine that is gone, and a run of this
process that has ended without access to the bucket, are not waited for.
"""

from __future__ import annotations

import fcntl
import json
import os
import socket
import threading
import time
import uuid
from pathlib import Path
from typing import Any

from pi0.storage import create_text, delete, delete_version, is_bucket, version, write_text

NAME = ".lock"
RENEW, EXPIRY = 20.0, 120.0  # seconds
_held: set[str] = set()  # the runs of this process that hold a lock in a bucket


def lock(workdir: Path) -> FileLock | BucketLock:
    """Lock a run's folder, until `close`. Raises ValueError while another run holds it."""
    return BucketLock(workdir) if is_bucket(workdir) else FileLock(workdir)


class FileLock:
    """The lock of a folder of a file system."""

    def __init__(self, workdir: Path):
        file = os.open(workdir / NAME, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            owner = os.pread(file, 1000, 0).decode("utf-8", "replace").strip()
            os.close(file)
            raise in_use(workdir, owner) from error
        except OSError as error:
            print(f"{workdir} cannot be locked on this file system ({error}): start no second run in it")
        os.ftruncate(file, 0)
        os.pwrite(file, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)
        self._file = file

    def check(self) -> None:
        """The system keeps it."""

    def close(self) -> None:
        """Release it."""
        os.close(self._file)


class BucketLock:
    """The lock of a folder in a bucket."""

    def __init__(self, workdir: Path):
        self._workdir, self._file = workdir, workdir / NAME
        self._me: dict[str, Any] = {
            "process": os.getpid(),
            "host": socket.gethostname(),
            "namespace": _namespace(),
            "run": uuid.uuid4().hex,
        }
        self._lost: str | None = None
        self._acquire()
        _held.add(self._me["run"])
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._keep, daemon=True)
        self._thread.start()

    def _acquire(self) -> None:
        seen: str | None = None
        since = time.monotonic()
        while True:
            try:
                create_text(self._file, self._text())
                return
            except FileExistsError:
                now, owner = version(self._file), self._owner()
            if now is None or owner is None:  # it was released meanwhile
                continue
            if _is_gone(owner) or (now == seen and time.monotonic() - since > EXPIRY):
                delete_version(self._file, now)
                continue
            if seen is None:
                seen, since = now, time.monotonic()
                print(f"{self._workdir} is locked by {_name(owner)}: watching for {EXPIRY:.0f} s whether it runs")
            elif now != seen:
                raise in_use(self._workdir, _name(owner))
            time.sleep(min(EXPIRY / 20, 1.0))

    def _text(self) -> str:
        return json.dumps(self._me | {"written": time.time()}) + "\n"

    def _owner(self) -> dict[str, Any] | None:
        try:
            found = json.loads(self._file.read_text())
        except FileNotFoundError:
            return None
        except ValueError:
            found = None
        return found if isinstance(found, dict) else {}

    def _keep(self) -> None:
        while not self._closed.wait(RENEW):
            try:
                owner = self._owner()
                if owner is None or owner.get("run") != self._me["run"]:
                    self._lost = "nobody" if owner is None else _name(owner)
                    return
                write_text(self._file, self._text())
            except Exception as error:  # of the network; as long as nobody else takes it, it is ours
                print(f"the lock of {self._workdir} cannot be renewed: {error}")

    def check(self) -> None:
        """Raise ValueError where another run has taken the folder, after this one could not reach it for too long."""
        if self._lost is not None:
            raise ValueError(
                f"{self._workdir} was taken over by another run ({self._lost}), since this one had not been able to "
                f"renew its lock for {EXPIRY:.0f} s; this one stops"
            )

    def close(self) -> None:
        """Release it."""
        self._closed.set()
        self._thread.join()
        _held.discard(self._me["run"])  # also where it cannot be deleted
        if self._lost is None:
            delete(self._file)


def in_use(workdir: Path, owner: str) -> ValueError:
    """The error of a folder that another run uses."""
    return ValueError(f"{workdir} is in use by another run ({owner}); wait until it ends, or choose another --workdir")


def _name(owner: dict[str, Any]) -> str:
    return f"process {owner.get('process')} on {owner.get('host')}"


def _is_gone(owner: dict[str, Any]) -> bool:
    """Whether the owner of a lock was a process here that is no more, or this one, which does not know of it.

    That is an earlier run of this process, or this run, where the answer to its request was lost.
    """
    process = owner.get("process")
    if owner.get("host") != socket.gethostname() or owner.get("namespace") != _namespace() or type(process) is not int:
        return False
    if process == os.getpid():
        return owner.get("run") not in _held
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return True
    except OSError:
        return False
    return False


def _namespace() -> str:
    """What tells containers apart that have the name of one machine."""
    try:
        with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as boot:
            return f"{os.readlink('/proc/self/ns/pid')} {boot.read().strip()}"
    except OSError:  # on another system than Linux
        return ""
