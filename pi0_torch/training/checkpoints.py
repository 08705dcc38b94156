"""Checkpoints of a training run, in one layout whatever the number of processes.

checkpoints/<step>/model.safetensors              what is evaluated: the moving average where there is one, frozen ones
checkpoints/<step>/train_state/state.safetensors  what training resumes from, without what the file above has: trained
                                                  parameters, the optimizer's state, and its number of updates
checkpoints/<step>/config.json, assets            config, norm stats
checkpoints/<step>/validation.json                metrics of its step, where there are any, by which the best is kept
checkpoints/<step>/checksums.json                 of every file
checkpoints/damaged-<step>                        a checkpoint that was found damaged and moved there

A checkpoint gets its name when it is complete: until then it is in a folder that begins with a dot, or in a bucket it
has no checksums.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

import convert.tensors
from convert.checkpoints import STATE_FILE, WEIGHTS_FILE
from convert.checksums import find_changes, read_checksums, sign
from convert.formats.safetensors import read_safetensors, write_safetensors
from convert.training_state import group
from pi0.assets import CHECKSUMS, Assets
from pi0.reading import read_json
from pi0.storage import delete, is_bucket, move, new_folder, requests
from pi0.training.checkpoints import BEST, put_aside, writing
from pi0.training.workdir import completed
from pi0_torch.loading import to_numpy, to_torch
from pi0_torch.training.sharding import barrier, local_box, process_index, whole

VALIDATION = "validation.json"


class Checkpoints:
    """The checkpoints of one run, written in a thread by the first of its processes.

    The newest `keep` stay, with `keep_best` also the one of the lowest validation loss, with `keep_every` also those of
    every so many steps, for each number of them. All processes of a run make one and call the same methods.
    """

    def __init__(self, folder: Path, keep: int, keep_best: bool = False, keep_every: Sequence[int] = ()):
        self._folder, self._keep, self._keep_best = folder, keep, keep_best
        self._keep_every = [steps for steps in keep_every if steps]
        self._lead = process_index() == 0
        self._thread = ThreadPoolExecutor(1)
        self._writing_one: Future[None] | None = None
        if self._lead and not is_bucket(folder):
            folder.mkdir(parents=True, exist_ok=True)
            for partial in folder.glob(".*"):  # of a process that was killed
                delete(partial)

    @property
    def latest_step(self) -> int | None:
        """The step of the newest complete checkpoint."""
        steps = self._steps()
        return max(steps) if steps else None

    def _steps(self) -> list[int]:
        return [int(folder.name) for folder in completed(self._folder.parent)]

    def save(
        self,
        step: int,
        train_state: Mapping[str, Any],
        parameters: Mapping[str, torch.Tensor],
        assets: Assets,
        metrics: dict[str, float] | None = None,
    ) -> None:
        """Start writing a checkpoint, which gets its name when it is complete; do nothing for a step that exists.

        `parameters` are those of the model, as which the tensors of `train_state` are sharded; `metrics` may contain
        the validation loss, by which the best is kept. Raises OSError where this checkpoint, or the one before, cannot
        be written. Tensors have any shape.
        """
        with writing(self._folder, lambda: self.latest_step):
            if self._writing_one is not None:
                self._writing_one.result()
            exists = [self._lead and step in self._steps()]
            if dist.is_initialized():
                dist.broadcast_object_list(exists)
            if exists[0]:
                return
            averaged = train_state["params"] if train_state["ema"] is None else train_state["ema"]
            weights = self._collect({**averaged, **train_state["frozen"]}, parameters)
            tensors = {"params": train_state["params"], **train_state["opt_state"]}
            state: dict[str, np.ndarray] = {"count": np.array([tensors.pop("count")], np.int64)}
            for name, part in tensors.items():
                state |= {f"{name}/{key}": x for key, x in self._collect(part, parameters).items()}
            if self._lead:
                assets = dataclasses.replace(assets, step=step)
                self._writing_one = self._thread.submit(self._write, step, weights, state, assets, metrics or {})

    def _collect(
        self, tensors: Mapping[str, torch.Tensor], parameters: Mapping[str, torch.Tensor]
    ) -> dict[str, np.ndarray]:
        """Copies of whole tensors in memory of the host; none but in the first process."""
        found = {}
        for name, local in tensors.items():
            full = whole(local, parameters[name])
            if self._lead:
                found[name] = to_numpy(full.clone() if full.device.type == "cpu" else full)
        return found

    def _write(
        self,
        step: int,
        weights: dict[str, np.ndarray],
        state: dict[str, np.ndarray],
        assets: Assets,
        metrics: dict[str, float],
    ) -> None:
        with new_folder(self._folder / str(step), marker=(CHECKSUMS,)) as folder:
            write_safetensors(folder / WEIGHTS_FILE, _tensors(weights), {"format": "pt"})
            (folder / STATE_FILE).parent.mkdir()
            write_safetensors(folder / STATE_FILE, _tensors(state))
            assets.save(folder / "assets", config_folder=folder)
            if math.isfinite(metrics.get(BEST, math.nan)):
                (folder / VALIDATION).write_text(json.dumps(metrics), encoding="utf-8")
            sign(folder)
        self._delete_old()

    def _delete_old(self) -> None:
        steps = self._steps()
        kept = set(steps[-self._keep :])
        kept |= {step for step in steps for every in self._keep_every if step % every == 0}
        if self._keep_best:
            losses = {step: loss for step in steps if (loss := self._validation_loss(step)) is not None}
            kept |= {min(losses, key=lambda step: losses[step])} if losses else set()
        for step in sorted(set(steps) - kept):
            if not is_bucket(self._folder):  # what is deleted in part must not look complete
                aside = self._folder / f".{step}.deleted"
                move(self._folder / str(step), aside)
                delete(aside)
            else:
                delete(self._folder / str(step) / CHECKSUMS)
                delete(self._folder / str(step))

    def _validation_loss(self, step: int) -> float | None:
        with contextlib.suppress(OSError, ValueError, KeyError):
            return float(read_json(self._folder / str(step) / VALIDATION)[BEST])
        return None

    def restore_newest(self, train_state: dict[str, Any], parameters: Mapping[str, torch.Tensor]) -> int:
        """Restore the newest intact checkpoint into `train_state`, and return its step.

        Damaged ones are reported and renamed, and the one before is restored; 0 without any. Tensors have any shape.
        """
        while True:
            found: list[Any] = [None, None]  # the step, and what is wrong with it
            if self._lead and (step := self.latest_step) is not None:
                with requests(f"cannot read {self._folder / str(step)}"):
                    found = [step, damage(self._folder / str(step))]
            if dist.is_initialized():
                dist.broadcast_object_list(found)
            step, problem = found
            if step is None:
                return 0
            if problem is None:
                self.restore(step, train_state, parameters)
                return step
            if self._lead:
                put_aside(self._folder, step, problem)
            barrier(f"damaged checkpoint {step}")

    @torch.no_grad()
    def restore(self, step: int, train_state: dict[str, Any], parameters: Mapping[str, torch.Tensor]) -> None:
        """Set the tensors of `train_state` to those at `step`; each process reads its part. Tensors have any shape."""
        folder = self._folder / str(step)
        weights, state = read_safetensors(folder / WEIGHTS_FILE), read_safetensors(folder / STATE_FILE)
        optimizer = train_state["opt_state"]
        optimizer["count"] = int(state["count"].read(())[0])
        averaged = train_state["ema"] or {}
        parts = [(averaged | train_state["frozen"], weights), (train_state["params"], group(state, "params"))]
        parts += [(part, group(state, name)) for name, part in optimizer.items() if name != "count"]
        for tensors, stored in parts:
            for name, local in tensors.items():
                local.copy_(to_torch(stored[name].part(local_box(parameters[name]))))

    def close(self) -> None:
        """Wait until everything is written. Raises OSError where the newest one cannot be written."""
        with writing(self._folder, lambda: self.latest_step):
            self._thread.shutdown()
            if self._writing_one is not None:
                self._writing_one.result()


def _tensors(arrays: Mapping[str, np.ndarray]) -> dict[str, convert.tensors.Tensor]:
    return {name: convert.tensors.Tensor.of(array) for name, array in arrays.items()}


def damage(step: Path) -> str | None:
    """What is wrong with a checkpoint, or None: by its checksums, and by values that are not finite.

    Raises ConnectionError where it is in a bucket that cannot be read.
    """
    try:
        expected = read_checksums(step)
        if expected is not None and (problems := find_changes(step, expected)):
            return problems[0]
        with requests(f"cannot read {step}"):
            Assets.load(step)
            for file in (WEIGHTS_FILE, STATE_FILE):
                if (step / file).exists() and not all(map(_finite, read_safetensors(step / file).values())):
                    return "it has NaN or infinite values; the run had diverged"
    except ConnectionError:  # which says nothing about the checkpoint
        raise
    except (ValueError, OSError) as error:
        return str(error).removeprefix(f"{step}/").partition(": ")[0]
    return None


def _finite(tensor: convert.tensors.Tensor) -> bool:
    return all(bool(to_torch(tensor.read(part)).isfinite().all()) for part in convert.tensors.pieces(tensor))
