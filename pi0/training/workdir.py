"""The folder of a run: used by one run at a time, resumed by the same config, replaced once the new run can go on.

config.json, data.json, metrics.jsonl, tensorboard/, images/, profile/, wandb/, checkpoints/, exports/, and
.lock         of the process that trains in it (pi0.training.lock)
.replaced/    with --overwrite, the files of the run before, until the new one has its first checkpoint
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from pi0.assets import CHECKSUMS, COMMITTED, Assets, AssetsError, is_complete
from pi0.parameters import flatten
from pi0.reading import read_json
from pi0.run_config import RunConfig
from pi0.storage import delete, is_bucket, is_folder, move, requests, resolved, write_text
from pi0.training.lock import NAME, BucketLock, FileLock, lock

FILES = (
    *("config.json", "data.json", "metrics.jsonl", "tensorboard", "images", "profile", "wandb", "checkpoints"),
    *("exports", "non_finite.json"),
)
MOVING = "moving"  # a file in .replaced while the old run's files are moved there or back
# The fields that may differ when a run goes on: they change no batch, and no number but by the order of its sums.
FREE = (
    *("steps", "log_every", "eval_every", "save_every", "keep_", "export_every", "wandb"),
    *("mesh", "sharding", "accumulate", "model.runtime.remat", "data.workers", "data.cache"),
)
MOVED = "data.root"  # may differ too, where the data has the same contents
FREE_OF_SOURCE = ("root", "cache", "workers")  # in the tables of data.mixture


def check_workdir(
    workdir: Path,
    config: RunConfig,
    overwrite: bool = False,
    contents: Sequence[str] | None = None,
    framework: str | None = None,
) -> None:
    """Raise ValueError where a run of `config` can neither begin in `workdir` nor, with `overwrite`, replace its run.

    That is a folder of something else, and without `overwrite` one with checkpoints of a config that differs in a field
    which changes the result, of datasets with other `contents` (None: they are not known yet), or of another
    `framework` (None: either).
    """
    if is_bucket(workdir) and not str(workdir).startswith("gs://"):
        raise ValueError(
            f"{workdir}: checkpoints are written to folders of this machine and to gs:// alone (by Orbax); give such a "
            "--workdir, and copy what is finished: pi0-convert RUN s3://…"
        )
    with requests(f"cannot read {workdir}"):
        there = workdir.exists()
    if there and not is_folder(workdir):
        raise ValueError(f"{workdir} is not a folder; choose another --workdir")
    if "\\" in str(resolved(workdir)):
        raise ValueError(f"{workdir} has a backslash in its path, which tensorstore takes for a slash; choose another")
    before = recorded_config(workdir)
    if before is None or overwrite:
        return
    wrote = framework_of(completed(workdir)[-1])
    if framework not in (None, wrote):
        raise ValueError(
            f"{workdir} has a run in {wrote}, and this one is in {framework}. To go on with it, convert it first: "
            f"pi0-convert {workdir} NEW --to pi0_{framework} --with-training-state, and train with --workdir NEW"
        )
    was, now = _fixed(before), _fixed(config)
    changed = [n for n in sorted(was.keys() | now.keys()) if was.get(n) != now.get(n)]
    recorded = recorded_contents(workdir)
    moved = [source.root for source in before.data.sources] != [source.root for source in config.data.sources]
    if recorded is None and moved:
        changed.append(MOVED)
        was[MOVED], now[MOVED] = before.data.root, config.data.root
    if changed:
        changes = ", ".join(f"{n} was {was.get(n)!r} and is {now.get(n)!r}" for n in changed[:5])
        raise ValueError(f"{workdir} has a run of another config: {changes}; choose another --workdir, or --overwrite")
    if contents is None or recorded is None:
        return
    for source, old, new in zip(config.data.sources, recorded, contents, strict=True):
        if old != new:
            raise ValueError(
                f"{workdir} has a run of other data: {source.root or source.questions} is not what it was when the run "
                "began; restore it, choose another --workdir, or --overwrite"
            )


def _fixed(config: RunConfig) -> dict[str, object]:
    """The fields of a config that must be the same when a run goes on, by their dotted names."""
    values = {n: v for n, v in flatten(config.to_dict()).items() if not n.startswith((*FREE, MOVED))}
    values["data.mixture"] = [{k: v for k, v in t.items() if k not in FREE_OF_SOURCE} for t in config.data.mixture]
    return values


def recorded_contents(workdir: Path) -> list[str] | None:
    """What identifies the contents of each dataset of the run in `workdir`; None where it is not recorded."""
    try:
        contents = read_json(workdir / "data.json").get("contents")
    except (FileNotFoundError, ValueError):
        return None
    return contents if isinstance(contents, list) else None


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
        except ConnectionError:
            raise
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


def framework_of(step: Path) -> str:
    """The framework that wrote a checkpoint of a run: torch or jax."""
    with requests(f"cannot read {step}"):
        return "torch" if (step / "model.safetensors").exists() else "jax"


def completed(workdir: Path) -> list[Path]:
    """The folders of the complete checkpoints, the oldest first."""
    with requests(f"cannot list {workdir}"):
        folders = [f for f in (workdir / "checkpoints").glob("*") if f.name.isdigit() and is_complete(f)]
    return sorted(folders, key=lambda folder: int(folder.name))


class RunFolder:
    """A context manager of a run's folder: locks it, moves a run that is replaced aside, and writes `config.json`.

    `contents` identify the datasets (`pi0.datasets.identity`), `index` is the number of this process of the run, whose
    processes wait for each other in `barrier`. Where the new run ends in an error before its first
    checkpoint, the old one is put back. Process 0 of a run does all of this, once all others have looked at the folder,
    and they wait for it. Raises ValueError as `check_workdir`, while another run uses the folder, and where this folder
    is not the same for all processes.
    """

    def __init__(
        self,
        workdir: Path,
        config: RunConfig,
        overwrite: bool = False,
        contents: Sequence[str] = (),
        *,
        index: int = 0,
        barrier: Callable[[str], object] = lambda name: None,
    ):
        self._index, self._barrier = index, barrier
        self._workdir, self._config, self._overwrite = workdir, config, overwrite
        self._contents = list(contents)
        self._aside = workdir / ".replaced"
        self._lock: FileLock | BucketLock | None = None

    def __enter__(self) -> RunFolder:
        self._barrier("run folder checked")
        if self._index == 0:
            if not is_bucket(self._workdir):
                self._workdir.mkdir(parents=True, exist_ok=True)
            with requests(f"cannot lock {self._workdir}"):
                self._lock = lock(self._workdir)
            try:
                with requests(f"cannot begin in {self._workdir}"):
                    self._begin()
            except BaseException as error:
                self.__exit__(type(error), error)
                raise
        self._barrier("run folder")
        if not (self._workdir / NAME).exists():
            raise ValueError(
                f"{self._workdir} of process {self._index} is not that of process 0: give a --workdir that all "
                "processes see, such as gs://bucket/path"
            )
        return self

    def _begin(self) -> None:
        self._settle()  # what a run that was killed left
        check_workdir(self._workdir, self._config, self._overwrite, self._contents)
        if self._overwrite:
            _move(self._workdir, self._aside, self._aside)
        files = {"data.json": {"contents": self._contents}, "config.json": self._config.to_dict()}
        for name, values in files.items():
            write_text(self._workdir / name, json.dumps(values, indent=2) + "\n")

    def settle(self) -> None:
        """Delete the run that was replaced if this one has a checkpoint. Raises ValueError where the lock is lost."""
        if self._lock is None:
            return
        self._lock.check()
        with requests(f"cannot read {self._aside}"):
            settled = self._aside.exists() and not (self._aside / MOVING).exists() and completed(self._workdir)
        if settled:
            delete(self._aside)

    def _settle(self) -> None:
        self.settle()
        if self._aside.exists():
            if not (self._aside / MOVING).exists():  # the new run has files there
                for name in FILES:
                    delete(self._workdir / name)
            _move(self._aside, self._workdir, self._aside)
            delete(self._aside)

    def __exit__(self, kind: Any = None, error: BaseException | None = None, trace: Any = None) -> None:
        if self._lock is None:
            return
        try:
            try:
                with requests(f"cannot tidy up {self._workdir}"):
                    self._settle()
            finally:
                self._lock.close()
                self._lock = None
        except OSError as problem:
            if error is None:
                raise
            print(f"{self._workdir} is left to the next run to tidy up: {problem}")


def _move(source: Path, target: Path, aside: Path) -> None:
    """Move a run's files. While it does, `aside` has the file MOVING: then each file is in one of both, or in both."""
    write_text(aside / MOVING, "")
    for name in FILES:
        if (source / name).exists():
            move(source / name, target / name, last=[f"*/{COMMITTED}", f"*/{CHECKSUMS}"])
    delete(aside / MOVING)
