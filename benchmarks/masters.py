"""Loss curves of float32, of bfloat16 with float32 master weights, and of bfloat16 without them.

python benchmarks/masters.py --workdir /tmp/masters --plot docs/masters.png

Each trains a small model in PyTorch for 200 steps on the bundled recordings, float32 with three seeds of the noise and
the order of frames, from the same parameters and at the learning rate of fine-tuning times ten. The losses are means
over ten steps.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path

import numpy as np

from configs.metaworld_demo import get_config
from pi0.run_config import OptimizerConfig, RunConfig
from pi0_torch.training.train import train

SEEDS = (0, 1, 2)
WINDOW = 10  # steps of a mean
KINDS = {
    "float32": ("float32", "float32"),
    "bfloat16, float32 masters": ("bfloat16", "float32"),
    "bfloat16, no masters": ("bfloat16", "bfloat16"),
}


def curve(config: RunConfig, workdir: Path) -> np.ndarray:
    """The loss of each window of steps, of a run that is made where there is none."""
    train(config, workdir, device="cpu")
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    losses = np.array([row["loss"] for row in rows if "loss" in row])
    return losses[: len(losses) // WINDOW * WINDOW].reshape(-1, WINDOW).mean(1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workdir", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--plot", type=Path)
    args = parser.parse_args()
    start = RunConfig.from_dict(get_config("tiny").to_dict())
    start = dataclasses.replace(
        start, batch_size=16, steps=args.steps, log_every=1, eval_every=0, save_every=args.steps
    )
    start = dataclasses.replace(
        start, optimizer=OptimizerConfig(peak_lr=2.5e-4, final_lr=2.5e-4, warmup_steps=10), ema_decay=None
    )
    base = args.workdir / "base"
    first = dataclasses.replace(start, steps=1, optimizer=dataclasses.replace(start.optimizer, warmup_steps=0))
    train(first, base, device="cpu")
    curves: dict[str, list[np.ndarray]] = {}
    for kind, (dtype, params) in KINDS.items():
        for seed in SEEDS:
            config = dataclasses.replace(
                start,
                model=start.model.with_runtime(dtype=dtype),
                param_dtype=params,
                seed=seed,
                base_checkpoint=str(base),
            )
            curves.setdefault(kind, []).append(curve(config, args.workdir / f"{dtype}-{params}-{seed}"))
    bands = {kind: np.stack(found) for kind, found in curves.items()}
    reference = bands["float32"]
    spread = float(np.mean(reference.max(0) - reference.min(0)))
    for kind, band in bands.items():
        within = np.mean((band.mean(0) >= reference.min(0)) & (band.mean(0) <= reference.max(0)))
        apart = np.abs(band - reference).mean()  # of the same seed: the same frames, noise and times
        print(
            f"{kind:<28} last {band[:, -1].mean():.3f}, within the seeds of float32 {within:.0%}, "
            f"apart from float32 {apart / spread:.1%} of their spread"
        )
    if args.plot:
        draw(bands, args.plot)


def draw(bands: dict[str, np.ndarray], target: Path) -> None:
    """The mean of each kind's curves [seeds, windows], and of float32 the range of its seeds."""
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(7, 4))
    steps = WINDOW * (1 + np.arange(next(iter(bands.values())).shape[1]))
    axis.fill_between(steps, bands["float32"].min(0), bands["float32"].max(0), alpha=0.25, label="float32, three seeds")
    for kind, band in bands.items():
        axis.plot(steps, band.mean(0), "--" if "masters" in kind else "-", label=kind)
    axis.set(xlabel="step", ylabel="loss", title="Mean loss of three seeds")
    axis.legend()
    axis.grid(alpha=0.3)
    figure.savefig(target, dpi=110, bbox_inches="tight")


if __name__ == "__main__":
    main()
