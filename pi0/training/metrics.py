"""Logging of a run's scalars and images: a progress bar, `metrics.jsonl`, TensorBoard, and optionally W&B."""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Self

import numpy as np
from PIL import Image
from tensorboardX import SummaryWriter
from tqdm import tqdm

from pi0.datasets.batches import Batches
from pi0.storage import resolved, write_text
from pi0.training.data import Loader
from pi0.training.mirror import Mirror, keep_lines

logger = logging.getLogger(__name__)

PROFILED = range(5, 10)  # steps after the first one that are traced
# Peak bfloat16 operations per second of one device, by the beginning of its name: JAX's `device_kind`.
PEAK_FLOPS = {
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5": 459e12,
    "TPU v6 lite": 918e12,
    "NVIDIA A100": 312e12,
    "NVIDIA L40S": 362e12,
    "NVIDIA H100": 989e12,
    "NVIDIA H200": 989e12,
}


FINITE = {"loss": "loss", "grad_norm": "gradient", "param_norm": "norm of the parameters"}


class Window:
    """The steps since the last line of the log: their scalars, their time, and the time spent waiting for data."""

    def __init__(self, loader: Loader, batch_size: int):
        self._loader, self._batch_size = loader, batch_size
        self.restart()

    def restart(self) -> None:
        """Start a new window, without steps."""
        self.rows: list[dict[str, Any]] = []
        self._start, self._waited = time.perf_counter(), self._loader.waited
        self._read, self._truncated = self._loader.read, self._loader.truncated

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Exclude the time spent inside."""
        before = time.perf_counter()
        yield
        self._start += time.perf_counter() - before

    def means(self, device_metrics: Callable[[float], dict[str, float]]) -> dict[str, float]:
        """The mean of each scalar, samples per second, the share of time spent waiting for data, and device metrics.

        The latter are those of a device that does so many steps per second. And `truncated_prompts`, the share of
        examples whose text was cut, where there are any: the first is logged.
        """
        rows = [{name: float(value) for name, value in row.items()} for row in self.rows]  # waits for them
        scalars = {name: float(np.mean([row[name] for row in rows])) for name in rows[0]}
        elapsed = time.perf_counter() - self._start
        rates = {
            "samples_per_second": len(self.rows) * self._batch_size / elapsed,
            "data_wait": (self._loader.waited - self._waited) / elapsed,
        }
        if cut := self._loader.truncated - self._truncated:
            rates["truncated_prompts"] = cut / (self._loader.read - self._read)
            if not self._truncated:
                logger.warning(
                    "the text of %.1f %% of the examples is cut, with the state or the actions in it: raise "
                    "model.max_token_len (logged once; `truncated_prompts` in the metrics)",
                    100 * rates["truncated_prompts"],
                )
        return scalars | rates | device_metrics(len(self.rows) / elapsed)


class Metrics(ExitStack):
    """Logs scalars and images by step; all processes of a run but one are `silent` and log nothing.

    What an earlier process logged of steps after `start` is replaced: they are done again.
    """

    def __init__(
        self,
        workdir: Path,
        start: int,
        config: dict[str, Any],
        *,
        total_steps: int,
        wandb: str = "",
        silent: bool = False,
    ):
        super().__init__()
        self._silent, self._mirror = silent, self.enter_context(Mirror(workdir))
        folder = self._mirror.folder
        self._images = folder / "images"
        self._jsonl = Path(os.devnull) if silent else folder / "metrics.jsonl"
        if not silent:
            keep_lines(workdir / "metrics.jsonl", self._jsonl, start)
        options: dict[str, Any] = {"write_to_disk": not silent, "purge_step": start + 1}
        self._tensorboard = SummaryWriter(str(folder / "tensorboard"), **options)
        self.callback(self._tensorboard.close)
        bar = {"unit": "step", "dynamic_ncols": True, "desc": "training", "disable": silent}
        self._bar = self.enter_context(tqdm(total=total_steps, initial=start, **bar))
        self._wandb: Any = None
        if wandb and not silent:
            import wandb as client

            name = resolved(workdir).name
            options = {"name": name, "id": name, "resume": "allow"}
            self._wandb = client.init(project=wandb, dir=folder, config=config, **options)
            self._wandb.define_metric("parity/*", step_metric="parity/step")
            self.callback(self._wandb.finish)

    def advance(self, steps: int = 1) -> None:
        """Advance the progress bar."""
        self._bar.update(steps)

    def write(self, step: int, scalars: dict[str, float], *, late: bool = False) -> None:
        """Log scalars; the progress bar shows `loss`, `grad_norm` and `samples_per_second`.

        Those that are `late` may be of an earlier step than others were. W&B, which takes steps in order, gets them
        with the newest one, and draws them over `parity/step`.
        """
        with self._jsonl.open("a") as lines:
            lines.write(json.dumps({"step": step, **scalars}) + "\n")
        for name, value in scalars.items():
            self._tensorboard.add_scalar(name, value, step)
        if self._wandb is not None:
            if late:
                self._wandb.log(scalars | {"parity/step": step}, commit=False)
            else:
                self._wandb.log(scalars, step=step)
        if "loss" in scalars:
            self._bar.set_postfix_str(
                f"loss {scalars['loss']:.4f}, grad norm {scalars['grad_norm']:.2f}, "
                f"{scalars['samples_per_second']:.0f} samples/s"
            )
        elif not self._silent and not late:
            line = ", ".join(f"{name} {value:.4f}" for name, value in scalars.items() if "/" not in name)
            self._bar.write(f"step {step}: {line}")

    def logged(self, name: str) -> set[int]:
        """The steps of which a scalar of this name is in `metrics.jsonl`, from an earlier process too."""
        if self._silent or not self._jsonl.exists():
            return set()
        rows = map(json.loads, self._jsonl.read_text(encoding="utf-8").splitlines())
        return {row["step"] for row in rows if name in row}

    def publish(self, *, wait: bool = False) -> None:
        """Copy what was logged to the bucket of the run's folder, if that is in one; see `Mirror`."""
        if not self._silent:
            self._tensorboard.flush()
            self._mirror.publish(wait=wait)

    def image(self, name: str, step: int) -> Path | None:
        """The PNG file to write an image to, before `show`; None in a silent process."""
        if self._silent:
            return None
        self._images.mkdir(exist_ok=True)
        return self._images / f"{name}_{step}.png"

    def show(self, name: str, step: int, file: Path) -> None:
        """Log the image in `file` to TensorBoard and W&B."""
        with Image.open(file) as image:
            pixels = np.asarray(image.convert("RGB"))
        self._tensorboard.add_image(name, pixels, step, dataformats="HWC")
        if self._wandb is not None:
            import wandb as client

            self._wandb.log({name: client.Image(pixels)}, step=step)


def utilization(device: str, flops: float, steps_per_second: float) -> dict[str, float]:
    """`mfu`, `flops` of a device's step relative to the peak of a device of this name, where that is known."""
    known = [name for name in PEAK_FLOPS if device.startswith(name)]
    return {"mfu": flops * steps_per_second / PEAK_FLOPS[max(known, key=len)]} if known else {}


def require_finite(rows: list[dict[str, Any]], done: int, workdir: Path, training: Batches, lead: bool) -> None:
    """Raise FloatingPointError unless loss, gradient norm and parameter norm of the steps up to `done` are finite.

    `rows` are the scalars of these steps. The `lead` writes the frames of the first bad step's batch to
    `non_finite.json`.
    """
    finite = {name: np.isfinite([float(row[name]) for row in rows]) for name in FINITE}
    if all(x.all() for x in finite.values()):
        return
    what = min((name for name, x in finite.items() if not x.all()), key=lambda name: int(np.argmin(finite[name])))
    step = done - len(rows) + int(np.argmin(finite[what]))
    frames = [{"dataset": dataset, "frame": frame} for dataset, frame in training.frames(step)]
    if lead:
        write_text(workdir / "non_finite.json", json.dumps({"step": step, "frames": frames}, indent=2) + "\n")
    raise FloatingPointError(
        f"the {FINITE[what]} of step {step + 1} is not finite, and nothing was saved after it; its frames are in "
        f"{workdir / 'non_finite.json'}. Look at them and at the norm stats (pi0-stats warns of dimensions that hardly "
        "vary), or lower optimizer.peak_lr"
    )


class Trace:
    """A profile of this process's steps `PROFILED` in `folder`, for TensorBoard or Perfetto; None: no profile.

    A framework says how one begins, how it ends, and how to wait for the results of a step.
    """

    def __init__(self, folder: Path | None, start: int):
        self._folder, self._start, self._running = folder, start, False

    def begin(self, folder: Path) -> None:
        """Start to profile into a folder."""
        raise NotImplementedError

    def end(self) -> None:
        """Stop, and write the profile."""
        raise NotImplementedError

    def wait(self, results: Any) -> None:
        """Wait until the results of a step are computed."""
        raise NotImplementedError

    def __enter__(self) -> Self:
        return self

    def before(self, step: int) -> None:
        """Call before each step."""
        if self._folder is not None and step == self._start + PROFILED.start:
            self._mirror = Mirror(self._folder)
            self.begin(self._mirror.folder)
            self._running = True

    def after(self, step: int, results: Any) -> None:
        """Call after each step, with its results."""
        if self._running and step == self._start + PROFILED.stop - 1:
            self.wait(results)
            self.__exit__()

    def __exit__(self, *exception: object) -> None:
        if self._running:
            self.end()
            self._mirror.__exit__()
            self._running = False
