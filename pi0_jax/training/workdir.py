"""The folder of a run: used by one run at a time, resumed by the same config, replaced once the new run can go on.

config.json, metrics.jsonl, tensorboard/, images/, profile/, wandb/, checkpoints/, and
.lock         of the process that trains in it; the system releases it when the process ends, in whatever way
.replaced/    with --overwrite, the files of the run before, until the new one has its first checkpoint
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import socket
from pathlib import Path
from typing import Any

import jax

from pi0.assets import Assets, AssetsError
from pi0.reading import read_json
from pi0.run_config import RunConfig
from pi0.storage import write_text
from pi0_jax.loading import flatten
from pi0_jax.training.sharding import barrier

FILES = ("config.json", "metrics.jsonl", "tensorboard", "images", "profile", "wandb", "checkpoints", "non_finite.json")
FREE = ("steps", "log_every", "eval_every", "save_every", "keep_", "mesh", "sharding", "wandb", "data.workers")


def check_workdir(workdir: Path, config: RunConfig, overwrite: bool = False) -> None:
    """Raise ValueError where a run of `config` can neither begin in `workdir` nor, with `overwrite`, replace its run.

    That is a folder of something else, and without `overwrite` one with checkpoints of a config that differs in a field
    which changes the result.
    """
    if workdir.exists() and not workdir.is_dir():
        raise ValueError(f"{workdir} is not a folder; choose another --workdir")
    if "\\" in str(workdir.resolve()):
        raise ValueError(f"{workdir} has a backslash in its path, which tensorstore takes for a slash; choose another")
    before = recorded_config(workdir)
    if before is None or overwrite:
        return
    was, now = flatten(before.to_dict()), flatten(config.to_dict())
    names = sorted(was.keys() | now.keys())
    changed = [n for n in names if was.get(n) != now.get(n) and not n.startswith(FREE)]
    if changed:
        changes = ", ".join(f"{n} was {was.get(n)!r} and is {now.get(n)!r}" for n in changed[:5])
        raise ValueError(f"{workdir} has a run of another config: {changes}; choose another --workdir, or --overwrite")


def recorded_config(workdir: Path) -> RunConfig | None:
    """The config of the run whose checkpoints are in `workdir`; None where there are none, as after a failed start.

    It is that of the newest checkpoint's assets, which are signed, or else of `config.json`. Raises ValueError for a
    folder of something else.
    """
    file = workdir / "config.json"
    values: Any = None
    try:
        values = read_json(file)
    except FileNotFoundError:
        pass
    except ValueError as error:
        print(f"{error}: it is written again")
    if values is not None and not {"model", "data"} <= values.keys():
        raise ValueError(f"{workdir} is not a run's folder: {file} is no run's config; choose another --workdir")
    folders = completed(workdir)
    for folder in reversed(folders):
        try:
            assets = Assets.load(folder)
        except (AssetsError, OSError):
            continue  # damaged; `Checkpoints.restore_newest` puts it aside
        if assets is not None and assets.training is not None:
            values = assets.training
            break
    if not folders:
        return None
    if values is None:
        raise ValueError(f"{workdir} is not a run's folder: its checkpoints name no config; choose another --workdir")
    try:
        return RunConfig.from_dict(values)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error


def completed(workdir: Path) -> list[Path]:
    """The folders of the complete checkpoints, the oldest first."""
    folders = [f for f in (workdir / "checkpoints").glob("*") if f.name.isdigit() and f.is_dir()]
    return sorted(folders, key=lambda folder: int(folder.name))


class RunFolder:
    """A context manager of a run's folder: locks it, moves a run that is replaced aside, and writes `config.json`.

    Where the new run ends in an error before its first checkpoint, the old one is put back. Process 0 of a run does all
    of this, the others wait for it. Raises ValueError as `check_workdir`, and while another run uses the folder.
    """

    def __init__(self, workdir: Path, config: RunConfig, overwrite: bool = False):
        self._workdir, self._config, self._overwrite = workdir, config, overwrite
        self._aside = workdir / ".replaced"
        self._lock: int | None = None

    def __enter__(self) -> RunFolder:
        if jax.process_index() == 0:
            self._workdir.mkdir(parents=True, exist_ok=True)
            self._lock = lock(self._workdir)
            try:
                self._settle()  # what a run that was killed left
                check_workdir(self._workdir, self._config, self._overwrite)
                if self._overwrite:
                    self._aside.mkdir()
                    _move(self._workdir, self._aside)
                write_text(self._workdir / "config.json", json.dumps(self._config.to_dict(), indent=2) + "\n")
            except BaseException:
                self.__exit__()
                raise
        barrier("run folder")
        return self

    def settle(self) -> None:
        """Delete the run that was replaced if this one has a checkpoint."""
        if jax.process_index() == 0 and self._aside.exists() and completed(self._workdir):
            shutil.rmtree(self._aside)

    def _settle(self) -> None:
        self.settle()
        if self._aside.exists():
            _move(self._aside, self._workdir)
            shutil.rmtree(self._aside)

    def __exit__(self, *exception: object) -> None:
        if self._lock is not None:
            try:
                self._settle()
            finally:
                os.close(self._lock)
                self._lock = None


def _move(source: Path, target: Path) -> None:
    """Move a run's files, in place of those of the same names."""
    for name in FILES:
        if (source / name).exists():
            if (target / name).is_dir():
                shutil.rmtree(target / name)
            os.replace(source / name, target / name)


def lock(workdir: Path) -> int:
    """The descriptor of the folder's lock, held until it is closed. Raises ValueError while another run holds it."""
    file = os.open(workdir / ".lock", os.O_RDWR | os.O_CREAT, 0o666)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        owner = os.pread(file, 1000, 0).decode("utf-8", "replace").strip()
        os.close(file)
        raise ValueError(
            f"{workdir} is in use by another run ({owner}); wait until it ends, or choose another --workdir"
        ) from error
    except OSError as error:
        print(f"{workdir} cannot be locked on this file system ({error}): start no second run in it")
    os.ftruncate(file, 0)
    os.pwrite(file, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)
    return file
