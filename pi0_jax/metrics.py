"""Where a run's numbers go: a progress bar, `metrics.jsonl` and TensorBoard."""

from __future__ import annotations

import json
import os
from pathlib import Path

from tensorboardX import SummaryWriter
from tqdm import tqdm


class Metrics:
    """Writes scalars by step to every place; `silent`, for all processes of a run but one, to none."""

    def __init__(self, workdir: Path, start: int, total_steps: int, *, silent: bool = False):
        self._jsonl = Path(os.devnull if silent else workdir / "metrics.jsonl").open("a")
        self._tensorboard = SummaryWriter(str(workdir / "tensorboard"), write_to_disk=not silent)
        bar = {"unit": "step", "dynamic_ncols": True, "desc": "training", "disable": silent}
        self._bar = tqdm(total=total_steps, initial=start, **bar)

    def __enter__(self) -> Metrics:
        return self

    def __exit__(self, *exception: object) -> None:
        self._bar.close()
        self._tensorboard.close()
        self._jsonl.close()

    def advance(self, steps: int = 1) -> None:
        """Move the progress bar on."""
        self._bar.update(steps)

    def write(self, step: int, scalars: dict[str, float]) -> None:
        """Write scalars; `loss`, `grad_norm` and `samples_per_second` also stand in the progress bar."""
        self._jsonl.write(json.dumps({"step": step, **scalars}) + "\n")
        self._jsonl.flush()
        for name, value in scalars.items():
            self._tensorboard.add_scalar(name, value, step)
        if "loss" in scalars:
            self._bar.set_postfix_str(
                f"loss {scalars['loss']:.4f}, grad norm {scalars['grad_norm']:.2f}, "
                f"{scalars['samples_per_second']:.0f} samples/s"
            )
        else:
            line = ", ".join(f"{name} {value:.4f}" for name, value in scalars.items())
            if not self._bar.disable:
                self._bar.write(f"step {step}: {line}")
