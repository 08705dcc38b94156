"""Pictures of a run: the loss curve, and predicted against recorded actions."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib
import numpy as np

matplotlib.use("Agg")
from matplotlib import pyplot as plt

_COLORS = ("#4c72b0", "#dd8452", "#55a868")


def plot_loss(metrics_file: Path, target: Path) -> None:
    """Training and validation loss by step, from `metrics.jsonl`, to a PNG."""
    rows = [json.loads(line) for line in metrics_file.read_text().splitlines()]
    figure, axis = plt.subplots(figsize=(7, 4))
    for name, color, style in (("loss", _COLORS[0], "-"), ("validation_loss", _COLORS[1], "o-")):
        points = [(row["step"], row[name]) for row in rows if name in row]
        if points:
            axis.plot(*zip(*points, strict=True), style, color=color, label=name.replace("_", " "))
    axis.set(xlabel="step", ylabel="flow-matching loss", ylim=(0, None), title="Training")
    axis.legend()
    axis.grid(alpha=0.3)
    _save(figure, target)


def plot_actions(
    recorded: np.ndarray, predicted: Mapping[str, np.ndarray], names: Sequence[str], target: Path, title: str
) -> None:
    """Recorded [F, A] against predicted [F, A] actions, by name of who predicted, one panel per dimension."""
    dims = recorded.shape[1]
    figure, axes = plt.subplots(dims, 1, figsize=(9, 1.8 * dims), sharex=True, squeeze=False)
    for d, axis in enumerate(axes[:, 0]):
        axis.plot(recorded[:, d], color="black", label="recorded")
        for i, (who, actions) in enumerate(predicted.items()):
            style = "-" if i == 0 else "--"
            axis.plot(actions[:, d], style, color=_COLORS[i % len(_COLORS)], label=who, alpha=0.9)
        axis.set_ylabel(names[d])
        axis.grid(alpha=0.3)
    axes[0, 0].legend(loc="upper right", ncols=1 + len(predicted))
    axes[0, 0].set_title(title)
    axes[-1, 0].set_xlabel("frame")
    _save(figure, target)


def _save(figure: plt.Figure, target: Path) -> None:
    figure.tight_layout()
    figure.savefig(target, dpi=120)
    plt.close(figure)
